"""The step of constrained coin sampling, which ``mirrored_svgd`` and ``mirrored_svmd`` share."""

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
    ravel_particle,
    ravel_particles,
    score_particles,
)
from probinfer.coin.cloud_descent import choose_geometry
from probinfer.coin.constrained.mirrored_directions import adapted_direction, mirrored_direction
from probinfer.core.errors import shortened
from probinfer.core.status import Status
from probinfer.core.trees import select
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, PRNGKey, field, pytree
from probinfer.numerics.stein import stein_direction

__all__ = ["MirroredConfig", "MirroredInfo", "MirroredState", "init", "step"]

_SWITCH = 64  # first step of the late bet
_AFTER_WARMUP = 2**20  # a step after the bandwidth has reached the median


class MirroredState(NamedTuple):
    r"""State of a constrained cloud.

    Attributes:
        positions: the constrained particles, leaves (N, ...).
        z: dual coordinates relative to their cloud.
        metric: these coordinates, :math:`\eta = c + B z`.
        scale: units of the positions in the kernel, their standard deviations when the metric was last refreshed.
        bets: states of the early and the late bet.
        step: number of steps.
    """

    positions: ArrayTree
    z: Float[Array, "N d"]
    metric: Metric
    scale: Float[Array, " D"]
    bets: Any
    step: Int[Array, ""]


class MirroredInfo(NamedTuple):
    r"""Report of a step: of the cloud before it moved, but for ``feasible``.

    Attributes:
        direction_norm: root mean square over particles of the length of the direction in z.
        virial: mean of :math:`(\eta_k - \bar\eta_k) s_k`; -1 if the cloud is right.
        squared_bandwidth: h, in the units of the kernel.
        restarted: whether the metric was refreshed.
        num_nonfinite: number of particles without a finite log density and score, which did not move.
        feasible: share of the particles that are strictly inside after the move; below 1 only if a position has been
            rounded to the boundary.
        status: ``NON_FINITE`` if no particle has a score.
    """

    direction_norm: Float[Array, ""]
    virial: Float[Array, " d"]
    squared_bandwidth: Float[Array, ""]
    restarted: Bool[Array, ""]
    num_nonfinite: Int[Array, ""]
    feasible: Float[Array, ""]
    status: Int[Array, ""]


@pytree
class MirroredConfig:
    """Settings of a step; ``on`` is what the distances of the kernel are computed from."""

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
    """Return the state of a constrained cloud; refuses other positions (see ``mirrored_svgd``)."""
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
    return MirroredState(
        positions=positions,
        z=z,
        metric=metric,
        scale=scale,
        bets=_init_bets(config, z),
        step=jnp.zeros((), jnp.int32),
    )


def _geometry(config: MirroredConfig, table: Array) -> Any:
    return choose_geometry(*table.shape) if config.geometry is None else config.geometry


def _init_bets(config: MirroredConfig, z: Array) -> tuple:
    return tuple(bet.init(z) for bet in (config.early, config.late) if bet is not None)


def _scale(config: MirroredConfig, geometry: Any, positions: ArrayTree) -> Array:
    """Return the standard deviations of the positions; ones if they keep their units, and where they have no spread."""
    spread = jnp.std(ravel_particles(positions), axis=0)
    relative = geometry.restarts and config.on == "positions"
    return jnp.where((spread > 0) & relative, spread, jnp.ones_like(spread))


def _check_shape(mirror: Any, positions: ArrayTree) -> None:
    """Refuse trees if the mirror takes vectors."""
    if not getattr(mirror, "takes_vectors", False):
        return
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(positions)]
    if not isinstance(positions, jax.Array) or positions.ndim != 2:
        raise ValueError(
            f"coin.{type(mirror).__name__} takes positions in one array (N, d), got leaves of shapes {shapes}; "
            "for other trees use coin.mirror_from_bijector"
        )


