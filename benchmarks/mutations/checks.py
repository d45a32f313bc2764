"""Every check of the library on one repetition of one procedure: check -> whether it rejects."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from probinfer import checks
from probinfer.core.binding import LogDensity

from .faults import Procedure
from .settings import MutationSettings

__all__ = ["CHECKS", "GROUPS", "run_group"]

GROUPS = {
    "ranks": ("SBC, parameters", "SBC, all", "TARP", "TARP, x-free", "VSBC"),
    "distances": ("KSD", "Stein identity", "MMD", "energy", "sliced Wasserstein"),
    "classifier": ("C2ST",),
    "joint": ("joint, chain", "joint, end"),
}
CHECKS = tuple(name for names in GROUPS.values() for name in names)


def run_group(group: str, key, procedure: Procedure, settings: MutationSettings) -> dict[str, bool]:
    """Run the checks of a group on fresh data and draws."""
    return _RUN[group](key, procedure, settings)


@partial(jax.jit, static_argnums=(1, 2, 3))
def simulations(key, procedure: Procedure, num: int, num_draws: int):
    """True values (S, d), data (S, ...) and posterior draws (S, L, d)."""

    def one(key):
        key_theta, key_x, key_draws = jax.random.split(key, 3)
        theta = procedure.model.prior_sample(key_theta)
        x = procedure.model.simulate(key_x, theta)
        return theta, x, procedure.sample(key_draws, x, num_draws)

    return jax.vmap(one)(jax.random.split(key, num))


@partial(jax.jit, static_argnums=(1, 2))
def posterior_pair(key, procedure: Procedure, num: int):
    """Draws of a procedure and of the exact posterior at the one observed data set (num, d) each."""
    key_draws, key_exact = jax.random.split(key)
    x = jnp.asarray(procedure.model.observed)
    if procedure.init is None:
        draws = procedure.sample(key_draws, x, num)
    else:  # the ends of chains of their own
        lanes = jax.random.split(key_draws, num)
        draws = jax.vmap(lambda key: procedure.sample(key, x, 4)[-1])(lanes)
    return draws, procedure.model.exact(key_exact, x, num)


def rank_checks(key, procedure: Procedure, settings: MutationSettings) -> dict[str, bool]:
    key_data, key_ranks, key_tarp, key_free, key_vsbc = jax.random.split(key, 5)
    model, level = procedure.model, settings.level
    theta, x, draws = simulations(key_data, procedure, settings.simulations, settings.draws)
    table = checks.rank_table(
        key_ranks,
        draws,
        theta,
        x,
        log_prior_fn=model.log_prior,
        log_likelihood_fn=model.log_likelihood,
        thin=1,
    )
    report = checks.uniformity(table, level=level)
    parameters = [value for name, value in report.raw_pvalues.items() if name.startswith("value")]
    return {
        # What Holm's rule says if the parameters are the whole family.
        "SBC, parameters": bool(checks.holm(np.asarray(parameters)).min() <= level),
        "SBC, all": report.passed is False,
        "TARP": checks.tarp(key_tarp, draws, theta, x, level=level).passed is False,
        "TARP, x-free": checks.tarp(
            key_free, draws, theta, x, reference=model.any_reference, level=level
        ).passed
        is False,
        "VSBC": checks.vsbc(key_vsbc, draws, theta, level=level).passed is False,
    }


def distance_checks(key, procedure: Procedure, settings: MutationSettings) -> dict[str, bool]:
    key_draws, *keys = jax.random.split(key, 5)
    draws, exact = posterior_pair(key_draws, procedure, settings.sample)
    density = LogDensity(procedure.model.log_joint, np.asarray(procedure.model.observed))
    level = settings.level
    pvalues = {
        "KSD": checks.ksd(draws, density, key=keys[0], level=level).pvalue,
        "Stein identity": checks.stein_identity(draws, density, level=level).pvalue,
        "MMD": checks.mmd(draws, exact, key=keys[1], level=level).pvalue,
        "energy": checks.energy_distance(draws, exact, key=keys[2], level=level).pvalue,
        "sliced Wasserstein": checks.sliced_wasserstein(draws, exact, key=keys[3], level=level).pvalue,
    }
    return {name: bool(np.asarray(pvalue) <= level) for name, pvalue in pvalues.items()}


def classifier_check(key, procedure: Procedure, settings: MutationSettings) -> dict[str, bool]:
    key_draws, key_test = jax.random.split(key)
    draws, exact = posterior_pair(key_draws, procedure, settings.sample)
    return {"C2ST": bool(checks.c2st(key_test, draws, exact, level=settings.level).pvalue <= settings.level)}


def joint_checks(key, procedure: Procedure, settings: MutationSettings) -> dict[str, bool]:
    model = procedure.model
    report = checks.joint_test(
        key,
        model.prior_sample,
        model.simulate,
        procedure.transition,
        init_fn=procedure.init,
        log_prior_fn=model.log_prior,
        log_likelihood_fn=model.log_likelihood,
        num_simulations=settings.simulations,
        num_draws=settings.num_states,
        level=settings.level,
        mode="vmap",
        batch_size=settings.simulations,
        progress=False,
    )
    raw = report.ranks.raw_pvalues
    return {
        f"joint, {part}": bool(
            checks.holm(np.asarray([p for name, p in raw.items() if name.startswith(part)])).min()
            <= settings.level
        )
        for part in ("chain", "end")
    }


_RUN = {
    "ranks": rank_checks,
    "distances": distance_checks,
    "classifier": classifier_check,
    "joint": joint_checks,
}
