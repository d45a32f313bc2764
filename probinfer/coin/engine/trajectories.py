r"""Tests of a cloud by short trajectories from its particles, and by log densities at earlier particles.

Identities of the scores nearly hold for a cloud that has no particle in the tails or in the neck of a funnel, and its
direction vanishes. Trajectories of Hamiltonian Monte Carlo leave the density invariant: from a cloud that represents
it, means and spreads stay; from any other they drift, by their error or a part of it. Each particle takes 16 of them in
the coordinates of the cloud, of 8 leapfrog steps, with random step sizes over a factor of ten for densities whose
scales vary. The second half counts.

Trajectories do not find other modes. Two more tests are cheap: whether some particles are where the density is
negligible compared with the others, and whether an early particle was where the density is high, separated by low
density from all current particles. ``modes`` tests whether the occupied modes hold the right shares of particles.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.coin.cloud.geometry import moments
from probinfer.coin.cloud.particles import masked_mean, particle_template, row_logdensity
from probinfer.coin.cloud.views import logdensity_in_cloud
from probinfer.coin.cloud_descent import CloudState, geometry_of
from probinfer.coin.engine.modes import ModeShares, estimate_mode_shares, unknown_mode_shares
from probinfer.core.algorithms import Algorithm
from probinfer.core.types import Array, Bool, Float, Int, PRNGKey, Scalar
from probinfer.mcmc.hamiltonian import IntegratorState
from probinfer.mcmc.lanes.hmc import hmc_transition

__all__ = [
    "TrajectoryReport",
    "confirms_cloud",
    "describe_drift",
    "describe_misfit",
    "empty_trajectory_report",
    "run_trajectories",
]

_NUM_TRAJECTORIES, _NUM_LEAPFROGS = 16, 8
_MIN_STEP, _MAX_STEP = 0.15, 1.5  # step sizes, in units of the adapted one
_TARGET_ACCEPTANCE = 0.7
_NUM_ERRORS = 2.5  # standard errors that are allowed in addition to each of the next four
_SHIFT, _GROWTH, _OVERALL_GROWTH = 0.15, 1.2, 1.12  # of a cloud that is accepted
_SHARE_FACTOR = 1.5  # of the shares of two modes
_CONFIRM_SHIFT, _CONFIRM_GROWTH, _CONFIRM_ACCEPTANCE = 0.3, 1.3, 0.3  # of a cloud that is confirmed
_NUM_NEAREST, _NUM_POINTS, _MIN_DROP = (
    4,
    7,
    10.0,
)  # particles joined to an early one, points on each line, nats
_MAX_DEPTH_OF_EARLY = 5.0  # nats below the median of the cloud


class TrajectoryReport(NamedTuple):
    """What trajectories did to a cloud.

    Attributes:
        shift: move of the mean, in standard deviations; 0 if the cloud is right.
        growth: ratio of the mean distances from the mean after and before; 1 if the cloud is right.
        errors: standard errors of shift and growth.
        overall_growth: mean growth over coordinates, and its standard error.
        acceptance: acceptance rate of the last trajectories.
        num_lost: number of particles where the density is at most e^-(10 + 2 d) times its median over the cloud.
        depth: nats by which the highest of them is below the median; 0 if there are none.
        num_forsaken: number of early particles of high density in a mode that has no particle now.
        shares: shares of particles and of mass in the modes.
        num_gradients: number of gradients of the log density.
    """

    shift: Float[Array, " d"]
    growth: Float[Array, " d"]
    errors: Float[Array, "2 d"]
    overall_growth: Float[Array, "2"]
    acceptance: Scalar
    num_lost: Int[Array, ""]
    depth: Scalar
    num_forsaken: Int[Array, ""]
    shares: ModeShares
    num_gradients: Int[Array, ""]


def empty_trajectory_report(num_dims: int, dtype: Any) -> TrajectoryReport:
    """Return the report that stands for no trajectories: NaN and zeros."""
    return TrajectoryReport(
        shift=jnp.full(num_dims, jnp.nan, dtype),
        growth=jnp.full(num_dims, jnp.nan, dtype),
        errors=jnp.full((2, num_dims), jnp.nan, dtype),
        overall_growth=jnp.full(2, jnp.nan, dtype),
        acceptance=jnp.full((), jnp.nan, dtype),
        num_lost=jnp.zeros((), jnp.int32),
        depth=jnp.zeros((), dtype),
        num_forsaken=jnp.zeros((), jnp.int32),
        shares=unknown_mode_shares(dtype),
        num_gradients=jnp.zeros((), jnp.int32),
    )


def describe_misfit(report: TrajectoryReport, names: list[str]) -> str:
    """Return what trajectories found wrong, with advice; an empty string if nothing is, or if there were none.

    Args:
        report: of a cloud.
        names: of the coordinates, (d,).
    """
    drifts = _describe_drifting_coordinates(report, names)
    problems = []
    if drifts:
        problems.append(
            f"trajectories from the particles move {' and '.join(drifts)}: the cloud does not represent its density"
        )
    if int(report.num_lost):
        depth = f"e^-{float(report.depth):.0f}"
        problems.append(
            f"{int(report.num_lost)} of the particles are where the density is {depth} of the others'"
        )
    if int(report.num_forsaken):
        problems.append(
            f"{int(report.num_forsaken)} early particles were in a mode that has none now (smc.Tempered() weighs modes)"
        )
    problems += _describe_shares(report.shares)
    if not problems:
        return ""
    remedy = ", or use polish='nuts', which may correct it" if drifts else ""
    return "; ".join(problems) + f"; compare with mcmc.NUTS(){remedy}"


def _describe_drifting_coordinates(report: TrajectoryReport, names: list[str]) -> list[str]:
    """Return the coordinates with the largest drift of mean and spread, if these are significant."""
    shift, growth, errors = (np.asarray(a, float) for a in (report.shift, report.growth, report.errors))
    shift_excess = np.abs(shift) - _SHIFT - _NUM_ERRORS * errors[0]
    growth_excess = np.maximum(growth - _GROWTH, 1 / _GROWTH - growth) - _NUM_ERRORS * errors[1]
    drifts = []
    if np.any(shift_excess > 0):
        k = int(np.nanargmax(shift_excess))
        drifts.append(f"the mean of {names[k]} by {shift[k]:+.2g} standard deviations")
    overall, error = (float(value) for value in report.overall_growth)
    if np.any(growth_excess > 0):
        k = int(np.nanargmax(growth_excess))
        drifts.append(f"the spread of {names[k]} by a factor of {growth[k]:.2g}")
    elif overall - _OVERALL_GROWTH - _NUM_ERRORS * error > 0:
        drifts.append(f"the spread of all coordinates by a factor of {overall:.2g}")
    return drifts


def _describe_shares(shares: ModeShares) -> list[str]:
    """Return the mode whose share of particles differs most from its mass, if two modes contradict their masses."""
    particles, mass, error = (np.asarray(a, float) for a in shares)
    estimated = mass > 0
    if np.sum(estimated) < 2:
        return []
    log_ratio = np.where(
        estimated, np.log(np.where(estimated, particles, 1) / np.where(estimated, mass, 1)), 0
    )
    differences = np.abs(log_ratio[:, None] - log_ratio) - error[:, None] - error
    if not np.max(differences[np.ix_(estimated, estimated)]) > math.log(_SHARE_FACTOR):
        return []
    k = int(np.argmax(np.abs(log_ratio)))
    return [
        f"the particles are in {int(np.sum(particles > 0))} separate modes, and one of these holds {particles[k]:.0%} "
        f"of them instead of about {mass[k]:.0%}, its share of the mass (smc.Tempered() weighs modes)"
    ]


def describe_drift(report: TrajectoryReport) -> str:
    """Return, as the end of a sentence, the drift that was not decisive; an empty string without trajectories.

    Args:
        report: of a cloud.
    """
    if not np.isfinite(float(report.acceptance)):
        return ""
    shift, growth = (float(np.max(np.abs(np.asarray(a, float)))) for a in (report.shift, report.growth))
    return (
        f", and trajectories cannot tell whether the cloud is right (means move by at most {shift:.2g} standard "
        f"deviations, spreads grow by a factor of {growth:.2g}, {float(report.acceptance):.0%} accepted)"
    )


def confirms_cloud(report: TrajectoryReport) -> bool:
    """Return whether trajectories without a misfit are precise enough to call the cloud right, settled or not.

    Args:
        report: of a cloud.
    """
    shift, growth = (np.asarray(a, float) for a in (report.shift, report.growth))
    steady = np.all(np.abs(shift) < _CONFIRM_SHIFT)
    steady = steady and np.all(np.abs(np.log(growth)) < math.log(_CONFIRM_GROWTH))
    return bool(steady and float(report.acceptance) > _CONFIRM_ACCEPTANCE)


def run_trajectories(
    key: PRNGKey,
    algorithm: Algorithm,
    state: CloudState,
    z: Float[Array, "N d"],
    mask: Bool[Array, " N"],
    early: tuple[Float[Array, "M d"], ...],
) -> TrajectoryReport:
    """Test a cloud by trajectories from its particles.

    Args:
        key: random key.
        algorithm: from ``descent``, for an exact density.
        state: whose metric defines z.
        z: the particles.
        mask: which particles count.
        early: tables of clouds of the same run at earlier times.
    """
    config, logdensity_fn = algorithm.step.args  # type: ignore[attr-defined]
    to_table = partial(geometry_of(config, state.z).from_z, state.metric)
    table = to_table(z)
    center = masked_mean(mask, table)
    logdensity_in_z = jax.tree_util.Partial(logdensity_in_cloud, algorithm, state)
    values, sums = _run_transitions(key, logdensity_in_z, z, mask, to_table, center)

    # Particles of negligible density, even at the best point of their trajectories
    median = jnp.nanmedian(jnp.where(mask, sums.max_logdensity, jnp.nan))
    lost = mask & (sums.max_logdensity < median - 10.0 - 2.0 * z.shape[1])
    depth = median - jnp.max(jnp.where(lost, sums.max_logdensity, -jnp.inf))

    row_fn = partial(row_logdensity, logdensity_fn, particle_template(state.positions))
    finite = mask & jnp.isfinite(values)
    return TrajectoryReport(
        *_drift(table, center, sums, mask),
        acceptance=sums.acceptance,
        num_lost=jnp.sum(lost, dtype=jnp.int32),
        depth=jnp.where(jnp.any(lost), depth, 0),
        num_forsaken=_count_forsaken(row_fn, jnp.concatenate(early), table, mask, values, median),
        shares=estimate_mode_shares(row_fn, table, finite, jnp.where(finite, values, 0)),
        num_gradients=jnp.int32(len(z) * (1 + _NUM_TRAJECTORIES * _NUM_LEAPFROGS)),
    )


class _TrajectorySums(NamedTuple):
    """Sums over the second half of the trajectories.

    Attributes:
        offset: sum of x - center.
        square: sum of its squares.
        distance: sum of its absolute values.
        max_logdensity: largest log density of each particle.
        acceptance: acceptance rate of the last trajectories.
    """

    offset: Float[Array, "N d"]
    square: Float[Array, "N d"]
    distance: Float[Array, "N d"]
    max_logdensity: Float[Array, " N"]
    acceptance: Scalar


def _run_transitions(
    key: PRNGKey, logdensity_fn: Any, z: Array, mask: Array, to_table: Any, center: Array
) -> tuple[Array, _TrajectorySums]:
    """Return the initial log densities, and the sums over the trajectories."""
    num_particles, num_dims = z.shape
    ones, zeros = jnp.ones(num_dims, z.dtype), jnp.zeros_like(z)
    value_and_grad_fn = jax.value_and_grad(logdensity_fn)
    values, gradients = jax.vmap(value_and_grad_fn)(z)

    def transition_one(uniforms, state, step_size):
        return hmc_transition(uniforms, state, value_and_grad_fn, step_size, ones, _NUM_LEAPFROGS)

    def step(carry, counts_and_key):
        states, step_size, old = carry
        counts, key = counts_and_key

        # Transitions with random step sizes
        uniforms = jax.random.uniform(key, (num_particles, num_dims + 3), z.dtype)
        factors = _MIN_STEP * (_MAX_STEP / _MIN_STEP) ** uniforms[:, -1]
        states, log_ratios = jax.vmap(transition_one)(uniforms[:, :-1], states, step_size * factors)

        # Sums, and a step size that follows the mean acceptance
        acceptance = masked_mean(mask, jnp.exp(jnp.minimum(log_ratios, 0))[:, None])[0]
        offset = jnp.where(counts, to_table(states.position) - center, 0)
        new = _TrajectorySums(
            offset=old.offset + offset,
            square=old.square + offset**2,
            distance=old.distance + jnp.abs(offset),
            max_logdensity=jnp.maximum(old.max_logdensity, states.logdensity),
            acceptance=acceptance,
        )
        return (states, step_size * jnp.exp(acceptance - _TARGET_ACCEPTANCE), new), None

    step_size = jnp.asarray(math.pi / 8 * min(1.0, 2 * num_dims**-0.25), z.dtype)
    sums = _TrajectorySums(
        offset=zeros,
        square=zeros,
        distance=zeros,
        max_logdensity=values,
        acceptance=jnp.zeros((), z.dtype),
    )
    carry = (IntegratorState(z, values, gradients), step_size, sums)
    counts = jnp.arange(_NUM_TRAJECTORIES) >= _NUM_TRAJECTORIES // 2
    (_, _, sums), _ = jax.lax.scan(step, carry, (counts, jax.random.split(key, _NUM_TRAJECTORIES)))
    return values, sums


def _drift(
    table: Array, center: Array, sums: _TrajectorySums, mask: Array
) -> tuple[Array, Array, Array, Array]:
    """Return shift, growth, their standard errors (from particle to particle), and the overall growth."""
    num_counted = _NUM_TRAJECTORIES - _NUM_TRAJECTORIES // 2
    count = jnp.maximum(jnp.sum(mask.astype(table.dtype)), 1)
    mean = partial(masked_mean, mask)

    def standard_error(values):
        # The last factor: the standard error over few particles is itself uncertain.
        return jnp.sqrt(mean((values - mean(values)) ** 2) / count) * (1 + 8 / count)

    before, after = table - center, sums.offset / num_counted
    shift = mean(after)
    spread = jnp.sqrt(jnp.maximum(mean(sums.square / num_counted) - shift**2, 0))
    width = mean(jnp.abs(before))
    spread, width = (jnp.where(a > 0, a, 1) for a in (spread, width))
    growth = mean(sums.distance / num_counted) / width
    residuals = (sums.distance / num_counted - growth * jnp.abs(before)) / width
    overall_error = standard_error(jnp.mean(residuals, axis=1, keepdims=True))[0]
    errors = jnp.stack([standard_error(after - before) / spread, standard_error(residuals)])
    return shift / spread, growth, errors, jnp.stack([jnp.mean(growth), overall_error])


def _count_forsaken(
    logdensity_fn: Any, early: Array, table: Array, mask: Array, values: Array, median: Array
) -> Array:
    """Count the early particles of high density that low density separates from the nearest current particles."""
    heights = jax.vmap(logdensity_fn)(early)
    spread = moments(table, mask)[1]
    unit = jnp.where(spread > 0, spread, 1)
    fractions = jnp.linspace(0, 1, _NUM_POINTS + 2, dtype=table.dtype)[1:-1, None]

    def is_separated(row_and_height):
        row, height = row_and_height
        squares = jnp.sum(((table - row) / unit) ** 2, axis=1)
        _, nearest = jax.lax.top_k(-jnp.where(mask, squares, jnp.inf), min(_NUM_NEAREST, len(table)))
        lines = row + fractions[None] * (table[nearest][:, None] - row)
        lowest = jnp.min(jax.vmap(jax.vmap(logdensity_fn))(lines), axis=1)
        return jnp.all(lowest < jnp.minimum(height, values[nearest]) - _MIN_DROP)

    separated = jax.lax.map(is_separated, (early, heights))
    return jnp.sum(separated & (heights > median - _MAX_DEPTH_OF_EARLY), dtype=jnp.int32)