def _check_inside(mirror: Any, positions: ArrayTree) -> None:
    """Refuse positions that are not strictly inside; traced positions are not checked.

    Raises:
        ValueError: A position is on or outside the boundary.
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
    """Return the next state and its ``MirroredInfo``."""
    # Refresh the metric and restart the bets, if due
    all_particles = jnp.ones(len(state.z), bool)
    due = geometries.is_due(state.step) | geometries.is_stale(state.z, all_particles)
    due = due if _geometry(config, state.z).restarts else jnp.array(False)
    metric, z, scale, bets = jax.lax.cond(due, _refresh, _unchanged, config, state)
    geometry = _geometry(config, z)
    eta = geometry.from_z(metric, z)

    # Score the particles in the dual space
    _, scores, valid = _scores(config, logdensity_fn, key, eta)
    scores = jnp.where(valid[:, None], scores, 0)

    # Direction in z
    direction, square = _direction(config, state.step, metric, z, eta, scale, scores, valid)
    direction = jnp.where(
        valid[:, None], direction, jnp.nan
    )  # NaN freezes the bets of particles without a score

    # Bet and move, then map to the constrained positions
    move, bets = _bet(config, bets, direction, z, state.step)
    z = z + jnp.where(jnp.isfinite(move), move, 0)
    primal = jax.vmap(config.mirror.primal)(geometry.from_z(metric, z))
    positions = jax.tree.map(lambda new, old: new.astype(old.dtype), primal, state.positions)
    info = MirroredInfo(
        direction_norm=jnp.sqrt(jnp.sum(masked_mean(valid, direction**2))),
        virial=masked_mean(valid, (eta - masked_mean(valid, eta)) * scores),
        squared_bandwidth=square,
        restarted=due,
        num_nonfinite=jnp.sum(~valid).astype(jnp.int32),
        feasible=jnp.mean(jax.vmap(config.mirror.inside)(positions).astype(z.dtype)),
        status=jnp.where(jnp.any(valid), jnp.int32(Status.OK), jnp.int32(Status.NON_FINITE)),
    )
    new = MirroredState(positions=positions, z=z, metric=metric, scale=scale, bets=bets, step=state.step + 1)
    return new, info


def _unchanged(config: MirroredConfig, state: MirroredState) -> tuple[Metric, Array, Array, Any]:
    return state.metric, state.z, state.scale, state.bets


def _refresh(config: MirroredConfig, state: MirroredState) -> tuple[Metric, Array, Array, Any]:
    geometry = _geometry(config, state.z)
    metric, z = geometry.refresh(state.metric, state.z, jnp.ones(len(state.z), bool))
    return metric, z, _scale(config, geometry, state.positions), _init_bets(config, z)


def _bet(config: MirroredConfig, bets: tuple, direction: Array, z: Array, step: Array) -> tuple[Array, tuple]:
    """Return the move of z, by the early bet before step 64 and by the late one from then on."""
    gradient = -direction  # of a loss
    if config.late is None:
        move, state = config.early.update(gradient, bets[0], z)
        return move, (state,)
    late = config.late

    def bet_early():
        move, state = config.early.update(gradient, bets[0], z)
        return move, (state, bets[1])

    def bet_late():
        # The late bet starts where the particles are at the switch.
        old = select(step == _SWITCH, late.init(z), bets[1])
        move, state = late.update(gradient, old, z)
        return move, (bets[0], state)

    return jax.lax.cond(step < _SWITCH, bet_early, bet_late)


def _scores(config: MirroredConfig, logdensity_fn: Any, key: PRNGKey, eta: Array) -> ParticleScores:
    """Return log densities and scores of the dual coordinates."""

    def dual_logdensity(*key_and_row: Any) -> Array:
        *keys, row = key_and_row
        return logdensity_fn(*keys, config.mirror.primal(row)) + config.mirror.log_det(row)

    template = jax.ShapeDtypeStruct(eta.shape[1:], eta.dtype)
    return score_particles(dual_logdensity, template, eta, key if config.stochastic else None)


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
    """Return the direction in z, and the squared bandwidth."""

    def scaled_position(row):
        return ravel_particle(config.mirror.primal(row)) / scale

    pullback = _geometry(config, z).pullback
    points = z if config.on == "dual" else jax.vmap(scaled_position)(eta)
    kernel, square = _kernel(config, points, valid, step)
    if config.on == "dual":
        return stein_direction(kernel, z, pullback(metric, scores), valid), square
    jacobians = jax.vmap(jax.jacfwd(scaled_position))(eta)
    if config.on == "positions":
        return pullback(metric, mirrored_direction(kernel, points, jacobians, scores, valid)), square
    direction = adapted_direction(
        kernel,
        points,
        jacobians,
        scores,
        valid,
        lambda v: jax.vmap(config.mirror.hessian)(eta, v),
        config.cutoff,
    )
    return pullback(metric, direction), square


def _kernel(config: MirroredConfig, points: Array, valid: Array, step: Array) -> tuple[Any, Array]:
    """Return the kernel of this step, and its squared bandwidth."""
    if config.bandwidth == "fixed":
        return config.kernel, jnp.ones((), points.dtype)
    bandwidth_step = jnp.asarray(_AFTER_WARMUP, jnp.int32) if config.bandwidth == "published" else step
    square = bandwidths.squared_bandwidth("median", points, valid, bandwidth_step)
    return bandwidths.scaled_kernel(config.kernel, square), square
