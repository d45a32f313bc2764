r"""Descent of a cloud of particles along a direction, with bets as step sizes: what the coin samplers share.

One step: score all particles; refresh the metric if that is due, which restarts the bet; compute bandwidth and
direction in the coordinates z of the cloud; the bet turns the direction into a move of z; positions are
:math:`c + B z`. Nothing in z has a unit, so no setting has one.

The bet is an elementwise coin until the cloud has settled: 64 steps without a stale metric, and at a restart standard
deviations of z within a quarter of 1 and virials within a half of -1. After that it is distance over gradients, with
one rate for the whole cloud, which averages the noise of minibatches better; the coin is better while some particles
are far away.

The geometry does most of the work: with it several bets reach nearly the same accuracy, without it none is independent
of scale. The bet makes a learning rate unnecessary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer import betting
from probinfer.coin.cloud import bandwidth as bandwidths
from probinfer.coin.cloud import geometry as geometries
from probinfer.coin.cloud.geometry import Diagonal, Full, Metric
from probinfer.coin.cloud.low_rank import LowRank
from probinfer.coin.cloud.particles import (
    check_positions,
    check_spread,
    masked_mean,
    particle_template,
    ravel_particles,
    score_particles,
    unravel_particles,
)
from probinfer.core.algorithms import Algorithm, algorithm, as_partial
from probinfer.core.binding import StochasticLogDensity
from probinfer.core.errors import shortened
from probinfer.core.status import Status
from probinfer.core.trees import select
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, PRNGKey, field, pytree

__all__ = [
    "CloudInfo",
    "CloudState",
    "DescentConfig",
    "bind_bet",
    "choose_geometry",
    "descent",
    "geometry_of",
]

_SWITCH = 64  # steps without a stale metric before the late bet
_FIT, _VIRIAL = (
    1.25,
    0.5,
)  # for the late bet: the factor and the error allowed for standard deviations and virials
_UNIT = 0.1  # first bet, in standard deviations of the cloud
_MAX_GROWTH = 1e9
_MAX_FULL_DIMS = 1024


class CloudState(NamedTuple):
    """State of a cloud.

    Attributes:
        positions: the particles, leaves (N, ...).
        z: the particles in the coordinates of the cloud.
        metric: these coordinates, x = c + B z.
        bets: states of the early and the late bet.
        step: number of steps.
        age: number of steps since the metric was last stale.
        settled: whether the late bet is used.
        spread: standard deviations at the start.
    """

    positions: ArrayTree
    z: Float[Array, "N d"]
    metric: Metric
    bets: Any
    step: Int[Array, ""]
    age: Int[Array, ""]
    settled: Bool[Array, ""]
    spread: Float[Array, " d"]


class CloudInfo(NamedTuple):
    r"""Report of a step, on the cloud before it moved.

    Attributes:
        direction_norm: root mean square over particles of the length of the direction in z.
        virial: mean of :math:`(x_k - \bar x_k) s_k`; -1 if the cloud is right, nearer to 0 if it is too narrow.
        squared_bandwidth: h, in z.
        restarted: whether the metric was refreshed.
        num_nonfinite: number of particles without a finite log density and score, which did not move.
        status: ``NON_FINITE`` if no particle has a score, or if the cloud has grown by nine orders of magnitude since
            the start, as under a flat or improper density; the cloud then does not move.
    """

    direction_norm: Float[Array, ""]
    virial: Float[Array, " d"]
    squared_bandwidth: Float[Array, ""]
    restarted: Bool[Array, ""]
    num_nonfinite: Int[Array, ""]
    status: Int[Array, ""]


@pytree
class DescentConfig:
    """Settings of a step; with ``late``, it replaces the bet ``early`` when the cloud has settled."""

    direction_fn: Any
    kernel: Any
    geometry: Any
    early: optax.GradientTransformation
    late: optax.GradientTransformation | None
    bandwidth: str = field(static=True)
    stochastic: bool = field(static=True)


def descent(
    logdensity_fn: Any,
    direction_fn: Any,
    kernel: Any,
    geometry: Any = None,
    bet: Any = None,
    *,
    bandwidth: str = "median",
) -> Algorithm:
    """Return the algorithm that moves particles along a direction by a bet.

    Args:
        logdensity_fn: log density of one position, or a ``StochasticLogDensity``: one batch per step for all particles.
        direction_fn: ``direction_fn(kernel, z (N, d), scores (N, d), mask (N,), score_fn) -> (N, d)``, in the
            coordinates of the cloud; ``score_fn(z)`` returns the scores elsewhere (for Hessian products by
            ``jax.jvp``). Rows of particles outside the mask are ignored.
        kernel: its lengthscale is in units of the bandwidth, unless ``bandwidth`` is "fixed".
        geometry: ``Identity()``, ``Diagonal()``, ``LowRank()`` or ``Full()``; None: see ``choose_geometry``.
        bet: any optax transformation, of gradients of a loss in z; None: an elementwise coin until the cloud has
            settled, then distance over gradients, both with unit 0.1.
        bandwidth: "median", "published" or "fixed".

    Returns:
        ``init(positions) -> CloudState`` with leaves (N, ...), and ``step(key, state) -> (CloudState, CloudInfo)``.

    Raises:
        TypeError: ``logdensity_fn`` is not a function, the kernel has no lengthscale, ``geometry`` is not a geometry,
            or ``bet`` is not an optax transformation; from ``init``: the positions are not floating point.
        ValueError: The bandwidth rule is unknown; from ``init``: the positions are not a cloud, or have no spread.
    """
    if not callable(logdensity_fn):
        raise TypeError(
            f"logdensity_fn must be a function of one position, got {shortened(logdensity_fn)}; for a target, pass "
            "target.logdensity_fn"
        )
    bandwidths.check_rule(kernel, bandwidth)
    required = ("restarts", "refresh", "from_z")
    if isinstance(geometry, type) or (
        geometry is not None and not all(hasattr(geometry, name) for name in required)
    ):
        raise TypeError(
            "geometry must be coin.Identity(), coin.Diagonal(), coin.LowRank(), coin.Full() or None, got "
            f"{shortened(geometry)}"
        )
    early, late = (bind_bet(bet), None) if bet is not None else _default_bets()
    config = DescentConfig(
        direction_fn=as_partial(direction_fn),
        kernel=kernel,
        geometry=geometry,
        early=early,
        late=late,
        bandwidth=bandwidth,
        stochastic=isinstance(logdensity_fn, StochasticLogDensity),
    )
    return algorithm(_init, _step, config, as_partial(logdensity_fn))


def _default_bets() -> tuple[Any, Any]:
    return betting.coin(unit=_UNIT), betting.fuse(unit=_UNIT, particles=True)


def bind_bet(bet: Any) -> optax.GradientTransformation:
    """Return an optax transformation as a pytree, so that it can be an argument of a jitted step.

    Raises:
        TypeError: ``bet`` has no ``init`` and ``update``.
    """
    if not (callable(getattr(bet, "init", None)) and callable(getattr(bet, "update", None))):
        raise TypeError(
            f"bet must be an optax transformation with init and update, got {shortened(bet)}; for example "
            "betting.coin(unit=0.5)"
        )
    return optax.GradientTransformation(as_partial(bet.init), as_partial(bet.update))


def _init(config: DescentConfig, logdensity_fn: Any, positions: ArrayTree) -> CloudState:
    check_positions(positions)
    positions = jax.tree.map(jnp.asarray, positions)
    check_spread(positions, every=getattr(config.geometry, "restarts", True))
    return _init_state(config, positions)


@jax.jit
def _init_state(config: DescentConfig, positions: ArrayTree) -> CloudState:
    table = ravel_particles(positions)
    geometry = geometry_of(config, table)
    all_particles = jnp.ones(table.shape[0], bool)
    metric, z = geometry.start(table, all_particles)
    return CloudState(
        positions=positions,
        z=z,
        metric=metric,
        bets=_init_bets(config, z),
        step=jnp.zeros((), jnp.int32),
        age=jnp.zeros((), jnp.int32),
        settled=jnp.zeros((), bool),
        spread=geometries.moments(table, all_particles)[1],
    )


def geometry_of(config: DescentConfig, table: Array) -> Any:
    """Return the geometry that is used for a table (N, d)."""
    if config.geometry is not None:
        return config.geometry
    return choose_geometry(*table.shape, stochastic=config.stochastic)


def choose_geometry(num_particles: int, num_dims: int, *, stochastic: bool = False) -> Any:
    """Return the richest geometry that this number of particles can estimate.

    ``Full()`` if there are more particles than dimensions, and at most 1024 dimensions; otherwise ``LowRank()``.

    Args:
        num_particles: N.
        num_dims: d.
        stochastic: whether scores are noisy: then ``Diagonal()`` replaces ``LowRank()``, which would fit the noise.
    """
    if num_dims < num_particles and num_dims <= _MAX_FULL_DIMS:
        return Full()
    return Diagonal() if stochastic else LowRank()


def _init_bets(config: DescentConfig, z: Array) -> Any:
    return config.early.init(z), None if config.late is None else config.late.init(z)


def _step(
    config: DescentConfig, logdensity_fn: Any, key: PRNGKey, state: CloudState
) -> tuple[CloudState, CloudInfo]:
    template = particle_template(state.positions)
    geometry = geometry_of(config, state.z)
    batch_key = key if config.stochastic else None

    def scores_at(table):
        return score_particles(logdensity_fn, template, table, batch_key)

    def score_fn(z):
        return geometry.pullback(metric, scores_at(geometry.from_z(metric, z)).gradients)

    # Score the particles
    table = ravel_particles(state.positions)
    _, scores, valid = scores_at(table)
    scores = jnp.where(valid[:, None], scores, 0)
    virial = masked_mean(valid, (table - masked_mean(valid, table)) * scores)

    # Refresh the metric and restart the bets, if due
    restarted, state = _restart(config, geometry, state, valid, virial)
    metric, z = state.metric, state.z

    # Direction in z
    kernel, square = _kernel(config, z, valid, state.step)
    direction = config.direction_fn(kernel, z, geometry.pullback(metric, scores), valid, score_fn)
    direction = jnp.where(
        valid[:, None], direction, jnp.nan
    )  # NaN freezes the bets of particles without a score

    # Bet and move
    status = _status(table, valid, state.spread)
    move, bets = _bet(config, state.bets, direction, z, state.settled)
    z = z + jnp.where(status == Status.OK, move, 0)
    new = state._replace(
        positions=unravel_particles(template, geometry.from_z(metric, z)),
        z=z,
        bets=bets,
        step=state.step + 1,
        age=state.age + 1,
    )
    info = CloudInfo(
        direction_norm=jnp.sqrt(jnp.sum(masked_mean(valid, direction**2))),
        virial=virial,
        squared_bandwidth=square,
        restarted=restarted,
        num_nonfinite=jnp.sum(~valid).astype(jnp.int32),
        status=status,
    )
    return new, info


def _restart(
    config: DescentConfig, geometry: Any, state: CloudState, valid: Bool[Array, " N"], virial: Array
) -> tuple[Array, CloudState]:
    """Return whether a restart is due, and the state, then with a refreshed metric and new bets."""
    if not geometry.restarts:
        return jnp.array(False), state

    def refresh():
        new = geometry.refresh(state.metric, state.z, valid)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new)]))
        metric, z = select(finite, new, (state.metric, state.z))
        return metric, z, _init_bets(config, z)

    stale = geometries.is_stale(state.z, valid, share=getattr(geometry, "stale_share", 0.0))
    # A cloud with no more particles than dimensions stays too narrow and never settles: its epochs double nevertheless.
    due = geometries.is_due(state.age, state.settled | (state.z.shape[1] >= state.z.shape[0]))
    misfit = geometries.is_stale(state.z, valid, _FIT) | jnp.any(jnp.abs(virial + 1) > _VIRIAL)
    settled = jnp.where(due, (state.age >= _SWITCH) & ~misfit, state.settled) & ~stale
    metric, z, bets = jax.lax.cond(stale | due, refresh, lambda: (state.metric, state.z, state.bets))
    age = jnp.where(stale, 0, state.age)
    return stale | due, state._replace(metric=metric, z=z, bets=bets, age=age, settled=settled)


def _kernel(config: DescentConfig, z: Array, valid: Array, step: Array) -> tuple[Any, Array]:
    """Return the kernel of this step, and its squared bandwidth."""
    if config.bandwidth == "fixed":
        return config.kernel, jnp.ones((), z.dtype)
    square = bandwidths.squared_bandwidth(config.bandwidth, z, valid, step)
    return bandwidths.scaled_kernel(config.kernel, square), square


def _bet(config: DescentConfig, bets: Any, direction: Array, z: Array, settled: Array) -> tuple[Array, Any]:
    """Return the move of z and the states of the bets, with finite values only, as any optax transformation may bet."""
    gradient = -direction  # of a loss
    zeros = jnp.zeros_like(gradient)

    def update(bet, state):
        move, new = bet.update(gradient, state, z)
        return _finite_or(move, zeros), jax.tree.map(_finite_or, new, state)

    if config.late is None:
        move, early_state = update(config.early, bets[0])
        return move, (early_state, None)
    late = config.late

    def bet_early():
        move, new = update(config.early, bets[0])
        return move, (new, bets[1])

    def bet_late():
        move, new = update(late, bets[1])
        return move, (bets[0], new)

    return jax.lax.cond(settled, bet_late, bet_early)


def _finite_or(new: Array, old: Array) -> Array:
    return jnp.where(jnp.isfinite(new), new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new


def _status(table: Array, valid: Array, initial_spread: Array) -> Array:
    """Return OK if the cloud may move: some particle has a score, and the cloud has not grown without limit."""
    spread = geometries.moments(table, valid)[1]
    grown = jnp.any(spread > _MAX_GROWTH * jnp.where(initial_spread > 0, initial_spread, jnp.inf))
    failed = grown | ~jnp.any(valid)
    return jnp.where(failed, jnp.int32(Status.NON_FINITE), jnp.int32(Status.OK))
