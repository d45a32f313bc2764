"""The checks of the library that take a particle method, on one repetition: check -> whether it rejects."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from probinfer import checks

from .checks import rank_checks
from .clouds import Cloud
from .settings import MutationSettings

__all__ = ["CLOUD_CHECKS", "groups_of", "run_cloud_group"]

_RANKS = ("SBC, parameters", "SBC, all", "TARP", "TARP, x-free", "VSBC")
_EVIDENCE = ("evidence", "sandwich")
_JOINT = ("joint, chain", "joint, end")
_LAW = ("law of the scheme",)
CLOUD_CHECKS = (*_LAW, *_EVIDENCE, *_RANKS, *_JOINT)
_PARTICLES, _DEAD = 8, 2  # of the law of a scheme; the last ones are dead


def groups_of(cloud: Cloud) -> dict[str, tuple[str, ...]]:
    """The groups of checks that take a method, and their checks."""
    groups: dict[str, tuple[str, ...]] = {"evidence": _EVIDENCE}
    if cloud.scheme is not None:
        groups["law"] = _LAW
    if cloud.sample is not None:
        groups["ranks"] = _RANKS
    if cloud.transition is not None:
        groups["joint"] = _JOINT if cloud.reversible else _JOINT[1:]
    return groups


def run_cloud_group(group: str, key, cloud: Cloud, settings: MutationSettings) -> dict[str, bool]:
    """Run the checks of a group on fresh data and draws."""
    return _RUN[group](key, cloud, settings)


@partial(jax.jit, static_argnums=(1, 2))
def estimates(key, cloud: Cloud, num: int):
    """Forward and reverse log estimates minus the exact value (num,), all at one simulated data set.

    Over data sets the mean of Zhat / Z would be one for every filter whose predictions are normalized, right or wrong.
    """
    key_theta, key_x, key_exact, key_runs = jax.random.split(key, 4)
    x = cloud.model.simulate(key_x, cloud.model.prior_sample(key_theta))
    starts = cloud.model.exact(key_exact, x, num)
    return jax.vmap(cloud.estimates, (0, 0, None))(jax.random.split(key_runs, num), starts, x)


def evidence_checks(key, cloud: Cloud, settings: MutationSettings) -> dict[str, bool]:
    """Is E[Zhat / Z] one, and in reverse E[Z / Zhat] the chance that Zhat > 0 (t-tests, Holm)? Do the bounds agree?"""
    forward, reverse = (np.asarray(x, float) for x in estimates(key, cloud, settings.runs))
    alive, started = np.isfinite(forward), reverse > -np.inf  # not started: no exact draw was found
    reverse = reverse[started]
    differences = np.exp(forward) - 1, np.exp(-reverse) - alive[started]
    pvalues = [float(stats.ttest_1samp(difference, 0.0).pvalue) for difference in differences]
    # A run in which every particle died bounds nothing from below: the check refuses it, so it is left out here.
    report = checks.evidence_sandwich(forward[alive], reverse, level=settings.level)
    return {
        "evidence": bool(checks.holm(np.asarray(pvalues)).min() <= settings.level),
        "sandwich": report.passed is False,
    }


@partial(jax.jit, static_argnums=(1, 2))
def offspring(key, cloud: Cloud, num: int):
    """Weights (n,) and what their offspring weigh (num, n)."""
    key_weights, key_runs = jax.random.split(key)
    log_weights = jax.random.normal(key_weights, (_PARTICLES,)).at[-_DEAD:].set(-jnp.inf)

    def one(key):
        ancestors, new = cloud.scheme(key, log_weights, _PARTICLES)
        return jnp.zeros(_PARTICLES).at[ancestors].add(jnp.exp(new))

    return jnp.exp(log_weights), jax.vmap(one)(jax.random.split(key_runs, num))


def law_check(key, cloud: Cloud, settings: MutationSettings) -> dict[str, bool]:
    """Do the offspring of each particle weigh what it weighed, on average over resamplings of one set of weights?"""
    expected, observed = (np.asarray(x) for x in offspring(key, cloud, settings.runs))
    error = observed.std(axis=0, ddof=1) / np.sqrt(len(observed))
    gap = np.abs(observed.mean(axis=0) - expected)
    sure = error < 1e-9  # always the same: right or wrong to rounding
    scores = gap / np.where(sure, 1.0, error)
    pvalues = np.where(sure, np.where(gap < 1e-9, 1.0, 0.0), 2 * stats.norm.sf(scores))
    return {_LAW[0]: bool(checks.holm(pvalues).min() <= settings.level)}


def joint_checks(key, cloud: Cloud, settings: MutationSettings) -> dict[str, bool]:
    """As ``checks.joint_checks``; kernels that are not reversible by the ends of the chains alone."""
    assert cloud.transition is not None
    report = checks.joint_test(
        key,
        cloud.model.prior_sample,
        cloud.model.simulate,
        cloud.transition,
        reverse="same" if cloud.reversible else None,
        log_prior_fn=cloud.model.log_prior,
        log_likelihood_fn=cloud.model.log_likelihood,
        num_simulations=settings.simulations,
        num_draws=settings.num_states,
        level=settings.level,
        mode="vmap",
        batch_size=settings.simulations,
        progress=False,
    )
    reports = {}
    for check in groups_of(cloud)["joint"]:
        part = check.split()[-1]
        raw = [p for name, p in report.ranks.raw_pvalues.items() if name.startswith(part)]
        reports[check] = bool(checks.holm(np.asarray(raw)).min() <= settings.level)
    return reports


_RUN: dict[str, Callable] = {
    "evidence": evidence_checks,
    "law": law_check,
    "ranks": rank_checks,
    "joint": joint_checks,
}
