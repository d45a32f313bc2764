r"""Particles that repel one another like charges, under inequality constraints, without a learning rate.

The energy :math:`\sum_{ij} \phi(x_i - x_j) (p(x_i) p(x_j))^{-\alpha}` with the Riesz kernel
:math:`\phi(r) = |r|^{-s}`, :math:`s = 2 \alpha d`, is least, for many particles, where they are distributed like p. It
needs p at the particles only, and no bandwidth. Constraints :math:`g(x) \le 0` are kept by a dynamic barrier: p may be
defined beyond them, and so may the start.
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
from probinfer.coin.constrained.barrier import nearest_move
from probinfer.core.algorithms import Algorithm, algorithm, as_partial
from probinfer.core.errors import shortened
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Bool, Float, PRNGKey, pytree
from probinfer.kernels.stationary import squared_distances

__all__ = ["MIEDInfo", "MIEDState", "mied", "riesz_direction"]

_UNIT = 0.1
_POWER = 0.5  # alpha: 0.5 or more for the limit to be p
_SINGULAR = 1e-4
_DIAGONAL = 1.3
_SHARE = 0.5  # kappa of the barrier
_SLACK = 1e-6  # violations up to this share of the slope times a standard deviation count as none


class MIEDState(NamedTuple):
    """Where the particles stand: ``positions``, their coordinates ``z`` (N, d) in the ``metric``, ``bet``, ``step``."""

    positions: ArrayTree
    z: Array
    metric: Metric
    bet: Any
    step: Array


class MIEDInfo(NamedTuple):
    """Report of a step, of the particles after it.

    ``log_energy`` (before the move; it falls up to a constant), ``feasible``, the fraction of particles that violate no
    constraint by more than a millionth of the cloud's width, ``violation``, the largest value of g (minus infinity
    without constraints), ``num_nonfinite`` and ``restarted`` as in ``CloudInfo``. ``status``: ``NON_FINITE`` where no
    particle has a score, else ``OK``.
    """

    log_energy: Array
    feasible: Array
    violation: Array
    num_nonfinite: Array
    restarted: Array
    status: Array


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

    The direction is projected so that it does not drive particles through a wall, and so is the move that the bet makes
    of it: to first order a step uses up at most half of the distance to a wall, and takes away half of a violation. A
    start outside is therefore brought in, at a geometric rate; curved constraints may be violated a little on the way,
    and ``info.violation`` says by how much. Few particles repel one another against the walls: near a wall the density
    of a small cloud is too high.

    Args:
        logdensity_fn: log density of one position (a tree); need not be zero outside the constraints.
        constraint_fn: ``g(position) -> (m,)`` or (), at most zero where the position is allowed; None: no constraint.
        geometry: ``coin.Diagonal()`` (None), ``coin.Full()`` or ``coin.Identity()``.
        bet: an optax transformation in the coordinates of the geometry. None: ``betting.coin(unit=0.1)``.

    Returns:
        ``init(positions) -> MIEDState`` with leaves (N, ...), and ``step(key, state) -> (MIEDState, MIEDInfo)``. Memory
        O(N² + N m d).

    Raises:
        TypeError: functions that are none; from ``init``: positions that are not floating point.
        ValueError: from ``init``: positions that are no cloud or have no spread; a constraint that is not a vector.

    References:
        Li, Liu, Korba, Yurochkin and Solomon (2023), "Sampling with mollified interaction energy descent"; Sharrock,
        Mackey and Nemeth (2023), "Learning rate free sampling in constrained domains" (coin MIED).
    """
    if not callable(logdensity_fn):
        raise TypeError(f"logdensity_fn must be a function of one position, got {shortened(logdensity_fn)}")
    if constraint_fn is not None and not callable(constraint_fn):
        raise TypeError(
            f"constraint_fn must be a function of one position with values at most zero where it is allowed, got "
            f"{shortened(constraint_fn)}"
        )
    constraint_fn = None if constraint_fn is None else as_partial(constraint_fn)
    bet = betting.coin(unit=_UNIT) if bet is None else bet
    bet = optax.GradientTransformation(as_partial(bet.init), as_partial(bet.update))
    config = _MIEDConfig(constraint_fn, Diagonal() if geometry is None else geometry, bet)
    return algorithm(_init, _step, config, as_partial(logdensity_fn))


