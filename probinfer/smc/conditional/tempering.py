"""Particle Gibbs at several temperatures; neighboring chains exchange their paths."""

from __future__ import annotations

from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.arguments import check_finite, check_key
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Float, Int, PRNGKey, Scalar, strong_array
from probinfer.smc.conditional.filter import check_reference, check_suffix
from probinfer.smc.conditional.gibbs import choose_path, gibbs_step
from probinfer.smc.filtering.filter import as_adaptive, check_counts
from probinfer.smc.filtering.forward_pass import forward
from probinfer.smc.models.feynman_kac import FeynmanKac, as_batched
from probinfer.smc.models.proposals import power

__all__ = ["TemperingResult", "parallel_tempering", "path_log_potential"]

_LADDER = (1.0, 0.7, 0.45, 0.25)


class TemperingResult(NamedTuple):
    """Paths of all chains, with diagnostics.

    Attributes:
        paths: leaves (iterations, M, T, ...); ``paths[:, k]`` is the chain at ``inverse_temperatures[k]``.
        inverse_temperatures: (M,).
        log_evidence: (iterations, M) estimates of the conditional filters, one per temperature.
        swap_rate: (M-1,) share of the proposed exchanges between neighbors that were accepted; if it is small, add a
            temperature in between.
        status: the worst of all passes, as ``GibbsResult.status``.
    """

    paths: ArrayTree
    inverse_temperatures: Float[Array, " M"]
    log_evidence: Float[Array, "iterations M"]
    swap_rate: Float[Array, " M-1"]
    status: Int[Array, ""]


def parallel_tempering(
    key: PRNGKey,
    fk: Any,
    num_steps: int,
    num_particles: int,
    num_iterations: int,
    *,
    inverse_temperatures: Any = _LADDER,
    references: ArrayTree = None,
    ancestor_sampling: bool = True,
    resampling: Any = "systematic",
    ess_threshold: Any = 0.5,
) -> TemperingResult:
    r"""Run particle Gibbs on :math:`\pi_k\propto M\prod_t G_t^{\beta_k}` for each k, and exchange paths of neighbors.

    After each iteration the paths of chains k and k + 1 are exchanged with probability

    .. math:: \min\{1, \exp[(\beta_k-\beta_{k+1})(L(x^{k+1})-L(x^k))]\},\quad L(x) = \sum_t\log G_t(x_{t-1}, x_t),

    for even k at even iterations and odd k at odd ones. Hot chains cross between modes where the cold one is stuck.

    Args:
        key: random key.
        fk: the model of one particle, a ``FeynmanKac``.
        num_steps: T.
        num_particles: N of each chain, at least 2.
        num_iterations: length of the chains.
        inverse_temperatures: (M,), non-negative; 1 is the model itself.
        references: the paths to start from, leaves (M, T, ...); None: drawn by particle filters.
        ancestor_sampling: as for ``particle_gibbs``.
        resampling: as for ``particle_gibbs``.
        ess_threshold: as for ``particle_gibbs``.

    Returns:
        The paths of all chains, with a status.

    Raises:
        TypeError: ``fk`` is not a ``FeynmanKac``.
        ValueError: as ``particle_gibbs``; inverse temperatures that are not a vector of numbers >= 0; not one
            reference for each.

    References:
        Geyer (1991); Syed, Bouchard-Côté, Deligiannidis and Doucet (2022), even-odd exchanges.
    """
    check_key(key)
    check_counts(num_steps=num_steps, num_particles=num_particles, num_iterations=num_iterations)
    if not isinstance(fk, FeynmanKac):
        raise TypeError(
            f"parallel tempering needs potentials separate from transitions: a smc.FeynmanKac, got {type(fk).__name__}"
        )
    if num_particles < 2:
        raise ValueError("particle Gibbs needs num_particles >= 2: with one the reference never changes")
    check_suffix(as_batched(fk), ancestor_sampling)
    adaptive = as_adaptive(resampling, ess_threshold)
    adaptive.conditional()  # raises if the scheme has no conditional form
    betas = strong_array(inverse_temperatures)
    if jnp.ndim(betas) != 1 or not len(betas):
        raise ValueError(
            f"inverse_temperatures must be a vector of at least one number, got {inverse_temperatures!r}"
        )
    check_finite("inverse_temperatures", betas)
    if not isinstance(betas, jax.core.Tracer) and (betas < 0).any():
        raise ValueError(f"inverse_temperatures must not be negative, got {inverse_temperatures!r}")
    if references is not None:
        references = _check_references(as_batched(fk), references, len(betas), num_steps)
    path_update = "ancestor" if ancestor_sampling else "genealogy"
    return _run(key, fk, betas, adaptive, references, num_steps, num_particles, num_iterations, path_update)


