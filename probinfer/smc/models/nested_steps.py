"""Steps made of several draws: one of M candidates chosen in proportion to weight, and moves after weighing."""

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
class _NestedModel:
    model: Any
    num_candidates: int = field(static=True)


def nested(fk: FeynmanKac | BatchedFeynmanKac, num_candidates: int) -> BatchedFeynmanKac:
    r"""Draw M candidates of each step per particle and keep one with probability proportional to its weight.

    The particle is weighed by the mean :math:`\frac1M\sum_m w_m`, which is unbiased for the optimal one-step
    lookahead weight. In a conditional pass the reference is one of the M candidates of slot 0.

    Args:
        fk: the model, of one particle or batched; its ``gather`` must be able to repeat particles.
        num_candidates: M, at least 1.

    Returns:
        The batched model; during a step N M particles are in memory.

    Raises:
        ValueError: ``num_candidates`` is not a positive integer.

    References:
        Naesseth, Lindsten and Schön (2015), nested sequential Monte Carlo; Andrieu, Doucet and Holenstein (2010).
    """
    if isinstance(num_candidates, bool) or not isinstance(num_candidates, int) or num_candidates < 1:
        raise ValueError(f"num_candidates must be a positive integer, got {num_candidates!r}")
    model = as_batched(fk)
    nested_model = _NestedModel(model, num_candidates)
    return BatchedFeynmanKac(
        init=Partial(_nested_init, nested_model),
        extend=Partial(_nested_extend, nested_model),
        gather=model.gather,
        done=model.done,
        record=model.record,
        log_suffix=model.log_suffix,
    )


def _nested_init(
    nested_model: _NestedModel, key: Array, num_particles: int, reference: ArrayTree = None
) -> tuple:
    key_init, key_choose = jax.random.split(key)
    reference_args = () if reference is None else (reference,)
    num_draws = num_particles * nested_model.num_candidates
    candidates, log_weights = nested_model.model.init(key_init, num_draws, *reference_args)
    return _choose_candidates(nested_model, key_choose, candidates, log_weights, reference is not None)


def _nested_extend(
    nested_model: _NestedModel, key: Array, particles: ArrayTree, t: Array, reference: ArrayTree = None
) -> tuple:
    key_extend, key_choose = jax.random.split(key)
    model, num_particles = nested_model.model, _num_particles(nested_model.model, particles)
    repeated = jnp.repeat(jnp.arange(num_particles, dtype=jnp.int32), nested_model.num_candidates)
    parents = model.gather(particles, repeated)
    reference_args = () if reference is None else (reference,)
    candidates, increments = model.extend(key_extend, parents, t, *reference_args)
    if model.done is not None:
        increments = jnp.where(model.done(parents), jnp.zeros_like(increments), increments)
    return _choose_candidates(nested_model, key_choose, candidates, increments, reference is not None)


def _choose_candidates(
    nested_model: _NestedModel, key: Array, candidates: ArrayTree, log_weights: Array, has_reference: bool
) -> tuple:
    """Choose one of M candidates per particle; the reference is the first candidate of slot 0."""
    num_candidates = nested_model.num_candidates
    grouped = log_weights.reshape(-1, num_candidates)
    choice = jax.random.categorical(key, grouped, axis=1).astype(jnp.int32)
    if has_reference:
        choice = choice.at[0].set(0)
    index = num_candidates * jnp.arange(len(grouped), dtype=jnp.int32) + choice
    log_num = jnp.log(jnp.asarray(num_candidates, grouped.dtype))
    return nested_model.model.gather(candidates, index), jax.nn.logsumexp(grouped, axis=1) - log_num


def _num_particles(model: BatchedFeynmanKac, particles: ArrayTree) -> int:
    return jax.tree.leaves(jax.eval_shape(model.records, particles))[0].shape[0]


def resample_move(fk: Any, move: Any) -> BatchedFeynmanKac:
    r"""Move every particle after it has been weighed, by a transition that leaves its target invariant.

    Copies made by resampling become distinct. Weights stay right, since the transition leaves the density
    :math:`M_t(x_{t-1}, x)\,G_t(x_{t-1}, x)` of x invariant.

    Args:
        fk: the model of one particle, a ``FeynmanKac``.
        move: ``move(key, x_previous, x, t) -> x``; at t = 0 ``x_previous`` is x.

    Returns:
        The batched model, for the particle filter; conditional passes refuse it.

    Raises:
        TypeError: ``fk`` is not a ``FeynmanKac``.

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


def _moved_init(
    fk: FeynmanKac, move: Any, key: Array, num_particles: int, reference: ArrayTree = None
) -> tuple:
    _refuse_reference(reference)
    key_init, key_move = jax.random.split(key)
    particles, log_weights = lift(fk).init(key_init, num_particles)
    return _move_all(move, key_move, particles, particles, jnp.int32(0)), log_weights


def _moved_extend(
    fk: FeynmanKac, move: Any, key: Array, particles: ArrayTree, t: Array, reference: ArrayTree = None
) -> tuple:
    _refuse_reference(reference)
    key_extend, key_move = jax.random.split(key)
    propagated, increments = lift(fk).extend(key_extend, particles, t)
    return _move_all(move, key_move, particles, propagated, t), increments


def _move_all(move: Any, key: Array, previous: ArrayTree, particles: ArrayTree, t: Array) -> ArrayTree:
    keys = jax.random.split(key, jax.tree.leaves(particles)[0].shape[0])
    return jax.vmap(move, (0, 0, 0, None))(keys, previous, particles, t)


def _refuse_reference(reference: ArrayTree) -> None:
    if reference is not None:
        raise ValueError(
            "a model with moves cannot follow a reference, since a move would leave it: run the conditional pass on "
            "the model itself; particle Gibbs moves its paths by ancestor sampling"
        )
