"""The trials of the suite: sample from a subject, or simulate data, and run one check.

Each trial returns an ``Outcome``, ``(report, passed, verdict)``, of its check at the given level.
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
from probinfer.app.pages.run_facts import user_warnings
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
from probinfer.core.types import ArrayTree, PRNGKey, PyTree
from probinfer.inference.posterior import Posterior

__all__ = [
    "Outcome",
    "Sampler",
    "Subject",
    "SubjectDraws",
    "Transition",
    "calibrate",
    "coverage",
    "coverage_of_report",
    "discrepancy",
    "equally_weighted",
    "evidence",
    "importance_bounds",
    "infer_one_by_one",
    "joint",
    "outcome_of",
    "ranks",
    "sample",
]

_NUM_RANK_DRAWS = 100  # draws for the ranks of an engine that is called once for each data set
_NUM_PROJECTIONS = 5

Outcome = tuple[Any, bool | None, str]


class Subject(NamedTuple):
    """An engine to test.

    Attributes:
        name: name in tables.
        sample_fn: ``(key, target)`` -> a posterior whose ``unconstrained`` has leaves (chain, draw, ...).
        limitations: feature of a target (``CORRELATED``, ``NOT_NORMAL``) -> why the engine cannot represent it.
        log_density_fn: ``posterior -> (position -> log q)``, normalized; None if the density is not known. Its
            importance weights then bound the evidence from both sides.
        quick: whether it is fast enough to be called for each data set of a calibration.
        evidence_fn: ``(key, posterior, target, exact draws)`` -> log estimates of the evidence ``(R,)``, whose mean is
            a lower bound, and ``(R',)``, for an upper bound; None if the engine does not estimate the evidence.
        target: the only target that it is tested on, for engines of other kinds of models; None: the common targets.
    """

    name: str
    sample_fn: Callable
    limitations: Mapping[str, str] = {}
    log_density_fn: Callable | None = None
    quick: bool = True
    evidence_fn: Callable | None = None
    target: known_targets.KnownTarget | None = None

    @property
    def bounds_fn(self) -> Callable | None:
        """The function that bounds the evidence: ``evidence_fn``, or importance weights by ``log_density_fn``."""
        if self.evidence_fn is not None or self.log_density_fn is None:
            return self.evidence_fn
        return functools.partial(importance_bounds, self.log_density_fn)


class Sampler(NamedTuple):
    """A sampler for many data sets: ``make(logdensity_fn, init_fn, num_draws=...)`` -> ``infer_fn(key, x)``."""

    name: str
    make: Callable


class Transition(NamedTuple):
    """A Markov transition to test.

    Attributes:
        name: name in tables.
        init_fn: ``(logdensity_fn, position)`` -> state.
        step_fn: ``(logdensity_fn, key, state)`` -> (state, info); reversible and without adaptation.
        position_fn: state -> position.
    """

    name: str
    init_fn: Callable
    step_fn: Callable
    position_fn: Callable


class SubjectDraws(NamedTuple):
    """A posterior, its unconstrained draws with equal weights (chain, draw, ...), and the warnings of the engine."""

    posterior: Posterior
    draws: PyTree
    remark: str


def sample(subject: Subject, key: PRNGKey, target: Any) -> SubjectDraws:
    """Call an engine and record its warnings. The checks need equal weights, so weighted draws are resampled."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = subject.sample_fn(key, target)
    draws = equally_weighted(jax.random.fold_in(key, 1), posterior)
    return SubjectDraws(posterior, draws, "; ".join(user_warnings(caught)))


def equally_weighted(key: PRNGKey, posterior: Posterior) -> ArrayTree:
    """Return the unconstrained draws, leaves (chain, draw, ...), with equal weights: weighted draws are resampled.

    Systematic resampling preserves the order, so copies of a draw are adjacent, and a check that accounts for the
    autocorrelation of chains accounts for the weights too.

    Args:
        key: random key.
        posterior: a posterior with unconstrained draws.
    """
    if posterior.log_weights is None:
        return posterior.unconstrained
    shape = posterior.log_weights.shape
    ancestors, _ = resampling.systematic(key, posterior.flat_log_weights(), shape[0] * shape[1])

    def rows(leaf):
        return leaf.reshape(-1, *leaf.shape[2:])[ancestors].reshape(leaf.shape)

    return jax.tree.map(rows, posterior.unconstrained)


def outcome_of(report: Any) -> Outcome:
    """Return the outcome that a report states."""
    return report, report.passed, report.verdict


def discrepancy(
    name: str, get_draws: Callable, target: known_targets.KnownTarget, exact: Any, key: PRNGKey, level: float
) -> Outcome:
    """Compare draws with the log density (Stein, KSD) or with exact draws (MMD, energy, sliced, C2ST)."""
    values = get_draws().draws
    if values.shape[0] == 1:
        values = values[0]  # a single chain holds independent draws of an approximation
    # Permutations or bootstrap replicates: twice as many as the level needs.
    num_replicates = max(99, math.ceil(2 / level))
    log_density = target.target.logdensity_fn
    if name == "Stein":
        return outcome_of(stein_identity(values, log_density, level=level))
    if name == "KSD":
        return outcome_of(ksd(values, log_density, key=key, num_bootstrap=num_replicates, level=level))
    if name == "C2ST":
        return outcome_of(c2st(key, values, exact, num_permutations=4 * num_replicates, level=level))
    distance = {"MMD": mmd, "energy": energy_distance, "sliced": sliced_wasserstein}[name]
    return outcome_of(distance(values, exact, key=key, num_permutations=num_replicates, level=level))


def importance_bounds(
    log_density_fn: Callable, key: PRNGKey, posterior: Any, target: Any, exact: Any
) -> tuple:
    """Bound the log evidence by log importance weights: from below at draws of q, from above at exact draws."""
    del key
    log_q, log_p = log_density_fn(posterior), target.logdensity_fn
    approximate = posterior.unconstrained.reshape(-1, exact.shape[-1])
    # E_q[log p - log q] <= log Z <= E_p[log p - log q]
    forward, reverse = (
        np.asarray(jax.vmap(lambda u: log_p(u) - log_q(u))(draws)) for draws in (approximate, exact)
    )
    return forward, reverse


def evidence(
    bounds_fn: Callable,
    get_draws: Callable,
    target: known_targets.KnownTarget,
    exact: Any,
    key: PRNGKey,
    level: float,
) -> Outcome:
    """Bound the evidence from both sides; fails if the bounds contradict each other or exclude the exact value."""
    forward, reverse = bounds_fn(key, get_draws().posterior, target.target, exact)
    report = evidence_sandwich(forward, reverse, level=level)
    low, high = report.interval
    rounding = 1e-6 * max(1.0, abs(target.log_evidence))
    passed = not report.contradiction and low - rounding <= target.log_evidence <= high + rounding
    return report, bool(passed), f"{report.verdict}; exact value {target.log_evidence:.4g}"


def _simulate(key: PRNGKey, model: known_targets.SimulationModel, num: int) -> tuple[Any, Any, Any]:
    key_parameters, key_x, key_infer = jax.random.split(key, 3)
    parameters = jax.vmap(model.prior_sample)(jax.random.split(key_parameters, num))
    x = jax.vmap(model.simulate)(jax.random.split(key_x, num), parameters)
    return parameters, x, jax.random.split(key_infer, num)


def infer_one_by_one(
    key: PRNGKey, model: known_targets.SimulationModel, subject: Subject, num: int
) -> tuple[Any, Any, Any]:
    """Return true parameters (S, d), data, and draws (S, L, d) of an engine that is called once for each data set."""
    parameters, x, keys = _simulate(key, model, num)
    assert model.target_fn is not None
    draws = []
    for key_i, x_i in zip(keys, np.asarray(x)):
        values = sample(subject, key_i, model.target_fn(x_i)).draws
        num_chains, length = values.shape[:2]
        num_per_chain = min(length, -(-_NUM_RANK_DRAWS // num_chains))
        thinned = np.linspace(0, length - 1, num_per_chain).astype(int)  # far apart, so nearly independent
        draws.append(np.asarray(values)[:, thinned].reshape(-1, values.shape[-1]))
    return parameters, x, jnp.asarray(np.stack(draws))


def calibrate(
    model: known_targets.SimulationModel, sampler: Sampler, num: int, key: PRNGKey, level: float
) -> Any:
    """Run simulation-based calibration of a sampler."""

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
        num_projections=_NUM_PROJECTIONS,
        level=level,
        progress=False,
    )


def coverage_of_report(get_report: Callable, key: PRNGKey, level: float) -> Outcome:
    """Test the draws of ``calibrate`` by TARP."""
    report = get_report(level)
    return outcome_of(tarp(key, report.posteriors.draws, report.theta, report.x, level=level))


def ranks(
    model: known_targets.SimulationModel, get_simulated: Callable, key: PRNGKey, level: float
) -> Outcome:
    """Test draws of an engine by the ranks of parameters, densities and projections."""
    parameters, x, draws = get_simulated()
    table = rank_table(
        key,
        draws,
        parameters,
        x,
        log_prior_fn=model.log_prior_fn,
        log_likelihood_fn=model.log_likelihood_fn,
        num_projections=_NUM_PROJECTIONS,
    )
    return outcome_of(uniformity(table, level=level))


def coverage(
    model: known_targets.SimulationModel, get_simulated: Callable, key: PRNGKey, level: float
) -> Outcome:
    """Test draws of an engine by TARP."""
    del model
    parameters, x, draws = get_simulated()
    return outcome_of(tarp(key, draws, parameters, x, level=level))


def joint(
    transition: Transition, model: known_targets.SimulationModel, num_lanes: int, key: PRNGKey, level: float
) -> Outcome:
    """Run the joint test of a transition on a model."""

    def init(parameters, x):
        return transition.init_fn(LogDensity(_log_joint, model, x), parameters)

    def step(key, state, x):
        return transition.step_fn(LogDensity(_log_joint, model, x), key, state)

    report = joint_test(
        key,
        model.prior_sample,
        model.simulate,
        step,
        init_fn=init,
        position_fn=transition.position_fn,
        log_prior_fn=model.log_prior_fn,
        log_likelihood_fn=model.log_likelihood_fn,
        num_simulations=num_lanes,
        num_draws=15,
        level=level,
        mode="vmap",
        progress=False,
    )
    return outcome_of(report)


def _log_joint(model: known_targets.SimulationModel, x: Any, parameters: Any):
    return model.log_joint(parameters, x)
