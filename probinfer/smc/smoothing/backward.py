r"""Smoothing: paths of the states given all observations, drawn backwards through a filter.

The genealogy of a filter says little about early steps: there, all surviving paths share a few ancestors. Drawn
backwards, by :math:`P(b_{t-1}=i\mid b_t)\propto w_{t-1}^i M_t(x_{t-1}^i,x_t^{b_t})G_t(x_{t-1}^i,x_t^{b_t})`, a path may
pass through every particle of every step. Whatever the resampling scheme,
:math:`E[\hat Z\,\frac1M\sum_m h(x^m_{0:T-1})]=Z\,E[h]`.

One draw from all N particles costs N transition densities. With more than ``EXACT`` particles each path chooses
instead among its ancestor in the genealogy and ``CANDIDATES`` particles drawn by weight, in proportion to the
transition density: a Markov transition that leaves the same distribution invariant, at a cost that does not grow with
N. The ancestor already has that distribution, so that no chain has to converge.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.arguments import check_key
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Float, Int, PRNGKey, Scalar
from probinfer.numerics import weights
from probinfer.resampling import systematic
from probinfer.smc.conditional.filter import check_suffix
from probinfer.smc.filtering.filter import as_adaptive, check_counts
from probinfer.smc.filtering.forward_pass import forward
from probinfer.smc.filtering.genealogy import all_records
from probinfer.smc.filtering.traces import FilterTrace
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac, FeynmanKac, as_batched, take

__all__ = ["SmootherResult", "backward_smoother", "check_smoothable"]

EXACT = 256  # largest N at which every path chooses among all particles
CANDIDATES = 32
_CHUNK = 2**17  # entries of the table of paths by particles that are in memory at once


class SmootherResult(NamedTuple):
    r"""Paths of equal weight from the distribution of the states given all data.

    Attributes:
        paths: leaves (M, T, ...).
        log_evidence: of the filter, unbiased as in ``particle_filter``.
        ess: (T,) effective sample sizes of the filter.
        update_rate: (T,) share of the paths whose particle at step t is not the ancestor, in the genealogy, of the
            one at t + 1; 0 at T-1. Near 0 the transition density determines the step, and smoothing adds nothing to
            the paths of the filter.
        status: that of the filter; if it is ``OK``, that of the backward pass: ``DEGENERATE_WEIGHTS`` if no particle
            can precede a state (``log_transition`` is not the density of ``propagate``), ``NON_FINITE`` if a density
            is not finite. The paths are draws only if it is ``OK``.
        stopped_at: the step at which the filter failed, -1 if it did not.
    """

    paths: ArrayTree
    log_evidence: Scalar
    ess: Float[Array, " T"]
    update_rate: Float[Array, " T"]
    status: Int[Array, ""]
    stopped_at: Int[Array, ""]


def backward_smoother(
    key: PRNGKey,
    fk: FeynmanKac | BatchedFeynmanKac,
    num_steps: int,
    num_particles: int,
    *,
    num_paths: int | None = None,
    resampling: Any = "systematic",
    ess_threshold: Any = 0.5,
) -> SmootherResult:
    r"""Draw M paths from :math:`\gamma_{T-1}/Z` by a forward filter and backward simulation.

    Jits and vmaps; new data of the same shape trace nothing. Time: T M min(N, candidates) transition densities, see
    the module; memory: O(N T + M T), and a table of paths by particles in chunks.

    Args:
        key: random key.
        fk: the model, with its ``log_transition`` (``log_suffix``); its particles are their own records.
        num_steps: T, at least 1.
        num_particles: N, of the filter.
        num_paths: M; None: N.
        resampling: as for ``particle_filter``.
        ess_threshold: as for ``particle_filter``.

    Returns:
        The paths, with a status: value failures do not raise.

    Raises:
        TypeError: as ``particle_filter``.
        ValueError: as ``particle_filter``; no ``log_transition``; a model with its own ``gather``, ``record`` or
            ``done``.

    References:
        Godsill, Doucet and West (2004), algorithm 1; Douc, Garivier, Moulines and Olsson (2011); Dau and Chopin
        (2023), "On backward smoothing algorithms", section 4 (Markov kernels started at the genealogy); Andrieu, Lee
        and Vihola (2018), the kernel among several candidates.
    """
    num_paths = num_particles if num_paths is None else num_paths
    check_key(key)
    check_counts(num_steps=num_steps, num_particles=num_particles, num_paths=num_paths)
    model = as_batched(fk)
    check_smoothable(model)
    adaptive = as_adaptive(resampling, ess_threshold)
    return _run(key, model, adaptive, num_steps, num_particles, num_paths, num_particles <= EXACT)


def check_smoothable(model: BatchedFeynmanKac) -> None:
    """Check that the particles of all steps of a model can be read.

    Raises:
        ValueError: it has no ``log_suffix``, or a ``gather``, ``record`` or ``done`` of its own.
    """
    check_suffix(model, True)
    if not model.copies_freely or model.done is not None:
        raise ValueError(
            "smoothing reads the particles of every step: a model with its own record or gather does not keep them, "
            "and one with done stops early; use smc.particle_gibbs with ancestor_sampling=True"
        )


@partial(jax.jit, static_argnames=("num_steps", "num_particles", "num_paths", "exact"))
def _run(
    key: Array,
    model: BatchedFeynmanKac,
    adaptive: Any,
    num_steps: int,
    num_particles: int,
    num_paths: int,
    exact: bool,
) -> SmootherResult:
    key_filter, key_last, key_back = jax.random.split(key, 3)
    filter_trace = forward(key_filter, model, adaptive, None, num_steps, num_particles, "history")
    last, _ = systematic(key_last, filter_trace.log_weights, num_paths)
    choose_parent = _choose_among_all if exact else _choose_among_candidates
    draw_path = partial(_draw_path, choose_parent, all_records(filter_trace), filter_trace, model.log_suffix)
    num_choices = num_particles if exact else CANDIDATES
    keys = jax.random.split(key_back, num_paths)
    paths, left_genealogy, statuses = _map_in_chunks(draw_path, last, keys, num_choices)
    filter_status = filter_trace.status
    return SmootherResult(
        paths=paths,
        log_evidence=filter_trace.log_evidence,
        ess=filter_trace.ess,
        update_rate=jnp.mean(left_genealogy, axis=0, dtype=filter_trace.ess.dtype),
        status=jnp.where(filter_status == int(Status.OK), jnp.max(statuses), filter_status),
        stopped_at=filter_trace.stopped_at,
    )


def _map_in_chunks(draw_path: Any, last: Array, keys: Array, num_choices: int) -> tuple:
    """Draw as many paths at once as the size of the table of paths by particles allows."""
    chunk = max(1, _CHUNK // num_choices)
    if chunk >= last.shape[0]:
        return jax.vmap(draw_path)(last, keys)
    return lax.map(lambda row: draw_path(*row), (last, keys), batch_size=chunk)


def _draw_path(
    choose_parent: Any,
    records: ArrayTree,
    filter_trace: FilterTrace,
    log_suffix: Any,
    index: Array,
    key: Array,
) -> tuple:
    """Return a path that ends in a particle, whether each step left the genealogy, and the worst status."""
    past_log_weights: Any = filter_trace.past_log_weights
    ancestors: Any = filter_trace.ancestors
    num_steps = past_log_weights.shape[0]
    path = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:, 0]).at[-1].set(leaf[-1, index]), records)

    def step_back(carry: tuple, row: tuple) -> tuple[tuple, Array]:
        index, path, status = carry
        t, key = row
        particles = jax.tree.map(lambda leaf: leaf[t - 1], records)
        log_weights, parent = past_log_weights[t - 1], ancestors[t, index]
        index, step_status = choose_parent(
            key, particles, log_weights, parent, lambda chosen: log_suffix(chosen, path, t)
        )
        path = jax.tree.map(lambda leaf, values: leaf.at[t - 1].set(values[index]), path, particles)
        return (index, path, jnp.maximum(status, step_status)), index != parent

    times, keys = jnp.arange(1, num_steps, dtype=jnp.int32), jax.random.split(key, num_steps)[1:]
    last = (index, path, jnp.int32(int(Status.OK)))
    (_, path, status), left_genealogy = lax.scan(step_back, last, (times, keys), reverse=True)
    return path, jnp.concatenate([left_genealogy, jnp.zeros(1, bool)]), status


def _choose_among_all(
    key: Array, particles: ArrayTree, log_weights: Array, parent: Array, log_suffix: Any
) -> tuple:
    """Choose one of all particles, in proportion to weight times density."""
    log_total = log_weights + log_suffix(particles)
    # the density of a dead particle may be NaN
    log_total = jnp.where(log_weights == -jnp.inf, -jnp.inf, log_total)
    scaled, _ = weights.relative_weights(log_total)
    index = _invert_cdf(jax.random.uniform(key, (), scaled.dtype), scaled).astype(parent.dtype)
    return index, weights.status(log_total)


def _choose_among_candidates(
    key: Array, particles: ArrayTree, log_weights: Array, parent: Array, log_suffix: Any
) -> tuple:
    """Choose the parent or one of a few candidates drawn by weight, in proportion to the density."""
    key_candidates, key_choose = jax.random.split(key)
    scaled, _ = weights.relative_weights(log_weights)
    uniforms = jax.random.uniform(key_candidates, (CANDIDATES,), scaled.dtype)
    candidates = jnp.concatenate([parent[None], _invert_cdf(uniforms, scaled).astype(parent.dtype)])
    log_density = log_suffix(take(particles, candidates))
    densities, _ = weights.relative_weights(log_density)
    chosen = _invert_cdf(jax.random.uniform(key_choose, (), densities.dtype), densities)
    return candidates[chosen], weights.status(log_density)


def _invert_cdf(uniforms: Array, scaled: Array) -> Array:
    """Return the indices where the cumulative weight exceeds fractions of its total; never one of weight zero."""
    cumulative = lax.cummax(jnp.cumsum(scaled))
    index = jnp.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
    index = jnp.minimum(index, scaled.shape[0] - 1)
    # a weight of zero may have positive length in a rounded cumulative sum
    return jnp.where(scaled[index] > 0, index, jnp.argmax(scaled))
