r"""The direction of Laplacian-adjusted Wasserstein gradient descent: steepest descent of the chi-squared divergence.

The kernel is not a choice here but a property of the density, the inverse of its diffusion operator,
:math:`K(x, y) = \sum_{k \ge 1} \varphi_k(x) \varphi_k(y) / \lambda_k`. The deviation of the cloud from the density then
decays at the same rate in all eigenfunctions. They must be computed on a grid, so the particles have one or two
coordinates; the grid also yields the means and standard deviations of the density, which define the coordinates of the
bets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer import betting
from probinfer.coin.cloud.geometry import Diagonal, Metric
from probinfer.coin.cloud.particles import (
    check_positions,
    particle_template,
    ravel_particles,
    unravel_particles,
)
from probinfer.coin.cloud_descent import bind_bet, descent
from probinfer.coin.laplacian.spectrum import Spectrum, find_spectrum
from probinfer.core.algorithms import Algorithm
from probinfer.core.binding import StochasticLogDensity
from probinfer.core.errors import shortened
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, pytree

__all__ = ["algorithm_of", "evaluate_spectrum", "lawgd", "lawgd_direction", "nearest_known", "spectrum_of"]

_MAX_FUNCTIONS = {1: 900, 2: 300}
_FIRST_RESTART = 8  # step of the first restart of the bet
_UNIT = 0.1  # first bet, in standard deviations of the density


def lawgd(
    logdensity_fn: Any, positions: ArrayTree, *, bet: optax.GradientTransformation | None = None
) -> Algorithm:
    r"""Carry particles to a density of one or two dimensions along the gradient of their chi-squared divergence.

    The eigenfunctions are computed by this call, outside jit; the steps only interpolate them.

    Args:
        logdensity_fn: log density of one position (a tree), defined everywhere near the mass; may be minus infinity.
        positions: leaves (N, ...), where the search for the mass starts, such as the initial particles. The number of
            eigenfunctions is at least twice that of the particles, so N is at most 450 in one dimension and 150 in two.
        bet: an optax transformation, in standard deviations of the density. None: ``betting.coin(unit=0.1)``,
            restarted at steps 8, 16, 32, ...

    Returns:
        ``init(positions) -> CloudState`` with leaves (N, ...), whose ``.positions`` are the particles, and
        ``step(key, state) -> (CloudState, CloudInfo)``, for ``pi.run``. Memory O(K (M + N)) with K eigenfunctions on
        M = 1024 grid points in one dimension and about 9000 in two.

    Raises:
        TypeError: ``logdensity_fn`` is not a function or is a minibatch estimate, the positions are not floating point,
            or ``bet`` is not an optax transformation.
        ValueError: There are more than two dimensions or too many particles, or the positions are traced or not a cloud
            (see ``coin.svgd``); from ``init``: the density is negligible at more than half of the particles.
        NumericalError: The density is improper, its log is NaN, or its tails are too heavy for a grid.

    References:
        Chewi, Le Gouic, Lu, Maunu and Rigollet (2020), "SVGD as a kernelized Wasserstein gradient flow of the
        chi-squared divergence", section 4; Sharrock and Nemeth (2023), "Coin sampling", section 3.3.
    """
    return algorithm_of(logdensity_fn, spectrum_of(logdensity_fn, positions), bet)


def spectrum_of(logdensity_fn: Any, positions: ArrayTree) -> Spectrum:
    """Return the spectrum of a density, with enough eigenfunctions for the particles.

    Args:
        logdensity_fn: as in ``lawgd``, like ``positions`` and the errors.
        positions: leaves (N, ...).
    """
    if isinstance(logdensity_fn, StochasticLogDensity):
        raise TypeError(
            "LAWGD needs the exact log density on a grid, but this one is estimated from minibatches; use coin.svgd"
        )
    if not callable(logdensity_fn):
        raise TypeError(f"logdensity_fn must be a function of one position, got {shortened(logdensity_fn)}")
    check_positions(positions)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(positions)):
        raise ValueError(
            "coin.lawgd computes a spectrum outside jit: call it before, and run only its steps inside"
        )
    table = ravel_particles(positions)
    if table.shape[1] > 2:
        raise ValueError(
            f"LAWGD computes eigenfunctions on a grid, so positions must have one or two coordinates; got "
            f"{table.shape[1]}: use coin.svgd"
        )
    template = particle_template(positions)
    return find_spectrum(
        lambda row: logdensity_fn(unravel_particles(template, row)), table, _num_functions(*table.shape)
    )


def algorithm_of(logdensity_fn: Any, spectrum: Spectrum, bet: Any = None) -> Algorithm:
    """Return the algorithm for a known spectrum.

    Args:
        logdensity_fn: as in ``lawgd``, like ``bet`` and the algorithm.
        spectrum: from ``spectrum_of``.
        bet: an optax transformation or None.
    """
    bet = _with_restarts(betting.coin(unit=_UNIT)) if bet is None else bet
    algorithm = descent(logdensity_fn, _direction, spectrum, _DensityUnits(spectrum), bet, bandwidth="fixed")
    return Algorithm(jax.tree_util.Partial(_init, spectrum, algorithm.init), algorithm.step)


def _init(spectrum: Spectrum, init_fn: Callable, positions: ArrayTree) -> Any:
    """Refuse a start from which the particles would meet at one edge point; traced positions are not checked."""
    state = init_fn(positions)
    known = evaluate_spectrum(spectrum, spectrum.center + spectrum.scale * state.z)[2]
    if not isinstance(known, jax.core.Tracer) and 2 * jnp.sum(known) < len(known):
        raise ValueError(
            f"{int(jnp.sum(known))} of {len(known)} particles start where the density is not negligible, and LAWGD has "
            f"no direction elsewhere; start at draws from about N({spectrum.center}, diag({spectrum.scale})^2), or "
            "move the particles near by coin.svgd"
        )
    return state


def _num_functions(num_particles: int, num_dims: int) -> int:
    """Return three per particle if possible, and at least two: with fewer the direction vanishes at wrong clouds."""
    max_functions = _MAX_FUNCTIONS[num_dims]
    if 2 * num_particles > max_functions:
        raise ValueError(
            f"LAWGD computes at most {max_functions} eigenfunctions in {num_dims} dimensions, enough for "
            f"{max_functions // 2} particles; got {num_particles}: use fewer, or coin.svgd"
        )
    return min(max(3 * num_particles, 100), max_functions)


@pytree
class _DensityUnits(Diagonal):
    """The mean and the standard deviations of the density, never refreshed."""

    spectrum: Any
    restarts = False

    def start(self, table: Float[Array, "N d"], mask: Bool[Array, " N"]) -> tuple[Metric, Array]:
        metric = Metric(self.spectrum.center.astype(table.dtype), self.spectrum.scale.astype(table.dtype))
        return metric, (table - metric.center) / metric.factor


def _direction(spectrum: Spectrum, z: Array, scores: Array, mask: Array, score_fn: Any) -> Array:
    """Return ``lawgd_direction`` in z, as ``descent`` calls it."""
    return lawgd_direction(spectrum, spectrum.center + spectrum.scale * z, mask) / spectrum.scale


class _RestartedBet(NamedTuple):
    """The number of steps, and the state of the bet since the last restart."""

    step: Int[Array, ""]
    bet: Any


def _with_restarts(bet: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return a bet that restarts at steps 8, 16, 32, ..."""
    bet = bind_bet(bet)
    partial = jax.tree_util.Partial
    return optax.GradientTransformation(partial(_init_bet, bet), partial(_update_bet, bet))


