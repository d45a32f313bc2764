r"""Particles that follow a direction by a bet, in the coordinates of their own cloud: what every coin sampler shares.

One step: log densities and scores of all particles; the metric refreshed where that is due, which restarts the bet;
scores and distances in z; bandwidth and direction there; the bet turns the direction into a move of z; positions are
:math:`c + B z`. Everything in z is free of units, so no setting has one.

The bet is an elementwise coin until the cloud has settled: 64 steps without a stale metric, and at a restart spreads
of z within a quarter of 1 and virials within a half of -1. From there on it is distance over gradients, one rate for
the whole cloud, which averages the noise of minibatches better; the coin is better while some particles are far away.

The geometry does most of the work: with it several bets reach nearly the same accuracy, without it none is free of
scale. What the bet adds is that no rate has to be found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer import betting
from probinfer.coin.cloud import bandwidth as bandwidths
from probinfer.coin.cloud import geometry as geometries
from probinfer.coin.cloud import table as cloud
from probinfer.coin.cloud.geometry import Diagonal, Full, Metric
from probinfer.coin.cloud.low_rank import LowRank
from probinfer.core.algorithms import Algorithm, algorithm, as_partial
from probinfer.core.binding import StochasticLogDensity
from probinfer.core.errors import shortened
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Bool, PRNGKey, field, pytree

__all__ = [
    "CloudInfo",
    "CloudState",
    "Rule",
    "choose_geometry",
    "descent",
    "geometry_of",
]

_SWITCH = 64  # steps without a stale metric, before the late bet
_FIT, _VIRIAL = 1.25, 0.5  # how far spreads and virials may be off for the late bet
_UNIT = 0.1  # first bet, in standard deviations of the cloud
_GROWTH = 1e9
_LARGEST_FULL = 1024


class CloudState(NamedTuple):
    """Where a cloud stands.

    ``positions`` is the tree of the particles; ``z`` (N, d) and ``metric`` are the same in the coordinates of the
    cloud. ``bets`` are the states of the early and the late bet. ``step`` counts the steps, ``age`` those since the
    metric was last stale; ``settled`` says that the late bet plays. ``spread`` (d,) are the standard deviations at the
    start.
    """

    positions: ArrayTree
    z: Array
    metric: Metric
    bets: Any
    step: Array
    age: Array
    settled: Array
    spread: Array


class CloudInfo(NamedTuple):
    r"""Report of a step, of the cloud before it moved.

    ``direction_norm`` is the root mean square over particles of the length of the direction in z. ``virial`` (d,) is
    the mean of :math:`(x_k - \bar x_k) s_k`, -1 where the cloud is right, nearer to 0 where it is too narrow.
    ``squared_bandwidth`` is h, in z. ``restarted`` says whether the metric was refreshed. ``num_nonfinite`` counts the
    particles without a finite log density and score, which did not move. ``status`` is ``NON_FINITE`` where none has
    one, or where the cloud has grown nine orders of magnitude beyond its start and nothing holds it: a flat or improper
    density; the cloud then stands still.
    """

    direction_norm: Array
    virial: Array
    squared_bandwidth: Array
    restarted: Array
    num_nonfinite: Array
    status: Array


@pytree
class Rule:
    """What a step needs beside the log density and the state."""

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
    """Return the algorithm that follows a direction by a bet.

    Args:
        logdensity_fn: log density of one position, or a ``StochasticLogDensity``: one batch a step for all particles.
        direction_fn: ``direction_fn(kernel, z (N, d), scores (N, d), keep (N,), score_fn) -> (N, d)``, in the
            coordinates of the cloud; ``score_fn(z)`` are the scores elsewhere (for Hessian products by ``jax.jvp``).
            Rows of particles that are not kept do not matter.
        kernel: its lengthscale is in units of the bandwidth, unless ``bandwidth`` is "fixed".
        geometry: ``Identity()``, ``Diagonal()``, ``LowRank()`` or ``Full()``; None: see ``choose_geometry``.
        bet: any optax transformation, of gradients of a loss in z; None: an elementwise coin until the cloud has
            settled, then distance over gradients, both of unit 0.1.
        bandwidth: "median", "published" or "fixed".

    Returns:
        ``init(positions) -> CloudState`` with leaves (N, ...), and ``step(key, state) -> (CloudState, CloudInfo)``.

    Raises:
        TypeError: ``logdensity_fn`` is no function; a kernel without a lengthscale; no geometry; a ``bet`` that is no
            optax transformation; from ``init``: positions that are not floating point.
        ValueError: an unknown bandwidth rule; from ``init``: positions that are no cloud, or have no spread.
    """
    if not callable(logdensity_fn):
        raise TypeError(
            f"logdensity_fn must be a function of one position, got {shortened(logdensity_fn)}; of a target: "
            "target.logdensity_fn"
        )
    bandwidths.check_rule(kernel, bandwidth)
    parts = ("restarts", "refresh", "from_z")
    if isinstance(geometry, type) or (
        geometry is not None and not all(hasattr(geometry, name) for name in parts)
    ):
        raise TypeError(
            "geometry must be coin.Identity(), coin.Diagonal(), coin.LowRank(), coin.Full() or None, got "
            f"{shortened(geometry)}"
        )
    early, late = (_bound(bet), None) if bet is not None else _default_bets()
    stochastic = isinstance(logdensity_fn, StochasticLogDensity)
    rule = Rule(as_partial(direction_fn), kernel, geometry, early, late, bandwidth, stochastic)
    return algorithm(_init, _step, rule, as_partial(logdensity_fn))


def _default_bets() -> tuple[Any, Any]:
    return betting.coin(unit=_UNIT), betting.fuse(unit=_UNIT, particles=True)


def _bound(bet: Any) -> optax.GradientTransformation:
    if not (callable(getattr(bet, "init", None)) and callable(getattr(bet, "update", None))):
        raise TypeError(
            f"bet must be an optax transformation with init and update, got {shortened(bet)}; for example "
            "betting.coin(unit=0.5)"
        )
    return optax.GradientTransformation(as_partial(bet.init), as_partial(bet.update))


def _init(rule: Rule, logdensity_fn: Any, positions: ArrayTree) -> CloudState:
    cloud.check_positions(positions)
    positions = jax.tree.map(jnp.asarray, positions)
    cloud.check_spread(positions, every=getattr(rule.geometry, "restarts", True))
    return _begin(rule, positions)


@jax.jit
def _begin(rule: Rule, positions: ArrayTree) -> CloudState:
    table = cloud.ravel(positions)
    shape = geometry_of(rule, table)
    everyone = jnp.ones(table.shape[0], bool)
    metric, z = shape.start(table, everyone)
    spread = geometries.moments(table, everyone)[1]
    none = jnp.zeros((), jnp.int32)
    return CloudState(positions, z, metric, _fresh_bets(rule, z), none, none, jnp.zeros((), bool), spread)


def geometry_of(rule: Rule, table: Array) -> Any:
    """Return the geometry that a rule uses for a table (N, d)."""
    return (
        choose_geometry(*table.shape, stochastic=rule.stochastic) if rule.geometry is None else rule.geometry
    )


def choose_geometry(num_particles: int, num_dims: int, *, stochastic: bool = False) -> Any:
    """Return the richest geometry that so many particles can estimate.

    Args:
        num_particles: N; with more than dimensions: ``Full()``, up to 1024 dimensions.
        num_dims: d.
        stochastic: where it is not full: ``Diagonal()``, as noise shows directions that are none; else ``LowRank()``.
    """
    if num_dims < num_particles and num_dims <= _LARGEST_FULL:
        return Full()
    return Diagonal() if stochastic else LowRank()


def _fresh_bets(rule: Rule, z: Array) -> Any:
    return rule.early.init(z), None if rule.late is None else rule.late.init(z)


def _step(rule: Rule, logdensity_fn: Any, key: PRNGKey, state: CloudState) -> tuple[CloudState, CloudInfo]:
    like = cloud.like_one(state.positions)
    shape = geometry_of(rule, state.z)
    batch = key if rule.stochastic else None

    def scores_at(table):
        return cloud.scores_of(logdensity_fn, like, table, batch)

    table = cloud.ravel(state.positions)
    _, scores, valid = scores_at(table)
    scores = jnp.where(valid[:, None], scores, 0)
    virial = cloud.masked_mean(valid, (table - cloud.masked_mean(valid, table)) * scores)
    restarted, state = _restart(rule, shape, state, valid, virial)
    metric, z = state.metric, state.z
    pulled = shape.pull(metric, scores)
    kernel, square = _kernel(rule, z, valid, state.step)
    direction = rule.direction_fn(
        kernel, z, pulled, valid, lambda z: shape.pull(metric, scores_at(shape.from_z(metric, z)).gradients)
    )
    direction = jnp.where(valid[:, None], direction, jnp.nan)
    status = _status(table, valid, state.spread)
    move, bets = _bet(rule, state.bets, direction, z, state.settled)
    z = z + jnp.where(status == Status.OK, move, 0)
    new = state._replace(
        positions=cloud.unravel(like, shape.from_z(metric, z)),
        z=z,
        bets=bets,
        step=state.step + 1,
        age=state.age + 1,
    )
    info = CloudInfo(
        direction_norm=jnp.sqrt(jnp.sum(cloud.masked_mean(valid, direction**2))),
        virial=virial,
        squared_bandwidth=square,
        restarted=restarted,
        num_nonfinite=jnp.sum(~valid).astype(jnp.int32),
        status=status,
    )
    return new, info


def _restart(
    rule: Rule, shape: Any, state: CloudState, valid: Bool[Array, " N"], virial: Array
) -> tuple[Array, CloudState]:
    """Refresh the metric and forget the bets where that is due; say whether it was."""
    if not shape.restarts:
        return jnp.array(False), state

    def renew():
        new = shape.refresh(state.metric, state.z, valid)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new)]))
        metric, z = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (state.metric, state.z))
        return metric, z, _fresh_bets(rule, z)

    stale = geometries.is_stale(state.z, valid, share=getattr(shape, "stale_share", 0.0))
    # A cloud of no more particles than dimensions is narrow for good and never settles: its epochs double all the same.
    due = geometries.is_due(state.age, state.settled | (state.z.shape[1] >= state.z.shape[0]))
    loose = geometries.is_stale(state.z, valid, _FIT) | jnp.any(jnp.abs(virial + 1) > _VIRIAL)
    settled = jnp.where(due, (state.age >= _SWITCH) & ~loose, state.settled) & ~stale
    metric, z, bets = jax.lax.cond(stale | due, renew, lambda: (state.metric, state.z, state.bets))
    age = jnp.where(stale, 0, state.age)
    return stale | due, state._replace(metric=metric, z=z, bets=bets, age=age, settled=settled)


def _kernel(rule: Rule, z: Array, valid: Array, step: Array) -> tuple[Any, Array]:
    """The kernel of this step, and its squared bandwidth."""
    if rule.bandwidth == "fixed":
        return rule.kernel, jnp.ones((), z.dtype)
    square = bandwidths.squared_bandwidth(rule.bandwidth, z, valid, step)
    return bandwidths.scaled_kernel(rule.kernel, square), square


def _bet(rule: Rule, bets: Any, direction: Array, z: Array, settled: Array) -> tuple[Array, Any]:
    """The move of z; the bets see gradients of a loss, and nothing that is not finite enters moves or states."""
    loss = -direction
    still = jnp.zeros_like(loss)

    def place(bet, state):
        move, new = bet.update(loss, state, z)
        return _finite_or(move, still), jax.tree.map(_finite_or, new, state)

    if rule.late is None:
        move, early = place(rule.early, bets[0])
        return move, (early, None)
    late = rule.late

    def now_early():
        move, new = place(rule.early, bets[0])
        return move, (new, bets[1])

    def now_late():
        move, new = place(late, bets[1])
        return move, (bets[0], new)

    return jax.lax.cond(settled, now_late, now_early)


def _finite_or(new: Array, old: Array) -> Array:
    return jnp.where(jnp.isfinite(new), new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new


def _status(table: Array, valid: Array, spread: Array) -> Array:
    """Whether the cloud may move: some particle has a score, and the cloud has not grown without limit."""
    now = geometries.moments(table, valid)[1]
    lost = jnp.any(now > _GROWTH * jnp.where(spread > 0, spread, jnp.inf))
    bad = lost | ~jnp.any(valid)
    return jnp.where(bad, jnp.int32(Status.NON_FINITE), jnp.int32(Status.OK))
