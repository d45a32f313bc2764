r"""Coin sampling inside constraints: the particles move in the dual space of a mirror map, where there are no walls.

The bet is made in coordinates relative to the cloud of the dual variables, as in ``coin.svgd``; the kernel compares
the positions themselves. Every position is inside the constraints by construction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from probinfer import betting
from probinfer.base import Algorithm, Status, algorithm, as_partial
from probinfer.coin import bandwidth as bandwidths
from probinfer.coin import cloud
from probinfer.coin import geometry as geometries
from probinfer.coin.descent import choose_geometry
from probinfer.coin.geometry import Diagonal, Identity, Metric
from probinfer.coin.mirrored_directions import adapted_direction, mirrored_direction
from probinfer.errors import shortened
from probinfer.kernels import InverseMultiquadric
from probinfer.logdensity import StochasticLogDensity
from probinfer.stein import stein_direction
from probinfer.types import Array, ArrayTree, PRNGKey, field, pytree, strong_array

__all__ = ["MirroredInfo", "MirroredState", "mirrored_svgd", "mirrored_svmd"]

_UNIT = 0.1  # first bet, in standard deviations of the dual cloud
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
class _Rule:
    mirror: Any
    kernel: Any
    geometry: Any
    early: optax.GradientTransformation
    late: optax.GradientTransformation | None
    cutoff: Any
    bandwidth: str = field(static=True)
    on: str = field(static=True)
    stochastic: bool = field(static=True)


def mirrored_svgd(
    logdensity_fn: Any,
    mirror: Any,
    *,
    kernel: Any = None,
    geometry: Any = None,
    bet: optax.GradientTransformation | None = None,
    bandwidth: str = "median",
    on: str = "positions",
) -> Algorithm:
    r"""Carry particles inside constraints to a density, along the mirrored Stein direction, without a learning rate.

    .. math:: \frac1N \sum_j k(\theta_j, \theta_i) \nabla_\eta \log \tilde\pi(\eta_j)
        + \nabla^2\psi(\theta_j)^{-1} \nabla_{\theta_j} k(\theta_j, \theta_i)

    The published set-up is ``geometry=coin.Identity(), bet=betting.coin(unit=0.5), bandwidth="published"``.

    Args:
        logdensity_fn: log density of one constrained position (on a simplex with respect to its first D - 1 numbers),
            or a ``StochasticLogDensity``: one batch a step for all particles.
        mirror: ``coin.Simplex()``, ``coin.Orthant()``, ``coin.Box(low, high)``, or ``coin.mirror_from_bijector(...)``
            for the supports of NumPyro.
        kernel: its lengthscale is in units of the root of the bandwidth h. None: ``(1 + r²/h)^(-1/2)``.
        geometry: of the dual cloud, as in ``coin.svgd``.
        bet: an optax transformation in the coordinates of the geometry. None: ``betting.coin(unit=0.1)`` for 64 steps,
            ``betting.fuse(unit=0.1, particles=True)`` from there on.
        bandwidth: "median": h is the median squared distance, a smaller part of it for 32 steps; "published": all of
            it from the start; "fixed": the kernel as it is.
        on: "positions": distances of the kernel are those of the positions, in standard deviations of the cloud where
            the geometry has restarts; "dual": of the relative dual coordinates.

    Returns:
        ``init(positions) -> MirroredState`` with leaves (N, ...) of constrained values, whose ``.positions`` are the
        particles, and ``step(key, state) -> (MirroredState, MirroredInfo)``, for ``pi.run``. Memory O(N² + N D d).

    Raises:
        TypeError: ``logdensity_fn`` is no function, ``mirror`` no mirror, ``kernel`` without a lengthscale; from
            ``init``: positions that are not floating point.
        ValueError: an unknown ``bandwidth`` or ``on``; from ``init``: positions that are no cloud, are on or outside
            the boundary, or have no spread.

    References:
        Shi, Liu and Mackey (2022), "Sampling with mirrored Stein operators", algorithm 1; Sharrock, Mackey and Nemeth
        (2023), "Learning rate free sampling in constrained domains", algorithm 1 (coin MSVGD).
    """
    if on not in ("positions", "dual"):
        raise ValueError(f"on must be one of positions, dual; got {on!r}")
    return _build(logdensity_fn, mirror, kernel, geometry, bet, bandwidth, on, None)


def mirrored_svmd(
    logdensity_fn: Any,
    mirror: Any,
    *,
    kernel: Any = None,
    geometry: Any = None,
    bet: optax.GradientTransformation | None = None,
    bandwidth: str = "median",
    cutoff: float = 0.9,
) -> Algorithm:
    r"""Carry particles inside constraints to a density by a kernel that is adapted to the mirror map.

    .. math:: E\, k^{1/2}(\theta, \theta'') \nabla^2\psi(\theta'') k^{1/2}(\theta'', \theta')

    over the cloud, by one eigendecomposition of an N x N matrix a step. ``mirrored_svgd`` is the one to try first: see
    ``benchmarks/coin_constrained.py``.

    Args:
        logdensity_fn: as in :func:`mirrored_svgd`.
        mirror: ``coin.Simplex()``, ``coin.Orthant()`` or ``coin.Box(low, high)``: it needs a Hessian.
        kernel: as in :func:`mirrored_svgd`.
        geometry: of the dual cloud: ``coin.Diagonal()`` (None) or ``coin.Identity()``.
        bet: an optax transformation in the coordinates of the geometry. None: ``betting.coin(unit=0.1)``.
        bandwidth: as in :func:`mirrored_svgd`.
        cutoff: share of the trace of the Gram matrix that the kept eigenvectors hold; nearer to 1 the direction is
            exact but its noise is larger.

    Returns:
        As :func:`mirrored_svgd`.

    Raises:
        TypeError: as :func:`mirrored_svgd`, and a mirror without a Hessian.
        ValueError: as :func:`mirrored_svgd`, a cutoff outside (0, 1], and a geometry that mixes coordinates: the
            Hessian does that already.

    References:
        Shi, Liu and Mackey (2022), "Sampling with mirrored Stein operators", section 4.3.
    """
    if not 0 < cutoff <= 1:
        raise ValueError(f"cutoff is a share of a trace and must be in (0, 1], got {cutoff}")
    if not hasattr(mirror, "hessian"):
        raise TypeError(
            f"mirrored_svmd needs the Hessian of a mirror map, and a {type(mirror).__name__} has none; use "
            "coin.Simplex(), coin.Orthant(), coin.Box(low, high), or mirrored_svgd"
        )
    geometry = Diagonal() if geometry is None else geometry
    if not isinstance(geometry, (Diagonal, Identity)):
        raise ValueError(
            f"mirrored_svmd takes coin.Diagonal() or coin.Identity(), got {shortened(geometry)}: its kernel mixes the "
            "coordinates already"
        )
    return _build(logdensity_fn, mirror, kernel, geometry, bet, bandwidth, "adapted", strong_array(cutoff))


def _build(
    logdensity_fn: Any,
    mirror: Any,
    kernel: Any,
    geometry: Any,
    bet: Any,
    bandwidth: str,
    on: str,
    cutoff: Any,
) -> Algorithm:
    if not callable(logdensity_fn):
        raise TypeError(
            f"logdensity_fn must be a function of one constrained position, got {shortened(logdensity_fn)}"
        )
    if not all(hasattr(mirror, name) for name in ("primal", "dual", "log_det", "inside")):
        raise TypeError(
            f"mirror must be a mirror map, got {shortened(mirror)}; for example coin.Simplex(), or "
            "coin.mirror_from_bijector(constraint, example)"
        )
    kernel = InverseMultiquadric() if kernel is None else kernel
    bandwidths.check_rule(kernel, bandwidth)
    early = betting.coin(unit=_UNIT) if bet is None else bet
    early = optax.GradientTransformation(as_partial(early.init), as_partial(early.update))
    late = betting.fuse(unit=_UNIT, particles=True) if bet is None and on != "adapted" else None
    stochastic = isinstance(logdensity_fn, StochasticLogDensity)
    rule = _Rule(mirror, kernel, geometry, early, late, cutoff, bandwidth, on, stochastic)
    return algorithm(_init, _step, rule, as_partial(logdensity_fn))


def _init(rule: _Rule, logdensity_fn: Any, positions: ArrayTree) -> MirroredState:
    cloud.check_positions(positions)
    cloud.check_spread(positions, every=False)
    positions = jax.tree.map(jnp.asarray, positions)
    _check_inside(rule.mirror, positions)
    eta = jax.vmap(rule.mirror.dual)(positions)
    geometry = _geometry(rule, eta)
    cloud.check_spread(eta, every=geometry.restarts)
    metric, z = geometry.start(eta, jnp.ones(len(eta), bool))
    scale = _scale(rule, geometry, positions)
    return MirroredState(positions, z, metric, scale, _fresh(rule, z), jnp.zeros((), jnp.int32))


def _geometry(rule: _Rule, table: Array) -> Any:
    return choose_geometry(*table.shape) if rule.geometry is None else rule.geometry


def _fresh(rule: _Rule, z: Array) -> tuple:
    """States of the bets without outcomes."""
    return tuple(bet.init(jnp.zeros_like(z)) for bet in (rule.early, rule.late) if bet is not None)


def _scale(rule: _Rule, geometry: Any, positions: ArrayTree) -> Array:
    """Standard deviations of the positions; ones where they keep their units or have no spread."""
    spread = jnp.std(cloud.ravel(positions), axis=0)
    relative = geometry.restarts and rule.on == "positions"
    return jnp.where((spread > 0) & relative, spread, jnp.ones_like(spread))


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


def _step(rule: _Rule, logdensity_fn: Any, key: PRNGKey, state: MirroredState) -> tuple:
    everyone = jnp.ones(len(state.z), bool)
    due = geometries.is_due(state.step) | geometries.is_stale(state.z, everyone)
    due = due if _geometry(rule, state.z).restarts else jnp.array(False)
    metric, z, scale, bets = jax.lax.cond(due, _renewed, _kept, rule, state)
    geometry = _geometry(rule, z)
    eta = geometry.from_z(metric, z)
    _, scores, valid = _scores(rule, logdensity_fn, key, eta)
    scores = jnp.where(valid[:, None], scores, 0)
    direction, square = _direction(rule, state.step, metric, z, eta, scale, scores, valid)
    direction = jnp.where(valid[:, None], direction, jnp.nan)
    move, bets = _bet(rule, bets, direction, state.step)
    z = z + jnp.where(jnp.isfinite(move), move, 0)
    moved = jax.vmap(rule.mirror.primal)(geometry.from_z(metric, z))
    positions = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state.positions)
    info = MirroredInfo(
        direction_norm=jnp.sqrt(jnp.sum(cloud.masked_mean(valid, direction**2))),
        virial=cloud.masked_mean(valid, (eta - cloud.masked_mean(valid, eta)) * scores),
        squared_bandwidth=square,
        restarted=due,
        num_nonfinite=jnp.sum(~valid).astype(jnp.int32),
        feasible=jnp.mean(jax.vmap(rule.mirror.inside)(positions).astype(z.dtype)),
        status=jnp.where(jnp.any(valid), jnp.int32(Status.OK), jnp.int32(Status.NON_FINITE)),
    )
    return MirroredState(positions, z, metric, scale, bets, state.step + 1), info


def _kept(rule: _Rule, state: MirroredState) -> tuple[Metric, Array, Array, Any]:
    return state.metric, state.z, state.scale, state.bets


def _renewed(rule: _Rule, state: MirroredState) -> tuple[Metric, Array, Array, Any]:
    geometry = _geometry(rule, state.z)
    metric, z = geometry.refresh(state.metric, state.z, jnp.ones(len(state.z), bool))
    return metric, z, _scale(rule, geometry, state.positions), _fresh(rule, z)


def _bet(rule: _Rule, bets: tuple, direction: Array, step: Array) -> tuple[Array, tuple]:
    """The move of z: by the early bet up to step 64, by the late one from there on."""
    loss, still = -direction, jnp.zeros_like(direction)
    if rule.late is None:
        move, state = rule.early.update(loss, bets[0], still)
        return move, (state,)
    late = rule.late

    def now_early():
        move, state = rule.early.update(loss, bets[0], still)
        return move, (state, bets[1])

    def now_late():
        move, state = late.update(loss, bets[1], still)
        return move, (bets[0], state)

    return jax.lax.cond(step < _SWITCH, now_early, now_late)


def _scores(rule: _Rule, logdensity_fn: Any, key: PRNGKey, eta: Array) -> cloud.Scores:
    """Log densities of the dual coordinates and their gradients."""

    def value(*batch_and_row: Any) -> Array:
        *batch, row = batch_and_row
        return logdensity_fn(*batch, rule.mirror.primal(row)) + rule.mirror.log_det(row)

    like = jax.ShapeDtypeStruct(eta.shape[1:], eta.dtype)
    return cloud.scores_of(value, like, eta, key if rule.stochastic else None)


def _direction(
    rule: _Rule, step: Array, metric: Metric, z: Array, eta: Array, scale: Array, scores: Array, valid: Array
) -> tuple[Array, Array]:
    """The direction in z, and the squared bandwidth."""

    def flat(row):
        return cloud.ravel(jax.tree.map(lambda leaf: leaf[None], rule.mirror.primal(row)))[0] / scale

    pull = _geometry(rule, z).pull
    points = z if rule.on == "dual" else jax.vmap(flat)(eta)
    kernel, square = _kernel(rule, points, valid, step)
    if rule.on == "dual":
        return stein_direction(kernel, z, pull(metric, scores), valid), square
    jacobians = jax.vmap(jax.jacfwd(flat))(eta)
    if rule.on == "positions":
        return pull(metric, mirrored_direction(kernel, points, jacobians, scores, valid)), square
    found = adapted_direction(
        kernel, points, jacobians, scores, valid, lambda v: jax.vmap(rule.mirror.hessian)(eta, v), rule.cutoff
    )
    return pull(metric, found), square


def _kernel(rule: _Rule, points: Array, valid: Array, step: Array) -> tuple[Any, Array]:
    """The kernel of this step, and its squared bandwidth."""
    if rule.bandwidth == "fixed":
        return rule.kernel, jnp.ones((), points.dtype)
    late = jnp.asarray(_LONG, jnp.int32) if rule.bandwidth == "published" else step
    square = bandwidths.squared_bandwidth("median", points, valid, late)
    return bandwidths.scaled_kernel(rule.kernel, square), square
