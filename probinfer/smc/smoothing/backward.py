r"""Smoothing: paths of the states given all observations, drawn backwards through a filter.

The genealogy of a filter says little about early steps: all surviving paths share a few ancestors there. Drawn
backwards, :math:`P(b_{t-1}=i\mid b_t)\propto w_{t-1}^i M_t(x_{t-1}^i,x_t^{b_t})G_t(x_{t-1}^i,x_t^{b_t})`, a path may
pass through every particle of every step. Whatever the resampling scheme,
:math:`E[\hat Z\,\frac1M\sum_m h(x^m_{0:T-1})]=Z\,E[h]`.

One draw from all N particles costs N transition densities. With more than ``EXACT`` particles each path chooses
instead among its ancestor in the genealogy and ``CANDIDATES`` particles drawn by weight, in proportion to the
transition density: a Markov step that leaves the same law invariant, at a cost that does not grow with N. The ancestor
already has that law, so no chain has to converge.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.errors import check_key
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, PRNGKey
from probinfer.numerics import weights
from probinfer.resampling import systematic
from probinfer.smc.conditional.filter import check_suffix
from probinfer.smc.filtering.filter import as_adaptive, check_counts
from probinfer.smc.filtering.forward_pass import Sweep, forward
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac, FeynmanKac, as_batched, take

__all__ = ["SmootherResult", "all_records", "backward_smoother", "check_smoothable"]

EXACT = 256  # N up to which every path looks at every particle
CANDIDATES = 32
_CHUNK = 2**17  # numbers in the table of paths and particles that is held at once


class SmootherResult(NamedTuple):
    r"""Paths of equal weight from the law of the states given all data.

    Attributes:
        paths: leaves (M, T, ...).
        log_evidence: of the filter, unbiased as in ``particle_filter``.
        ess: (T,) effective sample sizes of the filter.
        update_rate: (T,) share of the paths whose particle at step t is not the ancestor that the genealogy gives to
            the one at t + 1; 0 at T-1. Near 0: a step that the transition density pins down, where smoothing adds
            nothing to the paths of the filter.
        status: that of the filter; else of the backward pass: ``DEGENERATE_WEIGHTS`` where no particle can precede a
            state (``log_transition`` is not the density of ``propagate``), ``NON_FINITE`` where a density is. The
            paths are draws only where it is ``OK``.
        stopped_at: the step at which the filter failed, -1 if it did not.
    """

    paths: ArrayTree
    log_evidence: Array
    ess: Array
    update_rate: Array
    status: Array
    stopped_at: Array


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
    r"""Draw M paths from :math:`\gamma_{T-1}/Z` by a filter forwards and simulation backwards.

    Jits and vmaps; new data of the same shape trace nothing. Time T M min(N, candidates) transition densities, see the
    module; memory O(N T + M T), and a table of paths by particles in chunks.

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
        ValueError: as ``particle_filter``; no ``log_transition``; a model that stores particles in its own way or can
            be done early.

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
    """Refuse a model whose past cannot be read.

    Raises:
        ValueError: it has no ``log_suffix``, keeps particles in its own way, or can be done early.
    """
    check_suffix(model, True)
    if not model.copies_freely or model.done is not None:
        raise ValueError(
            "smoothing reads the particles of every step: a model with a record or gather of its own keeps less of "
            "them, and one with done stops early; use smc.particle_gibbs with ancestor_sampling=True"
        )


def all_records(sweep: Sweep) -> ArrayTree:
    """Return the records of all steps of a pass that kept them, leaves (T, N, ...)."""
    first, later = sweep.records
    return jax.tree.map(lambda head, tail: jnp.concatenate([head[None], tail]), first, later)


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
    sweep = forward(key_filter, model, adaptive, None, num_steps, num_particles, "history")
    last, _ = systematic(key_last, sweep.log_weights, num_paths)
    redraw = _among_all if exact else _among_some
    one = partial(_one_path, redraw, all_records(sweep), sweep, model.log_suffix)
    paths, moved, codes = _over_paths(one, last, jax.random.split(key_back, num_paths), num_particles, exact)
    backward = jnp.max(codes)
    return SmootherResult(
        paths=paths,
        log_evidence=sweep.log_evidence,
        ess=sweep.ess,
        update_rate=jnp.mean(moved, axis=0, dtype=sweep.ess.dtype),
        status=jnp.where(sweep.status == int(Status.OK), backward, sweep.status),
        stopped_at=sweep.stopped_at,
    )


