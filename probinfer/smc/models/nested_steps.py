"""Steps made of several draws: one of M candidates, chosen in proportion, and moves after weighing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from probinfer.core.algorithms import as_partial
from probinfer.core.types import Array, ArrayTree, field, pytree
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac, FeynmanKac, as_batched, lift

__all__ = ["nested", "resample_move"]


@pytree
class _Candidates:
    model: Any
    num: int = field(static=True)


def nested(fk: FeynmanKac | BatchedFeynmanKac, num_candidates: int) -> BatchedFeynmanKac:
    r"""Let every particle draw M candidates of each step, keep one with probability proportional to its weight.

    The particle is weighed by the mean :math:`\frac1M\sum_m w_m`, which is unbiased for the optimal one-step
    lookahead weight. In a conditional pass the reference is one of the M candidates of slot 0.

    Args:
        fk: the model, of one particle or batched; its ``gather`` must be able to repeat particles.
        num_candidates: M, at least 1.

    Returns:
        The batched model; each step holds N M particles for a moment.

    Raises:
        ValueError: ``num_candidates`` is not a positive integer.

    References:
        Naesseth, Lindsten and Schön (2015), nested sequential Monte Carlo; Andrieu, Doucet and Holenstein (2010).
    """
    if isinstance(num_candidates, bool) or not isinstance(num_candidates, int) or num_candidates < 1:
        raise ValueError(f"num_candidates must be a positive integer, got {num_candidates!r}")
    model = as_batched(fk)
    spec = _Candidates(model, num_candidates)
    init, extend = Partial(_nested_init, spec), Partial(_nested_extend, spec)
    return BatchedFeynmanKac(init, extend, model.gather, model.done, model.record, model.log_suffix)


def _nested_init(spec: _Candidates, key: Array, num: int, reference: ArrayTree = None) -> tuple:
    key_init, key_choose = jax.random.split(key)
    extra = () if reference is None else (reference,)
    particles, log_weights = spec.model.init(key_init, num * spec.num, *extra)
    return _keep_one(spec, key_choose, particles, log_weights, reference is not None)


def _nested_extend(
    spec: _Candidates, key: Array, particles: ArrayTree, t: Array, reference: ArrayTree = None
) -> tuple:
    key_extend, key_choose = jax.random.split(key)
    num = _count(spec.model, particles)
    parents = spec.model.gather(particles, jnp.repeat(jnp.arange(num, dtype=jnp.int32), spec.num))
    extra = () if reference is None else (reference,)
    candidates, increments = spec.model.extend(key_extend, parents, t, *extra)
    if spec.model.done is not None:
        increments = jnp.where(spec.model.done(parents), jnp.zeros_like(increments), increments)
    return _keep_one(spec, key_choose, candidates, increments, reference is not None)


def _keep_one(
    spec: _Candidates, key: Array, candidates: ArrayTree, log_weights: Array, planted: bool
) -> tuple:
    grouped = log_weights.reshape(-1, spec.num)
    choice = jax.random.categorical(key, grouped, axis=1).astype(jnp.int32)
    if planted:
        choice = choice.at[0].set(0)
    index = spec.num * jnp.arange(len(grouped), dtype=jnp.int32) + choice
    size = jnp.log(jnp.asarray(spec.num, grouped.dtype))
    return spec.model.gather(candidates, index), jax.nn.logsumexp(grouped, axis=1) - size


def _count(model: BatchedFeynmanKac, particles: ArrayTree) -> int:
    return jax.tree.leaves(jax.eval_shape(model.records, particles))[0].shape[0]


def resample_move(fk: Any, move: Any) -> BatchedFeynmanKac:
    r"""Move every particle after it has been weighed, by a kernel that leaves its target invariant.

    Copies that resampling made part again. Weights stay right, since the kernel leaves
    :math:`M_t(x_{t-1}, x)\,G_t(x_{t-1}, x)`, as a density of x, as it is.

    Args:
        fk: the model of one particle, a ``FeynmanKac``.
        move: ``move(key, x_previous, x, t) -> x``; at t = 0 ``x_previous`` is x.

    Returns:
        The batched model, for the particle filter; conditional passes refuse it.

    Raises:
        TypeError: ``fk`` is not of one particle.

    References:
        Gilks and Berzuini (2001), Following a moving target.
    """
    if not isinstance(fk, FeynmanKac):
        raise TypeError(
            f"resample_move takes the one-particle form, got {type(fk).__name__}; a batched model moves its particles "
            f"at the end of its own init and extend"
        )
    move = as_partial(move)
    return BatchedFeynmanKac(Partial(_moved_init, fk, move), Partial(_moved_extend, fk, move))


def _moved_init(fk: FeynmanKac, move: Any, key: Array, num: int, reference: ArrayTree = None) -> tuple:
    _refuse(reference)
    key_init, key_move = jax.random.split(key)
    particles, log_weights = lift(fk).init(key_init, num)
    return _move_all(move, key_move, particles, particles, jnp.int32(0)), log_weights


def _moved_extend(
    fk: FeynmanKac, move: Any, key: Array, particles: ArrayTree, t: Array, reference: ArrayTree = None
) -> tuple:
    _refuse(reference)
    key_extend, key_move = jax.random.split(key)
    following, increments = lift(fk).extend(key_extend, particles, t)
    return _move_all(move, key_move, particles, following, t), increments


def _move_all(move: Any, key: Array, before: ArrayTree, particles: ArrayTree, t: Array) -> ArrayTree:
    keys = jax.random.split(key, jax.tree.leaves(particles)[0].shape[0])
    return jax.vmap(move, (0, 0, 0, None))(keys, before, particles, t)


def _refuse(reference: ArrayTree) -> None:
    if reference is not None:
        raise ValueError(
            "a model with moves cannot follow a reference, which a move would leave: run the conditional pass on the "
            "model itself; particle Gibbs moves its paths by ancestor sampling"
        )
