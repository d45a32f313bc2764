"""The particle filter: weighted paths and an unbiased estimate of the evidence."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probinfer import resampling as schemes
from probinfer.core.arguments import check_key
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, PRNGKey, Scalar
from probinfer.smc.filtering.forward_pass import forward
from probinfer.smc.filtering.genealogy import trace_paths
from probinfer.smc.filtering.traces import FilterTrace
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac, FeynmanKac, as_batched

__all__ = ["Result", "particle_filter"]

_STORES = ("paths", "ancestors", "none")


class Result(NamedTuple):
    r"""A weighted sample of paths, with diagnostics of each step.

    Attributes:
        particles: those of the last step, leaves (N, ...). After a failed step: those before it, unless the model
            has its own ``gather`` or ``record`` (to keep two generations would copy a cache at every step); weights,
            ancestors and paths are those before it in every case.
        log_weights: (N,), unnormalized: the log of their mean is the log evidence up to that step.
        log_evidence: :math:`\log\hat Z`, where :math:`E\hat Z = Z`; minus infinity when all particles died, NaN when
            a weight was NaN or plus infinity.
        ess: (T,) effective sample sizes of the weights after each step; 0 from a failed step on.
        ancestors: (T, N), row t the parents, at step t - 1, of the particles of step t; row 0 is 0 ... N-1. Or None.
        paths: records of the surviving paths, leaves (N, T, ...), or None. Steps that did not run are zero.
        status: ``OK``, ``DEGENERATE_WEIGHTS`` (every particle died) or ``NON_FINITE``.
        stopped_at: the step that failed, -1 if none did.
        num_steps: how many steps ran; fewer than T if all particles were done, or if a step failed in a model that
            changes particles in place.
        resampled: (T,) whether the particles of step t come from a resampling of step t - 1.
        log_evidences: (T,) log evidence after each step.
    """

    particles: ArrayTree
    log_weights: Float[Array, " N"]
    log_evidence: Scalar
    ess: Float[Array, " T"]
    ancestors: Int[Array, "T N"] | None
    paths: ArrayTree | None
    status: Int[Array, ""]
    stopped_at: Int[Array, ""]
    num_steps: Int[Array, ""]
    resampled: Bool[Array, " T"]
    log_evidences: Float[Array, " T"]


def particle_filter(
    key: PRNGKey,
    fk: FeynmanKac | BatchedFeynmanKac,
    num_steps: int,
    num_particles: int,
    *,
    resampling: Any = "systematic",
    ess_threshold: Any = 0.5,
    store: str = "paths",
) -> Result:
    r"""Estimate :math:`Z=\int\gamma_{T-1}` without bias and sample :math:`\gamma_{T-1}/Z` by N weighted paths.

    Each step resamples when the trigger asks for it, propagates the particles and weighs them. Jits and vmaps (over
    keys, data, parameters); the same functions with new data of the same shape trace nothing. Memory beside the
    particles: with ``store="paths"`` T N records and ancestors, twice while the paths are traced; with
    ``"ancestors"`` T N integers; with ``"none"`` a few numbers per step.

    Args:
        key: random key.
        fk: the model, of one particle or batched.
        num_steps: T, at least 1.
        num_particles: N, at least 1.
        resampling: name of a scheme, a scheme, or ``resampling.adaptive(scheme, trigger)``, which replaces
            ``ess_threshold``.
        ess_threshold: resample when the effective sample size is below this fraction of N.
        store: what to store of the past: "paths", "ancestors" or "none".

    Returns:
        The result, with its status: value failures do not raise.

    Raises:
        TypeError: ``key`` is not a key or ``fk`` not a model; weights are not floating point; a step changes the
            structure, shapes or dtypes of the particles.
        ValueError: a count below 1, an unknown name, log weights that are not (N,).

    References:
        Gordon, Salmond and Smith (1993); Del Moral, Doucet and Jasra (2012), adaptive resampling;
        Chopin and Papaspiliopoulos (2020), algorithm 10.1 and proposition 7.4.1 (unbiased evidence).
    """
    check_key(key)
    check_store(store)
    check_counts(num_steps=num_steps, num_particles=num_particles)
    adaptive = as_adaptive(resampling, ess_threshold)
    return to_result(forward(key, as_batched(fk), adaptive, None, num_steps, num_particles, store))


def to_result(filter_trace: FilterTrace) -> Result:
    """Return the result of a pass, with the surviving paths if their records were stored."""
    paths = None
    if filter_trace.records is not None:
        ancestors: Any = filter_trace.ancestors
        paths = _all_paths(ancestors, filter_trace.records, ancestors[0])  # row 0 is 0 ... N-1
    fields = {name: getattr(filter_trace, name) for name in Result._fields if name != "paths"}
    return Result(paths=paths, **fields)


@jax.jit
def _all_paths(ancestors: Array, records: tuple, index: Array) -> ArrayTree:
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), trace_paths(ancestors, records, index))


def as_adaptive(resampling: Any, ess_threshold: Any) -> Any:
    """Return ``resampling`` itself if it is adaptive, otherwise that scheme below an effective sample size."""
    if isinstance(resampling, schemes.Adaptive):
        return resampling
    return schemes.adaptive(resampling, schemes.ess_below(ess_threshold))


def check_store(store: str) -> None:
    """Check the name of what is stored of the past.

    Raises:
        ValueError: it is none of "paths", "ancestors" and "none".
    """
    if store not in _STORES:
        raise ValueError(f"store must be one of {', '.join(map(repr, _STORES))}, got {store!r}")


def check_counts(**counts: Any) -> None:
    """Check that counts are integers of at least 1.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is below 1.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a Python int (it is a shape), got {type(value).__name__}")
        if value < 1:
            raise ValueError(
                f"{name} must be at least 1, got {value}; step 0 draws and weighs the first particles"
            )
