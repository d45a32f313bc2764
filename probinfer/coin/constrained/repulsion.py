r"""Mollified interaction energy descent: particles that repel one another like charges, under inequality constraints.

The energy :math:`\sum_{ij} \phi(x_i - x_j) (p(x_i) p(x_j))^{-\alpha}` with the Riesz kernel
:math:`\phi(r) = |r|^{-s}`, :math:`s = 2 \alpha d`, is minimal, for many particles, if they are distributed like p. It
needs p at the particles only, no bandwidth and, with bets, no learning rate. A dynamic barrier enforces constraints
:math:`g(x) \le 0`: p may be positive beyond them, and the start may be there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer import betting
from probinfer.coin.cloud import geometry as geometries
from probinfer.coin.cloud.geometry import Diagonal, Metric
from probinfer.coin.cloud.particles import (
    check_positions,
    check_spread,
    masked_mean,
    particle_template,
    ravel_particles,
    score_particles,
    unravel_particles,
)
from probinfer.coin.cloud_descent import bind_bet
from probinfer.coin.constrained.barrier import nearest_move
from probinfer.core.algorithms import Algorithm, algorithm, as_partial
from probinfer.core.errors import shortened
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, PRNGKey, pytree
from probinfer.kernels.stationary import squared_distances

__all__ = ["MIEDInfo", "MIEDState", "mied", "riesz_direction"]

_UNIT = 0.1
_POWER = 0.5  # alpha: 0.5 or more for the limit to be p
_SINGULAR = 1e-4  # added to s, which makes the energy singular
_DIAGONAL = 1.3  # see riesz_direction
_BARRIER_SHARE = 0.5  # kappa of the barrier
_SLACK = 1e-6  # violations up to this share of the slope times a standard deviation are ignored


class MIEDState(NamedTuple):
    """State of the particles.

    Attributes:
        positions: the particles, leaves (N, ...).
        z: the particles in the coordinates of the cloud.
        metric: these coordinates, x = c + B z.
        bet: state of the bet.
        step: number of steps.
    """

    positions: ArrayTree
    z: Float[Array, "N d"]
    metric: Metric
    bet: Any
    step: Int[Array, ""]


class MIEDInfo(NamedTuple):
    """Report of a step: of the particles after the move, but for ``log_energy`` and ``num_nonfinite``.

    Attributes:
        log_energy: log of the energy before the move, up to a constant.
        feasible: share of the particles that violate no constraint by more than a millionth of the cloud's width.
        violation: the largest value of g; minus infinity without constraints.
        num_nonfinite: number of particles without a finite log density and score, which did not move.
        restarted: whether the metric was refreshed.
        status: ``NON_FINITE`` if no particle has a score, otherwise ``OK``.
    """

    log_energy: Float[Array, ""]
    feasible: Float[Array, ""]
    violation: Float[Array, ""]
    num_nonfinite: Int[Array, ""]
    restarted: Bool[Array, ""]
    status: Int[Array, ""]


@pytree
class _MIEDConfig:
    constraint_fn: Any
    geometry: Any
    bet: optax.GradientTransformation


def mied(
    logdensity_fn: Any,
    constraint_fn: Any | None = None,
    *,
    geometry: Any = None,
    bet: optax.GradientTransformation | None = None,
) -> Algorithm:
    r"""Carry particles down the mollified interaction energy, inside :math:`g(x) \le 0`.

    The direction is projected so that it does not drive particles through a boundary, and so is the move by the bet: to
    first order a step uses up at most half of the distance to a boundary, and removes half of a violation. Particles
    that start outside therefore move inside at a geometric rate; curved constraints may be slightly violated on the
    way, as ``info.violation`` reports. Few particles push one another against a boundary, so that the density of a
    small cloud is too high there.

    Args:
        logdensity_fn: log density of one position (a tree); the density need not be zero outside the constraints.
        constraint_fn: ``g(position) -> (m,)`` or (), at most zero if the position is allowed; None: no constraint.
        geometry: ``coin.Diagonal()`` (None), ``coin.Full()`` or ``coin.Identity()``.
        bet: an optax transformation in the coordinates of the geometry. None: ``betting.coin(unit=0.1)``.

    Returns:
        ``init(positions) -> MIEDState`` with leaves (N, ...), and ``step(key, state) -> (MIEDState, MIEDInfo)``. Memory
        O(N² + N m d).

    Raises:
        TypeError: ``logdensity_fn`` or ``constraint_fn`` is not a function, or ``bet`` is not an optax transformation;
            from ``init``: the positions are not floating point.
        ValueError: From ``init``: the positions are not a cloud or have no spread, or the constraint is not a vector.

    References:
        Li, Liu, Korba, Yurochkin and Solomon (2023), "Sampling with mollified interaction energy descent"; Sharrock,
        Mackey and Nemeth (2023), "Learning rate free sampling in constrained domains" (coin MIED).
    """
    if not callable(logdensity_fn):
        raise TypeError(f"logdensity_fn must be a function of one position, got {shortened(logdensity_fn)}")
    if constraint_fn is not None and not callable(constraint_fn):
        raise TypeError(
            f"constraint_fn must be a function of one position with values at most zero if it is allowed, got "
            f"{shortened(constraint_fn)}"
        )
    config = _MIEDConfig(
        constraint_fn=None if constraint_fn is None else as_partial(constraint_fn),
        geometry=Diagonal() if geometry is None else geometry,
        bet=bind_bet(betting.coin(unit=_UNIT) if bet is None else bet),
    )
    return algorithm(_init, _step, config, as_partial(logdensity_fn))


def riesz_direction(
    particles: Float[Array, "N d"],
    log_densities: Float[Array, " N"],
    scores: Float[Array, "N d"],
    mask: Bool[Array, " N"],
) -> tuple[Float[Array, "N d"], Float[Array, ""]]:
    r"""Return minus the gradient of the logarithm of the energy, and this logarithm.

    Args:
        particles: x.
        log_densities: log p.
        scores: gradients of log p.
        mask: which particles count.

    Returns:
        The direction, zero for particles outside the mask, and the log energy. The infinite energy of a particle with
        itself is replaced by that at 1 / (1.3 d)^(1/d) of the distance to its nearest neighbor.

    References:
        Li et al. (2023), section 4.1.
    """
    num_particles, num_dims = particles.shape
    exponent = 2 * _POWER * num_dims + _SINGULAR

    # Squared distances, with a substitute on the diagonal
    diagonal = jnp.eye(num_particles, dtype=bool)
    squares = squared_distances(particles, particles)
    others = jnp.where(diagonal | ~mask[None, :], jnp.inf, squares)
    nearest = jnp.min(others, axis=1) / (_DIAGONAL * num_dims) ** (2 / num_dims)
    squares = jnp.where(diagonal, nearest[:, None], squares)
    squares = jnp.maximum(squares, float(jnp.finfo(squares.dtype).tiny))

    # Log energy, in log space because the terms differ by many orders of magnitude
    logs = jnp.where(mask, log_densities, 0)
    terms = -0.5 * exponent * jnp.log(squares) - _POWER * (logs[:, None] + logs[None, :])
    terms = jnp.where(mask[:, None] & mask[None, :], terms, -jnp.inf)
    log_energy = jax.scipy.special.logsumexp(terms)
    weights = jnp.exp(terms - jnp.where(jnp.isfinite(log_energy), log_energy, 0))

    # Attraction to high density, and repulsion of the particles
    attraction = 2 * _POWER * jnp.sum(weights, axis=1, keepdims=True) * scores
    forces = jnp.where(diagonal, 0, weights / squares)
    repulsion = 2 * exponent * (jnp.sum(forces, axis=1, keepdims=True) * particles - forces @ particles)
    return attraction + repulsion, log_energy


def _init(config: _MIEDConfig, logdensity_fn: Any, positions: ArrayTree) -> MIEDState:
    check_positions(positions)
    check_spread(positions, every=config.geometry.restarts)
    positions = jax.tree.map(jnp.asarray, positions)
    if config.constraint_fn is not None:
        value = jax.eval_shape(config.constraint_fn, particle_template(positions))
        if not hasattr(value, "shape") or len(value.shape) > 1:
            raise ValueError(f"constraint_fn must return a vector (m,) or a scalar, got {value}")
    table = ravel_particles(positions)
    metric, z = config.geometry.start(table, jnp.ones(len(table), bool))
    return MIEDState(
        positions=positions, z=z, metric=metric, bet=config.bet.init(z), step=jnp.zeros((), jnp.int32)
    )


def _step(
    config: _MIEDConfig, logdensity_fn: Any, key: PRNGKey, state: MIEDState
) -> tuple[MIEDState, MIEDInfo]:
    template, all_particles = particle_template(state.positions), jnp.ones(len(state.z), bool)
    due = geometries.is_due(state.step) | geometries.is_stale(state.z, all_particles)
    due = due if config.geometry.restarts else jnp.array(False)
    metric, z, bet = jax.lax.cond(due, _refresh, lambda config, s: (s.metric, s.z, s.bet), config, state)

    # Direction in z, projected with a share of the barrier that scales with the direction
    values, scores, valid = score_particles(logdensity_fn, template, config.geometry.from_z(metric, z))
    scores = config.geometry.pullback(metric, jnp.where(valid[:, None], scores, 0))
    direction, log_energy = riesz_direction(z, values, scores, valid)
    direction_norm = jnp.sqrt(jnp.sum(masked_mean(valid, direction**2)))
    direction = _project(config, template, metric, z, direction, direction_norm)
    direction = jnp.where(
        valid[:, None], direction, jnp.nan
    )  # NaN freezes the bets of particles without a score

    # Bet, and move within the barrier
    move, bet = config.bet.update(-direction, bet, z)
    move = jnp.where(jnp.isfinite(move), move, 0)
    z = z + jnp.where(valid[:, None], _project(config, template, metric, z, move, _BARRIER_SHARE), 0)
    feasible, violation = _feasibility(config, template, metric, z)
    info = MIEDInfo(
        log_energy=log_energy,
        feasible=feasible,
        violation=violation,
        num_nonfinite=jnp.sum(~valid).astype(jnp.int32),
        restarted=due,
        status=jnp.where(jnp.any(valid), jnp.int32(Status.OK), jnp.int32(Status.NON_FINITE)),
    )
    positions = unravel_particles(template, config.geometry.from_z(metric, z))
    return MIEDState(positions=positions, z=z, metric=metric, bet=bet, step=state.step + 1), info


def _refresh(config: _MIEDConfig, state: MIEDState) -> tuple[Metric, Array, Any]:
    metric, z = config.geometry.refresh(state.metric, state.z, jnp.ones(len(state.z), bool))
    return metric, z, config.bet.init(z)


def _constraints(config: _MIEDConfig, template: ArrayTree, metric: Metric, z: Array) -> tuple[Array, Array]:
    """Return the values (N, m) of g, and their gradients (N, m, d) in z."""

    def values(row):
        return jnp.atleast_1d(config.constraint_fn(unravel_particles(template, row)))

    table = config.geometry.from_z(metric, z)
    slopes = jax.vmap(jax.jacrev(values))(table)
    slopes_in_z = jax.vmap(lambda rows: config.geometry.pullback(metric, rows))(slopes)
    return jax.vmap(values)(table), slopes_in_z


def _project(
    config: _MIEDConfig, template: ArrayTree, metric: Metric, z: Array, moves: Array, share: Any
) -> Array:
    """Return the nearest moves that change g by at most ``-share g``, to first order."""
    if config.constraint_fn is None:
        return moves
    values, slopes = _constraints(config, template, metric, z)
    return jax.vmap(nearest_move)(moves, slopes, -share * values)


def _feasibility(config: _MIEDConfig, template: ArrayTree, metric: Metric, z: Array) -> tuple[Array, Array]:
    if config.constraint_fn is None:
        return jnp.ones((), z.dtype), jnp.full((), -jnp.inf, z.dtype)
    values, slopes = _constraints(config, template, metric, z)
    slack = _SLACK * jnp.sqrt(jnp.sum(slopes**2, axis=-1))
    inside = jnp.all(values <= slack, axis=1)
    return jnp.mean(inside.astype(z.dtype)), jnp.max(values)
