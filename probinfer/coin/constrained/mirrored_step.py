"""The step of constrained coin sampling: what ``mirrored_svgd`` and ``mirrored_svmd`` share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from probinfer.coin.cloud import bandwidth as bandwidths
from probinfer.coin.cloud import geometry as geometries
from probinfer.coin.cloud.geometry import Metric
from probinfer.coin.cloud.particles import (
    ParticleScores,
    check_positions,
    check_spread,
    masked_mean,
    ravel_particles,
    score_particles,
)
from probinfer.coin.cloud_descent import choose_geometry
from probinfer.coin.constrained.mirrored_directions import adapted_direction, mirrored_direction
from probinfer.core.errors import shortened
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, PRNGKey, field, pytree
from probinfer.numerics.stein import stein_direction

__all__ = ["MirroredConfig", "MirroredInfo", "MirroredState", "init", "step"]

_SWITCH = 64  # from this step on the late bet
_LONG = 2**20


class MirroredState(NamedTuple):
    """Where a constrained cloud stands.

    ``positions`` is the tree of constrained particles; ``z`` (N, d) and ``metric`` are their dual coordinates relative
    to their cloud, ``scale`` (D,) the units in which the kernel measures positions, their standard deviations when the
    metric was made; ``bets`` are the states of the early and the late bet and ``step`` counts the steps.
    """

    positions: ArrayTree
    z: Array
    metric: Metric
    scale: Array
    bets: Any
    step: Array


class MirroredInfo(NamedTuple):
    r"""Report of a step.

    Before the move: ``direction_norm``, the root mean square length of the direction in the coordinates of the dual
    cloud; ``virial`` (d,), the mean of :math:`(\eta_k - \bar\eta_k) s_k`, -1 where the cloud is right;
    ``squared_bandwidth``; ``restarted``; ``num_nonfinite``, the particles without a finite log density and score, which
    did not move. After it: ``feasible``, the fraction of particles strictly inside, below 1 only where a position has
    rounded onto the boundary. ``status`` is ``NON_FINITE`` where no particle has a score.
    """

    direction_norm: Array
    virial: Array
    squared_bandwidth: Array
    restarted: Array
    num_nonfinite: Array
    feasible: Array
    status: Array


@pytree
class MirroredConfig:
    """What a step needs beside the log density and the state; ``on`` says where the kernel measures."""

    mirror: Any
    kernel: Any
    geometry: Any
    early: optax.GradientTransformation
    late: optax.GradientTransformation | None
    cutoff: Any
    bandwidth: str = field(static=True)
    on: str = field(static=True)
    stochastic: bool = field(static=True)


def init(config: MirroredConfig, logdensity_fn: Any, positions: ArrayTree) -> MirroredState:
    """State of a constrained cloud; refuses what is none (see ``mirrored_svgd``)."""
    check_positions(positions)
    check_spread(positions, every=False)
    positions = jax.tree.map(jnp.asarray, positions)
    _check_shape(config.mirror, positions)
    _check_inside(config.mirror, positions)
    eta = jax.vmap(config.mirror.dual)(positions)
    geometry = _geometry(config, eta)
    check_spread(eta, every=geometry.restarts)
    metric, z = geometry.start(eta, jnp.ones(len(eta), bool))
    scale = _scale(config, geometry, positions)
    return MirroredState(positions, z, metric, scale, _fresh(config, z), jnp.zeros((), jnp.int32))


def _geometry(config: MirroredConfig, table: Array) -> Any:
    return choose_geometry(*table.shape) if config.geometry is None else config.geometry


def _fresh(config: MirroredConfig, z: Array) -> tuple:
    """States of the bets without outcomes."""
    return tuple(bet.init(z) for bet in (config.early, config.late) if bet is not None)


def _scale(config: MirroredConfig, geometry: Any, positions: ArrayTree) -> Array:
    """Standard deviations of the positions; ones where they keep their units or have no spread."""
    spread = jnp.std(ravel_particles(positions), axis=0)
    relative = geometry.restarts and config.on == "positions"
    return jnp.where((spread > 0) & relative, spread, jnp.ones_like(spread))


def _check_shape(mirror: Any, positions: ArrayTree) -> None:
    """Refuse trees where the mirror takes vectors."""
    if not getattr(mirror, "takes_vectors", False):
        return
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(positions)]
    if not isinstance(positions, jax.Array) or positions.ndim != 2:
        raise ValueError(
            f"coin.{type(mirror).__name__} takes positions in one array (N, d), got leaves of shapes {shapes}; "
            "for other trees use coin.mirror_from_bijector"
        )


def _check_inside(mirror: Any, positions: ArrayTree) -> None:
    """Refuse concrete positions outside.

    Raises:
        ValueError: a position on or outside the boundary.
    """
    inside = jax.vmap(mirror.inside)(positions)
    if isinstance(inside, jax.core.Tracer) or bool(jnp.all(inside)):
        return
    first = int(np.argmin(np.asarray(inside)))
    shown = shortened(jax.tree.map(lambda leaf: np.asarray(leaf[first]).tolist(), positions))
    raise ValueError(
        f"{int(np.sum(~np.asarray(inside)))} of {len(inside)} particles are not strictly inside the constraints of "
        f"{type(mirror).__name__}, the first is number {first}: {shown}; start from draws inside them"
    )


def step(config: MirroredConfig, logdensity_fn: Any, key: PRNGKey, state: MirroredState) -> tuple:
    """One step: score, metric, direction, bet, and back to the positions."""
    all_particles = jnp.ones(len(state.z), bool)
    due = geometries.is_due(state.step) | geometries.is_stale(state.z, all_particles)
    due = due if _geometry(config, state.z).restarts else jnp.array(False)
    metric, z, scale, bets = jax.lax.cond(due, _renewed, _kept, config, state)
    geometry = _geometry(config, z)
    eta = geometry.from_z(metric, z)
    _, scores, valid = _scores(config, logdensity_fn, key, eta)
    scores = jnp.where(valid[:, None], scores, 0)
    direction, square = _direction(config, state.step, metric, z, eta, scale, scores, valid)
    direction = jnp.where(valid[:, None], direction, jnp.nan)
    move, bets = _bet(config, bets, direction, z, state.step)
    z = z + jnp.where(jnp.isfinite(move), move, 0)
    moved = jax.vmap(config.mirror.primal)(geometry.from_z(metric, z))
    positions = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state.positions)
    info = MirroredInfo(
        direction_norm=jnp.sqrt(jnp.sum(masked_mean(valid, direction**2))),
        virial=masked_mean(valid, (eta - masked_mean(valid, eta)) * scores),
        squared_bandwidth=square,
        restarted=due,
        num_nonfinite=jnp.sum(~valid).astype(jnp.int32),
        feasible=jnp.mean(jax.vmap(config.mirror.inside)(positions).astype(z.dtype)),
        status=jnp.where(jnp.any(valid), jnp.int32(Status.OK), jnp.int32(Status.NON_FINITE)),
    )
    return MirroredState(positions, z, metric, scale, bets, state.step + 1), info


def _kept(config: MirroredConfig, state: MirroredState) -> tuple[Metric, Array, Array, Any]:
    return state.metric, state.z, state.scale, state.bets


def _renewed(config: MirroredConfig, state: MirroredState) -> tuple[Metric, Array, Array, Any]:
    geometry = _geometry(config, state.z)
    metric, z = geometry.refresh(state.metric, state.z, jnp.ones(len(state.z), bool))
    return metric, z, _scale(config, geometry, state.positions), _fresh(config, z)


def _bet(config: MirroredConfig, bets: tuple, direction: Array, z: Array, step: Array) -> tuple[Array, tuple]:
    """The move of z: by the early bet up to step 64, by the late one from there on."""
    loss = -direction
    if config.late is None:
        move, state = config.early.update(loss, bets[0], z)
        return move, (state,)
    late = config.late

    def now_early():
        move, state = config.early.update(loss, bets[0], z)
        return move, (state, bets[1])

    def now_late():
        start = jax.tree.map(lambda new, old: jnp.where(step == _SWITCH, new, old), late.init(z), bets[1])
        move, state = late.update(loss, start, z)
        return move, (bets[0], state)

    return jax.lax.cond(step < _SWITCH, now_early, now_late)


def _scores(config: MirroredConfig, logdensity_fn: Any, key: PRNGKey, eta: Array) -> ParticleScores:
    """Log densities of the dual coordinates and their gradients."""

    def value(*batch_and_row: Any) -> Array:
        *batch, row = batch_and_row
        return logdensity_fn(*batch, config.mirror.primal(row)) + config.mirror.log_det(row)

    template = jax.ShapeDtypeStruct(eta.shape[1:], eta.dtype)
    return score_particles(value, template, eta, key if config.stochastic else None)


def _direction(
    config: MirroredConfig,
    step: Array,
    metric: Metric,
    z: Array,
    eta: Array,
    scale: Array,
    scores: Array,
    valid: Array,
) -> tuple[Array, Array]:
    """The direction in z, and the squared bandwidth."""

    def flat(row):
        return ravel_particles(jax.tree.map(lambda leaf: leaf[None], config.mirror.primal(row)))[0] / scale

    pullback = _geometry(config, z).pullback
    points = z if config.on == "dual" else jax.vmap(flat)(eta)
    kernel, square = _kernel(config, points, valid, step)
    if config.on == "dual":
        return stein_direction(kernel, z, pullback(metric, scores), valid), square
    jacobians = jax.vmap(jax.jacfwd(flat))(eta)
    if config.on == "positions":
        return pullback(metric, mirrored_direction(kernel, points, jacobians, scores, valid)), square
    found = adapted_direction(
        kernel,
        points,
        jacobians,
        scores,
        valid,
        lambda v: jax.vmap(config.mirror.hessian)(eta, v),
        config.cutoff,
    )
    return pullback(metric, found), square


def _kernel(config: MirroredConfig, points: Array, valid: Array, step: Array) -> tuple[Any, Array]:
    """The kernel of this step, and its squared bandwidth."""
    if config.bandwidth == "fixed":
        return config.kernel, jnp.ones((), points.dtype)
    late = jnp.asarray(_LONG, jnp.int32) if config.bandwidth == "published" else step
    square = bandwidths.squared_bandwidth("median", points, valid, late)
    return bandwidths.scaled_kernel(config.kernel, square), square