def _check_references(model: Any, references: ArrayTree, num_paths: int, num_steps: int) -> ArrayTree:
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(references)}
    if lengths != {(num_paths,)}:
        raise ValueError(
            f"references must have one path per temperature: expected leaves ({num_paths}, {num_steps}, ...), got "
            f"leading axes {sorted(lengths)}"
        )
    paths = [
        check_reference(model, jax.tree.map(itemgetter(k), references), num_steps) for k in range(num_paths)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *paths)


def path_log_potential(fk: FeynmanKac, path: ArrayTree) -> Scalar:
    r"""Return :math:`\sum_t \log G_t(x_{t-1}, x_t)` of one path.

    Args:
        fk: the model.
        path: leaves (T, ...).
    """
    previous = jax.tree.map(lambda leaf: jnp.concatenate([leaf[:1], leaf[:-1]]), path)
    times = jnp.arange(jax.tree.leaves(path)[0].shape[0], dtype=jnp.int32)
    return jnp.sum(jax.vmap(fk.log_potential)(previous, path, times))


@partial(jax.jit, static_argnames=("num_steps", "num_particles", "num_iterations", "path_update"))
def _run(
    key: Array,
    fk: FeynmanKac,
    betas: Array,
    adaptive: Any,
    references: ArrayTree,
    num_steps: int,
    num_particles: int,
    num_iterations: int,
    path_update: str,
) -> TemperingResult:
    key_start, key_chain = jax.random.split(key)
    num_chains = betas.shape[0]
    status = jnp.int32(int(Status.OK))
    if references is None:
        draw = partial(_draw_reference, fk, adaptive, num_steps, num_particles)
        references, statuses = jax.vmap(draw)(jax.random.split(key_start, num_chains), betas)
        status = jnp.max(statuses)
    conditional = adaptive.conditional()

    def advance(key: Array, beta: Array, path: ArrayTree) -> tuple:
        model = as_batched(power(fk, beta))
        new_path, filter_trace = gibbs_step(key, model, conditional, path, num_particles, path_update)
        return new_path, filter_trace.log_evidence, filter_trace.status

    def iterate(paths: ArrayTree, row: tuple) -> tuple[ArrayTree, tuple]:
        key, iteration = row
        key_step, key_swap = jax.random.split(key)
        # Update every chain by particle Gibbs
        paths, log_evidence, statuses = jax.vmap(advance)(
            jax.random.split(key_step, num_chains), betas, paths
        )
        # Exchange paths between neighbors
        log_potentials = jax.vmap(partial(path_log_potential, fk))(paths)
        order, proposed, accepted = _exchange(key_swap, betas, log_potentials, iteration % 2)
        paths = jax.tree.map(lambda leaf: leaf[order], paths)
        return paths, (paths, log_evidence, proposed, accepted, jnp.max(statuses))

    rows = jax.random.split(key_chain, num_iterations), jnp.arange(num_iterations)
    _, (paths, log_evidence, proposed, accepted, statuses) = lax.scan(iterate, references, rows)
    num_proposed = jnp.maximum(jnp.sum(proposed, axis=0), 1)
    return TemperingResult(
        paths=paths,
        inverse_temperatures=betas,
        log_evidence=log_evidence,
        swap_rate=(jnp.sum(accepted, axis=0) / num_proposed).astype(log_evidence.dtype),
        status=jnp.maximum(status, jnp.max(statuses)),
    )


def _draw_reference(
    fk: FeynmanKac, adaptive: Any, num_steps: int, num_particles: int, key: Array, beta: Array
) -> tuple[ArrayTree, Array]:
    key_filter, key_draw = jax.random.split(key)
    model = as_batched(power(fk, beta))
    filter_trace = forward(key_filter, model, adaptive, None, num_steps, num_particles, "paths")
    return choose_path(key_draw, filter_trace), filter_trace.status


def _exchange(
    key: Array, betas: Float[Array, " m"], log_potentials: Float[Array, " m"], parity: Array
) -> tuple[Array, Array, Array]:
    """Return the new order of the paths, and which neighbors (k, k + 1) were proposed and exchanged."""
    pairs = jnp.arange(betas.shape[0] - 1)
    dtype = log_potentials.dtype
    log_ratio = (betas[:-1] - betas[1:]).astype(dtype) * (log_potentials[1:] - log_potentials[:-1])
    proposed = pairs % 2 == parity
    accepted = proposed & (jnp.log(jax.random.uniform(key, pairs.shape, dtype)) < log_ratio)
    order = jnp.arange(betas.shape[0])
    up, down = jnp.append(accepted, False), jnp.insert(accepted, 0, False)
    return order + up.astype(order.dtype) - down.astype(order.dtype), proposed, accepted