def _over_paths(one: Any, last: Array, keys: Array, num_particles: int, exact: bool) -> tuple:
    """Side by side, as many as the table of paths by particles allows."""
    width = num_particles if exact else CANDIDATES
    chunk = max(1, _CHUNK // width)
    if chunk >= last.shape[0]:
        return jax.vmap(one)(last, keys)
    return lax.map(lambda row: one(*row), (last, keys), batch_size=chunk)


def _one_path(
    redraw: Any, records: ArrayTree, sweep: Sweep, log_suffix: Any, index: Array, key: Array
) -> tuple:
    """Return a path that ends in a particle, whether each step left the genealogy, and the worst status."""
    num_steps = sweep.past_weights.shape[0]
    path = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:, 0]).at[-1].set(leaf[-1, index]), records)

    def back(carry: tuple, row: tuple) -> tuple[tuple, Array]:
        index, path, worst = carry
        t, key = row
        particles = jax.tree.map(lambda leaf: leaf[t - 1], records)
        log_weights, parent = sweep.past_weights[t - 1], sweep.ancestors[t, index]
        index, code = redraw(key, particles, log_weights, parent, lambda chosen: log_suffix(chosen, path, t))
        path = jax.tree.map(lambda leaf, values: leaf.at[t - 1].set(values[index]), path, particles)
        return (index, path, jnp.maximum(worst, code)), index != parent

    times, keys = jnp.arange(1, num_steps, dtype=jnp.int32), jax.random.split(key, num_steps)[1:]
    start = (index, path, jnp.int32(int(Status.OK)))
    (_, path, worst), moved = lax.scan(back, start, (times, keys), reverse=True)
    return path, jnp.concatenate([moved, jnp.zeros(1, bool)]), worst


def _among_all(key: Array, particles: ArrayTree, log_weights: Array, parent: Array, log_suffix: Any) -> tuple:
    """One of all particles, in proportion to weight times density."""
    log_total = log_weights + log_suffix(particles)
    log_total = jnp.where(log_weights == -jnp.inf, -jnp.inf, log_total)  # a dead one's density may be NaN
    scaled, _ = weights.relative(log_total)
    return _pick(jax.random.uniform(key, (), scaled.dtype), scaled).astype(parent.dtype), weights.status(
        log_total
    )


def _among_some(
    key: Array, particles: ArrayTree, log_weights: Array, parent: Array, log_suffix: Any
) -> tuple:
    """The parent, or one of a few drawn by weight: in proportion to the density."""
    key_candidates, key_choose = jax.random.split(key)
    scaled, _ = weights.relative(log_weights)
    points = jax.random.uniform(key_candidates, (CANDIDATES,), scaled.dtype)
    candidates = jnp.concatenate([parent[None], _pick(points, scaled).astype(parent.dtype)])
    log_density = log_suffix(take(particles, candidates))
    shares, _ = weights.relative(log_density)
    chosen = _pick(jax.random.uniform(key_choose, (), shares.dtype), shares)
    return candidates[chosen], weights.status(log_density)


def _pick(points: Array, scaled: Array) -> Array:
    """Indices where the cumulative weight passes the points, fractions of its total; never one of weight zero."""
    cumulative = lax.cummax(jnp.cumsum(scaled))
    found = jnp.searchsorted(cumulative, points * cumulative[-1], side="right")
    found = jnp.minimum(found, scaled.shape[0] - 1)
    # in the rounding of a cumulative sum a weight of zero may have a length
    return jnp.where(scaled[found] > 0, found, jnp.argmax(scaled))