def _init_bet(bet: optax.GradientTransformation, params: Any) -> _RestartedBet:
    return _RestartedBet(jnp.zeros((), jnp.int32), bet.init(params))


def _update_bet(bet: optax.GradientTransformation, updates: Any, state: _RestartedBet, params: Any) -> tuple:
    due = (state.step >= _FIRST_RESTART) & (state.step & (state.step - 1) == 0)
    inner = jax.lax.cond(due, lambda: bet.init(params), lambda: state.bet)
    moves, inner = bet.update(updates, inner, params)
    return moves, _RestartedBet(state.step + 1, inner)


def lawgd_direction(
    spectrum: Spectrum,
    particles: Float[Array, "N D"],
    mask: Bool[Array, " N"] | None = None,
) -> Float[Array, "N D"]:
    r"""Return :math:`-\frac1N \sum_j \nabla_1 K(x_i, x_j)` for every particle, in the units of the particles.

    Particles outside the known grid points move straight to the nearest known point, and do not act on the others.

    Args:
        spectrum: of the density, from ``find_spectrum``.
        particles: the cloud x.
        mask: which particles count; None: all. The others get the direction NaN, which freezes a bet on them.

    Returns:
        The direction in the units of the particles: the move in one unit of time of the flow. Memory O(N K), K
        eigenfunctions.

    References:
        Chewi, Le Gouic, Lu, Maunu and Rigollet (2020), "SVGD as a kernelized Wasserstein gradient flow of the
        chi-squared divergence", equation LAWGD, section 4.
    """
    mask = jnp.ones(particles.shape[0], bool) if mask is None else mask
    values, slopes, known = evaluate_spectrum(spectrum, particles)
    weights = (known & mask).astype(values.dtype)
    excess = weights @ values / (jnp.maximum(jnp.sum(weights), 1) * spectrum.rates)
    descent_direction = -jnp.einsum("k,nkd->nd", excess, slopes)
    w = (particles - spectrum.center) / spectrum.scale
    move = jnp.where(known[:, None], descent_direction, nearest_known(spectrum, w) - w)
    return jnp.where(mask[:, None], spectrum.scale * move, jnp.nan)


