r"""Particles that follow a direction by a bet, in the coordinates of their own cloud: what every coin sampler shares.

One step: log densities and scores of all particles; the metric refreshed where that is due, which restarts the bet;
scores and distances in z; bandwidth and direction there; the bet turns the direction into a move of z; positions are
:math:`c + B z`. Everything in z is free of units, so no setting has one.

The geometry does most of the work: with it several bets reach nearly the same accuracy, without it none is free of
scale. What the bet adds is that no rate has to be found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer import betting
from probinfer.base import Algorithm, Status, algorithm, as_partial
from probinfer.coin import bandwidth as bandwidths
from probinfer.coin import cloud
from probinfer.coin import geometry as geometries
from probinfer.coin.geometry import Full, Metric
from probinfer.coin.low_rank import LowRank
from probinfer.errors import shortened
from probinfer.logdensity import StochasticLogDensity
from probinfer.types import Array, ArrayTree, Bool, PRNGKey, field, pytree

__all__ = ["CloudInfo", "CloudState", "choose_geometry", "descent"]

_SWITCH = 64  # from this step on the late bet
_UNIT = 0.1  # first bet, in standard deviations of the cloud
_GROWTH = 1e10
_LARGEST_FULL = 1024


class CloudState(NamedTuple):
    """Where a cloud stands.

    ``positions`` is the tree of the particles; ``z`` (N, d) and ``metric`` are the same in the coordinates of the
    cloud. ``bets`` are the states of the early and the late bet, ``step`` counts the steps, ``spread`` (d,) are the
    standard deviations at the start.
    """

    positions: ArrayTree
    z: Array
    metric: Metric
    bets: Any
    step: Array
    spread: Array


class CloudInfo(NamedTuple):
    r"""Report of a step, of the cloud before it moved.

    ``direction_norm`` is the root mean square over particles of the length of the direction in z. ``virial`` (d,) is
    the mean of :math:`(x_k - \bar x_k) s_k`, -1 where the cloud is right, nearer to 0 where it is too narrow.
    ``squared_bandwidth`` is h, in z. ``restarted`` says whether the metric was refreshed. ``num_nonfinite`` counts the
    particles without a finite log density and score, which did not move. ``status`` is ``NON_FINITE`` where none has
    one, or where the cloud has grown ten orders of magnitude beyond its start and nothing holds it: a flat or improper
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
        geometry: ``Identity()``, ``Diagonal()`` or ``Full()``; None: ``Full()`` where there are more particles than
            dimensions, else ``Diagonal()``.
        bet: any optax transformation, of gradients of a loss in z; None: an elementwise coin for 64 steps, then
            distance over gradients, both of unit 0.1.
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
    if geometry is not None and not all(
        hasattr(geometry, name) for name in ("restarts", "refresh", "from_z")
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
    shape = _geometry(rule, table)
    everyone = jnp.ones(table.shape[0], bool)
    metric, z = shape.start(table, everyone)
    spread = geometries.moments(table, everyone)[1]
    return CloudState(positions, z, metric, _fresh_bets(rule, z), jnp.zeros((), jnp.int32), spread)


def _geometry(rule: Rule, table: Array) -> Any:
    return choose_geometry(*table.shape) if rule.geometry is None else rule.geometry


def choose_geometry(num_particles: int, num_dims: int) -> Any:
    """Return the richest geometry that so many particles can estimate: full, or low-rank above 1024 dimensions or N."""
    return Full() if num_dims < num_particles and num_dims <= _LARGEST_FULL else LowRank()


def _fresh_bets(rule: Rule, z: Array) -> Any:
    still = jnp.zeros_like(z)
    return rule.early.init(still), None if rule.late is None else rule.late.init(still)


def _step(rule: Rule, logdensity_fn: Any, key: PRNGKey, state: CloudState) -> tuple[CloudState, CloudInfo]:
    like = cloud.like_one(state.positions)
    shape = _geometry(rule, state.z)
    batch = key if rule.stochastic else None

    def scores_at(table):
        return cloud.scores_of(logdensity_fn, like, table, batch)

    table = cloud.ravel(state.positions)
    _, scores, valid = scores_at(table)
    scores = jnp.where(valid[:, None], scores, 0)
    restarted, metric, z, bets = _restart(rule, shape, state, valid)
    pulled = shape.pull(metric, scores)
    kernel, square = _kernel(rule, z, valid, state.step)
    direction = rule.direction_fn(
        kernel, z, pulled, valid, lambda z: shape.pull(metric, scores_at(shape.from_z(metric, z)).gradients)
    )
    direction = jnp.where(valid[:, None], direction, jnp.nan)
    status = _status(table, valid, state.spread)
    move, bets = _bet(rule, bets, direction, state.step)
    z = z + jnp.where(status == Status.OK, move, 0)
    moved = cloud.unravel(like, shape.from_z(metric, z))
    info = CloudInfo(
        direction_norm=jnp.sqrt(jnp.sum(cloud.masked_mean(valid, direction**2))),
        virial=cloud.masked_mean(valid, (table - cloud.masked_mean(valid, table)) * scores),
        squared_bandwidth=square,
        restarted=restarted,
        num_nonfinite=jnp.sum(~valid).astype(jnp.int32),
        status=status,
    )
    return CloudState(moved, z, metric, bets, state.step + 1, state.spread), info


def _restart(rule: Rule, shape: Any, state: CloudState, valid: Bool[Array, " N"]) -> tuple:
    """Refresh the metric and forget the bets, where that is due."""
    if not shape.restarts:
        return jnp.array(False), state.metric, state.z, state.bets

    def renew():
        new = shape.refresh(state.metric, state.z, valid)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new)]))
        metric, z = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (state.metric, state.z))
        return metric, z, _fresh_bets(rule, z)

    due = geometries.is_due(state.step) | geometries.is_stale(state.z, valid)
    return due, *jax.lax.cond(due, renew, lambda: (state.metric, state.z, state.bets))


def _kernel(rule: Rule, z: Array, valid: Array, step: Array) -> tuple[Any, Array]:
    """The kernel of this step, and its squared bandwidth."""
    if rule.bandwidth == "fixed":
        return rule.kernel, jnp.ones((), z.dtype)
    square = bandwidths.squared_bandwidth(rule.bandwidth, z, valid, step)
    return bandwidths.scaled_kernel(rule.kernel, square), square


def _bet(rule: Rule, bets: Any, direction: Array, step: Array) -> tuple[Array, Any]:
    """The move of z; the bets see gradients of a loss, and nothing that is not finite enters moves or states."""
    loss = -direction
    still = jnp.zeros_like(loss)

    def place(bet, state):
        move, new = bet.update(loss, state, still)
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

    return jax.lax.cond(step < _SWITCH, now_early, now_late)


def _finite_or(new: Array, old: Array) -> Array:
    return jnp.where(jnp.isfinite(new), new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new


def _status(table: Array, valid: Array, spread: Array) -> Array:
    """Whether the cloud may move: some particle has a score, and the cloud has not grown without limit."""
    now = geometries.moments(table, valid)[1]
    lost = jnp.any(now > _GROWTH * jnp.where(spread > 0, spread, jnp.inf))
    bad = lost | ~jnp.any(valid)
    return jnp.where(bad, jnp.int32(Status.NON_FINITE), jnp.int32(Status.OK))
