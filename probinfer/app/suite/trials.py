"""What the suite does with a subject: draw, simulate, and hand over to one check.

Every trial returns ``(report, passed, verdict)`` of its check at the level it is given.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer import resampling
from probinfer.app.suite import known_targets
from probinfer.checks.calibration.coverage import tarp
from probinfer.checks.calibration.rank_uniformity import uniformity
from probinfer.checks.calibration.ranks import rank_table
from probinfer.checks.calibration.simulation_based import sbc
from probinfer.checks.discrepancy.classifier import c2st
from probinfer.checks.discrepancy.energy import energy_distance
from probinfer.checks.discrepancy.kernel_stein import ksd
from probinfer.checks.discrepancy.mean_discrepancy import mmd
from probinfer.checks.discrepancy.sliced import sliced_wasserstein
from probinfer.checks.discrepancy.stein_identities import stein_identity
from probinfer.checks.evidence import evidence_sandwich
from probinfer.checks.invariance import joint_test
from probinfer.core.binding import LogDensity
from probinfer.core.types import ArrayTree, PRNGKey
from probinfer.inference.posterior import Posterior

__all__ = [
    "Drawn",
    "Judged",
    "Kernel",
    "Sampler",
    "Subject",
    "calibrated",
    "coverage",
    "coverage_of",
    "discrepancy",
    "equally_weighted",
    "evidence",
    "importance_bounds",
    "infer_one_by_one",
    "joint",
    "judged",
    "ranks",
    "sample",
]

_DRAWS_OF_LOOPS = 100  # ranked against, where an engine is called data set by data set
_PROJECTIONS = 5

Judged = tuple[Any, bool | None, str]


class Subject(NamedTuple):
    """An engine.

    Attributes:
        name: in tables.
        sample_fn: ``(key, target)`` -> a posterior whose ``unconstrained`` has leaves (chain, draw, ...).
        cannot: feature of a target (``known.CORRELATED``, ``known.NOT_NORMAL``) -> why the engine must miss it.
        log_density_fn: ``posterior -> (position -> log q)``, normalised, for approximations that have one: then the
            evidence is bounded by its importance weights from both sides.
        evidence_fn: ``(key, posterior, target, exact draws)`` -> log estimates of the evidence (R,) whose mean bounds
            it from below, and (R',) from above, for engines that estimate it.
        quick: cheap enough to be called for every data set of a calibration.
        target: the one target that it is judged on, for engines of another kind of model; None: the common targets.
    """

    name: str
    sample_fn: Callable
    cannot: Mapping[str, str] = {}
    log_density_fn: Callable | None = None
    quick: bool = True
    evidence_fn: Callable | None = None
    target: known_targets.Known | None = None

    @property
    def bounds_fn(self) -> Callable | None:
        """What bounds the evidence: its own ``evidence_fn``, or importance weights by ``log_density_fn``."""
        if self.evidence_fn is not None or self.log_density_fn is None:
            return self.evidence_fn
        return functools.partial(importance_bounds, self.log_density_fn)


class Sampler(NamedTuple):
    """A procedure for many data sets: ``make(logdensity_fn, init_fn, num_draws=...)`` -> ``infer_fn(key, x)``."""

    name: str
    make: Callable


class Kernel(NamedTuple):
    """A Markov kernel with a state of its own.

    Attributes:
        name: in tables.
        init_fn: ``(logdensity_fn, position)`` -> state.
        step_fn: ``(logdensity_fn, key, state)`` -> (state, info); it does not adapt and is reversible.
        position_fn: state -> position.
    """

    name: str
    init_fn: Callable
    step_fn: Callable
    position_fn: Callable


class Drawn(NamedTuple):
    """A posterior, its unconstrained draws with equal weights, and what the engine warned of."""

    posterior: Any
    draws: Any
    remark: str


def sample(subject: Subject, key: PRNGKey, target: Any) -> Drawn:
    """Call an engine; keep its warnings. Every check takes equal weights, so weighted draws are resampled here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = subject.sample_fn(key, target)
    texts = [str(item.message) for item in caught if issubclass(item.category, UserWarning)]
    draws = equally_weighted(jax.random.fold_in(key, 1), posterior)
    return Drawn(posterior, draws, "; ".join(dict.fromkeys(texts)))


def equally_weighted(key: PRNGKey, posterior: Posterior) -> ArrayTree:
    """The unconstrained draws, leaves (chain, draw, ...), with equal weights: as they are, or resampled by theirs.

    Systematic resampling keeps the order. So copies of a draw stand beside one another, and a check that allows for
    the autocorrelation of chains sees what the weights cost.

    Args:
        key: random key.
        posterior: with unconstrained draws.
    """
    if posterior.log_weights is None:
        return posterior.unconstrained
    shape = posterior.log_weights.shape
    ancestors, _ = resampling.systematic(key, posterior.flat_log_weights(), shape[0] * shape[1])

    def rows(leaf):
        return leaf.reshape(-1, *leaf.shape[2:])[ancestors].reshape(leaf.shape)

    return jax.tree.map(rows, posterior.unconstrained)


def judged(report: Any) -> Judged:
    """What a report says of itself."""
    return report, report.passed, report.verdict


def discrepancy(
    name: str, drawn: Callable, target: known_targets.Known, exact: Any, key: PRNGKey, level: float
) -> Judged:
    """Compare draws with the log density (Stein, KSD) or with exact draws (MMD, energy, sliced, C2ST)."""
    values = drawn().draws
    if values.shape[0] == 1:
        values = values[0]  # one chain is an approximation's independent draws
    num = max(99, math.ceil(2 / level))  # relabellings: twice as many as the level needs
    log_density = target.target.logdensity_fn
    if name == "Stein":
        return judged(stein_identity(values, log_density, level=level))
    if name == "KSD":
        return judged(ksd(values, log_density, key=key, num_bootstrap=num, level=level))
    if name == "C2ST":
        return judged(c2st(key, values, exact, num_permutations=4 * num, level=level))
    distance = {"MMD": mmd, "energy": energy_distance, "sliced": sliced_wasserstein}[name]
    return judged(distance(values, exact, key=key, num_permutations=num, level=level))


def importance_bounds(
    log_density_fn: Callable, key: PRNGKey, posterior: Any, target: Any, exact: Any
) -> tuple:
    """Log importance weights at draws of the approximation bound the evidence from below, at exact ones from above."""
    del key
    log_q, log_p = log_density_fn(posterior), target.logdensity_fn
    own = posterior.unconstrained.reshape(-1, exact.shape[-1])
    forward, reverse = (np.asarray(jax.vmap(lambda u: log_p(u) - log_q(u))(draws)) for draws in (own, exact))
    return forward, reverse


def evidence(
    bounds_fn: Callable, drawn: Callable, target: known_targets.Known, exact: Any, key: PRNGKey, level: float
) -> Judged:
    """Bound the evidence from both sides; wrong if the bounds contradict each other or leave the exact value out."""
    forward, reverse = bounds_fn(key, drawn().posterior, target.target, exact)
    report = evidence_sandwich(forward, reverse, level=level)
    low, high = report.interval
    rounding = 1e-6 * max(1.0, abs(target.log_evidence))
    right = not report.contradiction and low - rounding <= target.log_evidence <= high + rounding
    return report, bool(right), f"{report.verdict}; exactly {target.log_evidence:.4g}"


def _simulate(key: PRNGKey, model: known_targets.Model, num: int) -> tuple[Any, Any, Any]:
    key_theta, key_x, key_infer = jax.random.split(key, 3)
    theta = jax.vmap(model.prior_sample)(jax.random.split(key_theta, num))
    x = jax.vmap(model.simulate)(jax.random.split(key_x, num), theta)
    return theta, x, jax.random.split(key_infer, num)


def infer_one_by_one(
    key: PRNGKey, model: known_targets.Model, subject: Subject, num: int
) -> tuple[Any, Any, Any]:
    """True values (S, d), data, and draws (S, L, d) of an engine that is called data set by data set."""
    theta, x, keys = _simulate(key, model, num)
    assert model.target_fn is not None
    draws = []
    for one, one_x in zip(keys, np.asarray(x)):
        values = sample(subject, one, model.target_fn(one_x)).draws
        chains, length = values.shape[:2]
        each = min(length, -(-_DRAWS_OF_LOOPS // chains))
        picked = np.linspace(0, length - 1, each).astype(int)  # far apart: nearly independent
        draws.append(np.asarray(values)[:, picked].reshape(-1, values.shape[-1]))
    return theta, x, jnp.asarray(np.stack(draws))


def calibrated(model: known_targets.Model, sampler: Sampler, num: int, key: PRNGKey, level: float) -> Any:
    """Simulation-based calibration of a sampler."""

    def init(key, x):
        del x
        return model.prior_sample(key)

    return sbc(
        key,
        model.prior_sample,
        model.simulate,
        sampler.make(model.log_joint, init),
        log_prior_fn=model.log_prior_fn,
        log_likelihood_fn=model.log_likelihood_fn,
        num_simulations=num,
        num_projections=_PROJECTIONS,
        level=level,
        progress=False,
    )


def coverage_of(report: Callable, key: PRNGKey, level: float) -> Judged:
    """Judge the draws of ``calibrated`` by TARP."""
    found = report(level)
    return judged(tarp(key, found.posteriors.draws, found.theta, found.x, level=level))


def ranks(model: known_targets.Model, simulated: Callable, key: PRNGKey, level: float) -> Judged:
    """Judge draws of an engine by the ranks of parameters, densities and projections."""
    theta, x, draws = simulated()
    table = rank_table(
        key,
        draws,
        theta,
        x,
        log_prior_fn=model.log_prior_fn,
        log_likelihood_fn=model.log_likelihood_fn,
        num_projections=_PROJECTIONS,
    )
    return judged(uniformity(table, level=level))


def coverage(model: known_targets.Model, simulated: Callable, key: PRNGKey, level: float) -> Judged:
    """Judge draws of an engine by TARP."""
    del model
    theta, x, draws = simulated()
    return judged(tarp(key, draws, theta, x, level=level))


def joint(kernel: Kernel, model: known_targets.Model, lanes: int, key: PRNGKey, level: float) -> Judged:
    """Joint test of a kernel on a model."""

    def init(theta, x):
        return kernel.init_fn(LogDensity(_swapped, model, x), theta)

    def step(key, state, x):
        return kernel.step_fn(LogDensity(_swapped, model, x), key, state)

    report = joint_test(
        key,
        model.prior_sample,
        model.simulate,
        step,
        init_fn=init,
        position_fn=kernel.position_fn,
        log_prior_fn=model.log_prior_fn,
        log_likelihood_fn=model.log_likelihood_fn,
        num_simulations=lanes,
        num_draws=15,
        level=level,
        mode="vmap",
        progress=False,
    )
    return judged(report)


def _swapped(model: known_targets.Model, x: Any, theta: Any):
    return model.log_joint(theta, x)