def riesz_direction(
    particles: Float[Array, "N d"],
    log_densities: Float[Array, " N"],
    scores: Float[Array, "N d"],
    mask: Bool[Array, " N"],
) -> tuple[Float[Array, "N d"], Float[Array, ""]]:
    r"""Return minus the gradient of the logarithm of the energy, and that logarithm.

    Args:
        particles: x.
        log_densities: log p.
        scores: their gradients.
        mask: particles that take part.

    Returns:
        The direction, zero where a particle is not kept, and the log energy. In the place of the infinite energy of a
        particle with itself stands that at 1 / (1.3 d)^(1/d) of the distance to its nearest neighbor.

    References:
        Li et al. (2023), section 4.1.
    """
    num, dims = particles.shape
    power = 2 * _POWER * dims + _SINGULAR
    own = jnp.eye(num, dtype=bool)
    squares = squared_distances(particles, particles)
    others = jnp.where(own | ~mask[None, :], jnp.inf, squares)
    nearest = jnp.min(others, axis=1) / (_DIAGONAL * dims) ** (2 / dims)
    squares = jnp.where(own, nearest[:, None], squares)
    tiny = float(jnp.finfo(squares.dtype).tiny)
    squares = jnp.maximum(squares, tiny)
    logs = jnp.where(mask, log_densities, 0)
    terms = -0.5 * power * jnp.log(squares) - _POWER * (logs[:, None] + logs[None, :])
    terms = jnp.where(mask[:, None] & mask[None, :], terms, -jnp.inf)
    log_energy = jax.scipy.special.logsumexp(terms)
    weights = jnp.exp(terms - jnp.where(jnp.isfinite(log_energy), log_energy, 0))
    pull = 2 * _POWER * jnp.sum(weights, axis=1, keepdims=True) * scores
    felt = jnp.where(own, 0, weights / squares)
    return pull + 2 * power * (
        jnp.sum(felt, axis=1, keepdims=True) * particles - felt @ particles
    ), log_energy


def _init(config: _MIEDConfig, logdensity_fn: Any, positions: ArrayTree) -> MIEDState:
    check_positions(positions)
    check_spread(positions, every=config.geometry.restarts)
    positions = jax.tree.map(jnp.asarray, positions)
    if config.constraint_fn is not None:
        found = jax.eval_shape(config.constraint_fn, particle_template(positions))
        if not hasattr(found, "shape") or len(found.shape) > 1:
            raise ValueError(f"constraint_fn must return a vector (m,) or a scalar, got {found}")
    table = ravel_particles(positions)
    metric, z = config.geometry.start(table, jnp.ones(len(table), bool))
    return MIEDState(positions, z, metric, config.bet.init(z), jnp.zeros((), jnp.int32))


def _step(
    config: _MIEDConfig, logdensity_fn: Any, key: PRNGKey, state: MIEDState
) -> tuple[MIEDState, MIEDInfo]:
    template, all_particles = particle_template(state.positions), jnp.ones(len(state.z), bool)
    due = geometries.is_due(state.step) | geometries.is_stale(state.z, all_particles)
    due = due if config.geometry.restarts else jnp.array(False)
    metric, z, bet = jax.lax.cond(due, _renewed, lambda config, s: (s.metric, s.z, s.bet), config, state)
    values, scores, valid = score_particles(logdensity_fn, template, config.geometry.from_z(metric, z))
    scores = config.geometry.pullback(metric, jnp.where(valid[:, None], scores, 0))
    direction, log_energy = riesz_direction(z, values, scores, valid)
    pace = jnp.sqrt(jnp.sum(masked_mean(valid, direction**2)))
    direction = _bounded(config, template, metric, z, direction, pace)
    direction = jnp.where(valid[:, None], direction, jnp.nan)
    move, bet = config.bet.update(-direction, bet, z)
    move = jnp.where(jnp.isfinite(move), move, 0)
    z = z + jnp.where(valid[:, None], _bounded(config, template, metric, z, move, _SHARE), 0)
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
    return MIEDState(positions, z, metric, bet, state.step + 1), info


def _renewed(config: _MIEDConfig, state: MIEDState) -> tuple[Metric, Array, Any]:
    metric, z = config.geometry.refresh(state.metric, state.z, jnp.ones(len(state.z), bool))
    return metric, z, config.bet.init(z)


def _constraints(config: _MIEDConfig, template: ArrayTree, metric: Metric, z: Array) -> tuple[Array, Array]:
    """Values (N, m) of g, and their gradients (N, m, d) in z."""

    def values(row):
        return jnp.atleast_1d(config.constraint_fn(unravel_particles(template, row)))

    table = config.geometry.from_z(metric, z)
    slopes = jax.vmap(jax.jacrev(values))(table)
    scores_in_z = jax.vmap(lambda rows: config.geometry.pullback(metric, rows))(slopes)
    return jax.vmap(values)(table), scores_in_z


def _bounded(
    config: _MIEDConfig, template: ArrayTree, metric: Metric, z: Array, moves: Array, share: Any
) -> Array:
    """The nearest moves that change g by at most ``-share g``, to first order."""
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