def nearest_known(spectrum: Spectrum, w: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Return the known point next to the grid point nearest to w, in standard units."""
    last = jnp.asarray(spectrum.rows.shape) - 1
    index = jnp.clip(jnp.round((w - spectrum.origin) / spectrum.spacing), 0, last).astype(jnp.int32)
    return spectrum.homes[tuple(index.T)]


def evaluate_spectrum(
    spectrum: Spectrum, particles: Float[Array, "N D"]
) -> tuple[Float[Array, "N K"], Float[Array, "N K D"], Bool[Array, " N"]]:
    """Return the eigenfunctions and their slopes at the particles, linearly interpolated between grid points.

    Args:
        spectrum: on its grid.
        particles: anywhere.

    Returns:
        Values, zero outside the known points; slopes in standard units, zero likewise; and whether all grid points
        around a particle are known.
    """
    w = (particles - spectrum.center) / spectrum.scale
    index = (w - spectrum.origin) / spectrum.spacing
    cell = jnp.clip(jnp.floor(index), 0, jnp.asarray(spectrum.rows.shape) - 2)
    fraction = index - cell
    known = jnp.all((fraction >= 0) & (fraction <= 1), axis=1)
    cell = cell.astype(jnp.int32)
    values, slopes = (jnp.zeros((), particles.dtype) for _ in range(2))
    for corner in itertools.product((0, 1), repeat=particles.shape[1]):
        row = spectrum.rows[tuple((cell + jnp.asarray(corner)).T)]
        weight = jnp.prod(jnp.where(jnp.asarray(corner) == 1, fraction, 1 - fraction), axis=1)
        values = values + weight[:, None] * spectrum.values[row]
        slopes = slopes + weight[:, None, None] * spectrum.slopes[row]
        known = known & (row < spectrum.values.shape[0] - 1)
    return jnp.where(known[:, None], values, 0), jnp.where(known[:, None, None], slopes, 0), known
