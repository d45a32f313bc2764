"""Particle Gibbs: a Markov chain of paths, each drawn by a filter conditioned on the previous path."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer import resampling as schemes
from probinfer.core.arguments import check_key
from probinfer.core.status import Status
from probinfer.core.trees import select
from probinfer.core.types import Array, ArrayTree, Float, Int, PRNGKey
from probinfer.smc.conditional.filter import check_reference, check_suffix
from probinfer.smc.filtering.filter import as_adaptive, check_counts
from probinfer.smc.filtering.forward_pass import forward
from probinfer.smc.filtering.genealogy import draw_path_backward, trace_paths
from probinfer.smc.filtering.traces import FilterTrace
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac, FeynmanKac, as_batched

__all__ = ["GibbsResult", "choose_path", "gibbs_step", "particle_gibbs"]


class GibbsResult(NamedTuple):
    """Paths in the order of the chain, with diagnostics.

    Attributes:
        paths: leaves (iterations, T, ...); pass the last one as the reference to continue the chain.
        log_evidence: (iterations,) estimates of the conditional filters. At stationarity E[1 / Zhat] = 1 / Z.
        ess: (iterations, T) effective sample sizes.
        update_rate: (T,) share of the iterations in which step t of the path changed. If it is near 0 at early steps,
            the paths degenerate: use ancestor or backward sampling, or more particles.
        status: the worst of all passes. A pass that fails leaves the path as it was. If the filter that draws the
            first reference fails, the paths are not draws from the target.
    """

    paths: ArrayTree
    log_evidence: Float[Array, " iterations"]
    ess: Float[Array, "iterations T"]
    update_rate: Float[Array, " T"]
    status: Int[Array, ""]


def particle_gibbs(
    key: PRNGKey,
    fk: FeynmanKac | BatchedFeynmanKac,
    num_steps: int,
    num_particles: int,
    num_iterations: int,
    *,
    reference: ArrayTree = None,
    ancestor_sampling: bool = True,
    backward_sampling: bool = False,
    resampling: Any = None,
    ess_threshold: Any = 0.5,
) -> GibbsResult:
    r"""Sample paths from :math:`\gamma_{T-1}/Z` exactly: a chain that leaves it invariant for every N >= 2.

    Each iteration runs a filter conditioned on the current path and draws the next path by the final weights. Jits and
    vmaps.

    Args:
        key: random key.
        fk: the model, of one particle or batched.
        num_steps: T.
        num_particles: N, the reference included; at least 2.
        num_iterations: length of the chain.
        reference: the path to start from, leaves (T, ...); None: drawn by a particle filter.
        ancestor_sampling: draw at every step which particle the rest of the reference continues; requires
            ``log_transition`` (``log_suffix``). Without it early steps hardly ever change when T is large.
        backward_sampling: draw the path backwards after each pass instead. The particles must be their own records
            and the scheme multinomial. Stores T N particles.
        resampling: name of a scheme that has a conditional form, or ``resampling.adaptive(scheme, trigger)``.
            None: systematic; multinomial for backward sampling.
        ess_threshold: resample when the effective sample size is below this fraction of N.

    Returns:
        The paths, with a status.

    Raises:
        TypeError: as ``particle_filter``.
        ValueError: as ``particle_filter``; fewer than 2 particles; a reference without the shape of a path; a scheme
            without a conditional form; ancestor or backward sampling that the model does not allow.

    References:
        Andrieu, Doucet and Holenstein (2010); Whiteley (2010), backward sampling; Lindsten, Jordan and Schön (2014),
        ancestor sampling.
    """
    check_key(key)
    check_counts(num_steps=num_steps, num_particles=num_particles, num_iterations=num_iterations)
    if num_particles < 2:
        raise ValueError("particle Gibbs needs num_particles >= 2: with one the reference never changes")
    model = as_batched(fk)
    check_suffix(model, ancestor_sampling or backward_sampling)
    adaptive = as_adaptive(
        resampling or ("multinomial" if backward_sampling else "systematic"), ess_threshold
    )
    if backward_sampling:
        _check_backward(model, adaptive)
    if reference is not None:
        reference = check_reference(model, reference, num_steps)
    path_update = "backward" if backward_sampling else "ancestor" if ancestor_sampling else "genealogy"
    return _run(key, model, adaptive, reference, num_steps, num_particles, num_iterations, path_update)


def _check_backward(model: BatchedFeynmanKac, adaptive: Any) -> None:
    if not model.copies_freely:
        raise ValueError(
            "backward sampling reads the particles of every step, and this model does not keep them (it has its own "
            "record or gather): use ancestor_sampling=True"
        )
    if schemes.conditional(adaptive.scheme) is not schemes.CONDITIONAL["multinomial"]:
        raise ValueError(
            f"backward sampling redraws one ancestor given the others, which leaves the target invariant only if "
            f"they are independent: use resampling='multinomial', or ancestor sampling with {adaptive.scheme!r}"
        )


@partial(jax.jit, static_argnames=("num_steps", "num_particles", "num_iterations", "path_update"))
def _run(
    key: Array,
    model: BatchedFeynmanKac,
    adaptive: Any,
    reference: ArrayTree,
    num_steps: int,
    num_particles: int,
    num_iterations: int,
    path_update: str,
) -> GibbsResult:
    key_start, key_chain = jax.random.split(key)
    status = jnp.int32(int(Status.OK))
    if reference is None:
        key_filter, key_draw = jax.random.split(key_start)
        filter_trace = forward(key_filter, model, adaptive, None, num_steps, num_particles, "paths")
        reference, status = choose_path(key_draw, filter_trace), filter_trace.status
    conditional = adaptive.conditional()

    def iterate(path: ArrayTree, key: Array) -> tuple[ArrayTree, tuple]:
        new_path, filter_trace = gibbs_step(key, model, conditional, path, num_particles, path_update)
        changed = _changed(path, new_path)
        row = new_path, filter_trace.log_evidence, filter_trace.ess, changed, filter_trace.status
        return new_path, row

    _, rows = lax.scan(iterate, reference, jax.random.split(key_chain, num_iterations))
    paths, log_evidence, ess, changed, statuses = rows
    return GibbsResult(
        paths=paths,
        log_evidence=log_evidence,
        ess=ess,
        update_rate=jnp.mean(changed, axis=0, dtype=log_evidence.dtype),
        status=jnp.maximum(status, jnp.max(statuses)),
    )


def gibbs_step(
    key: Array,
    model: BatchedFeynmanKac,
    conditional: Any,
    path: ArrayTree,
    num_particles: int,
    path_update: str,
) -> tuple[ArrayTree, FilterTrace]:
    """Return the next path and the pass that it was drawn from; after a failed pass the path stays as it was.

    Args:
        key: random key.
        model: the batched model.
        conditional: ``resampling.Adaptive`` with a conditional scheme.
        path: the reference, leaves (T, ...).
        num_particles: N.
        path_update: how the early steps of the path change: "genealogy", "ancestor" or "backward".
    """
    key_filter, key_draw = jax.random.split(key)
    num_steps = jax.tree.leaves(path)[0].shape[0]
    ancestor_sampling, backward_sampling = path_update == "ancestor", path_update == "backward"
    store = "history" if backward_sampling else "paths"
    filter_trace = forward(
        key_filter, model, conditional, path, num_steps, num_particles, store, ancestor_sampling
    )
    new_path = choose_path(key_draw, filter_trace, model.log_suffix if backward_sampling else None)
    failed = filter_trace.status != int(Status.OK)
    return select(failed, path, new_path), filter_trace


def choose_path(key: Array, filter_trace: FilterTrace, log_suffix: Any = None) -> ArrayTree:
    """Draw one path of a pass by the final weights, from its ancestors or, with ``log_suffix``, backwards.

    Args:
        key: random key.
        filter_trace: a pass that stored its paths, or its history.
        log_suffix: that of the model, for backward sampling.
    """
    key_last, key_back = jax.random.split(key)
    index = jax.random.categorical(key_last, filter_trace.log_weights).astype(jnp.int32)
    if log_suffix is not None:
        return draw_path_backward(key_back, filter_trace, index, log_suffix)
    ancestors: Any = filter_trace.ancestors
    records: Any = filter_trace.records
    return jax.tree.map(lambda leaf: leaf[:, 0], trace_paths(ancestors, records, index[None]))


def _changed(path: ArrayTree, new_path: ArrayTree) -> Array:
    """Return for each step whether any of its records differs, (T,)."""

    def differs(a: Array, b: Array) -> Array:
        return jnp.any((a != b).reshape(a.shape[0], -1), axis=1)

    return jax.tree.reduce(jnp.logical_or, jax.tree.map(differs, path, new_path))
