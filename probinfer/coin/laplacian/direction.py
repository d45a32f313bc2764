r"""The direction of Laplacian-adjusted Wasserstein gradient descent: steepest descent of the chi-squared divergence.

In place of a kernel that somebody chose, the direction has the one that belongs to the density: the inverse of its
diffusion operator, :math:`K(x, y) = \sum_{k \ge 1} \varphi_k(x) \varphi_k(y) / \lambda_k`. The cloud then relaxes at
one rate in every shape, fast or slow. The functions must be computed on a grid, so the particles have one or two
coordinates; the grid gives means and standard deviations of the density as well, and these are the coordinates in
which the particles bet.
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
from probinfer.coin.cloud_descent import descent
from probinfer.coin.laplacian.spectrum import Spectrum, find_spectrum
from probinfer.core.algorithms import Algorithm, as_partial
from probinfer.core.binding import StochasticLogDensity
from probinfer.core.errors import shortened
from probinfer.core.types import Array, ArrayTree, Bool, Float, pytree

__all__ = ["algorithm_of", "evaluate_spectrum", "lawgd", "lawgd_direction", "spectrum_of"]

_MOST_FUNCTIONS = {1: 900, 2: 300}
_FIRST = 8  # step of the first restart of the bet
_UNIT = 0.1  # first bet, in standard deviations of the density


def lawgd(
    logdensity_fn: Any, positions: ArrayTree, *, bet: optax.GradientTransformation | None = None
) -> Algorithm:
    r"""Carry particles to a density of one or two dimensions along the gradient of their chi-squared divergence.

    The eigenfunctions are computed here, outside jit; the steps are as cheap as a table.

    Args:
        logdensity_fn: log density of one position (a tree), defined everywhere near the mass; may be minus infinity.
        positions: leaves (N, ...), where the search for the mass begins, such as the start of the particles. There are
            three eigenfunctions for each particle, so N is 450 at most in one dimension and 150 in two.
        bet: an optax transformation, in standard deviations of the density. None: ``betting.coin(unit=0.1)``,
            restarted at steps 8, 16, 32, ...

    Returns:
        ``init(positions) -> CloudState`` with leaves (N, ...), whose ``.positions`` are the particles, and
        ``step(key, state) -> (CloudState, CloudInfo)``, for ``pi.run``. Memory O(K (M + N)) with K eigenfunctions on
        M = 1024 grid points in one dimension and about 9000 in two.

    Raises:
        TypeError: ``logdensity_fn`` is no function, or a minibatch estimate; positions that are not floating point; a
            ``bet`` that is no optax transformation.
        ValueError: more than two dimensions; too many particles; traced positions; positions that are no cloud (see
            ``coin.svgd``); from ``init``: fewer than half of the particles where the density is not negligible.
        NumericalError: the density is improper, its log is NaN, or its tails are too heavy for a grid.

    References:
        Chewi, Le Gouic, Lu, Maunu and Rigollet (2020), "SVGD as a kernelized Wasserstein gradient flow of the
        chi-squared divergence", section 4; Sharrock and Nemeth (2023), "Coin sampling", section 3.3.
    """
    return algorithm_of(logdensity_fn, spectrum_of(logdensity_fn, positions), bet)


def spectrum_of(logdensity_fn: Any, positions: ArrayTree) -> Spectrum:
    """Return the spectrum for so many particles.

    Args:
        logdensity_fn: as in ``lawgd``, like ``positions`` and what is raised.
        positions: leaves (N, ...).
    """
    if isinstance(logdensity_fn, StochasticLogDensity):
        raise TypeError(
            "LAWGD needs the exact log density on a grid, and this one is estimated from minibatches; use coin.svgd"
        )
    if not callable(logdensity_fn):
        raise TypeError(f"logdensity_fn must be a function of one position, got {shortened(logdensity_fn)}")
    check_positions(positions)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(positions)):
        raise ValueError(
            "coin.lawgd computes a spectrum outside jit: call it before, and run its steps inside"
        )
    table = ravel_particles(positions)
    if table.shape[1] > 2:
        raise ValueError(
            f"LAWGD needs eigenfunctions on a grid, so positions of one or two coordinates; got {table.shape[1]}: use "
            "coin.svgd"
        )
    template, num = particle_template(positions), _num_functions(*table.shape)
    return find_spectrum(lambda row: logdensity_fn(unravel_particles(template, row)), table, num)


def algorithm_of(logdensity_fn: Any, spectrum: Spectrum, bet: Any = None) -> Algorithm:
    """Return the algorithm of a known spectrum.

    Args:
        logdensity_fn: as in ``lawgd``, like ``bet`` and what is returned.
        spectrum: from ``spectrum_of``.
        bet: an optax transformation or None.
    """
    bet = _restarted(betting.coin(unit=_UNIT)) if bet is None else bet
    found = descent(logdensity_fn, _direction, spectrum, _Standard(spectrum), bet, bandwidth="fixed")
    return Algorithm(jax.tree_util.Partial(_init, spectrum, found.init), found.step)


def _init(spectrum: Spectrum, init_fn: Callable, positions: ArrayTree) -> Any:
    """Refuse a start from which the particles would meet at one point of the edge; traced positions pass."""
    state = init_fn(positions)
    known = evaluate_spectrum(spectrum, spectrum.center + spectrum.scale * state.z)[2]
    if not isinstance(known, jax.core.Tracer) and 2 * jnp.sum(known) < len(known):
        raise ValueError(
            f"{int(jnp.sum(known))} of {len(known)} particles start where the density is not negligible, and LAWGD "
            f"knows nothing elsewhere; start at draws from about N({spectrum.center}, diag({spectrum.scale})^2), or "
            "bring the particles near by coin.svgd"
        )
    return state


def _num_functions(num_particles: int, num_dims: int) -> int:
    """Three for each particle; with less than two, clouds that differ from the density in every other shape rest."""
    most = _MOST_FUNCTIONS[num_dims]
    if 2 * num_particles > most:
        raise ValueError(
            f"LAWGD computes at most {most} eigenfunctions in {num_dims} dimensions, which hold {most // 2} particles; "
            f"got {num_particles}: use fewer, or coin.svgd"
        )
    return min(max(3 * num_particles, 100), most)


@pytree
class _Standard(Diagonal):
    """The units of the density, never refreshed."""

    spectrum: Any
    restarts = False

    def start(self, table: Float[Array, "N d"], mask: Bool[Array, " N"]) -> tuple[Metric, Array]:
        metric = Metric(self.spectrum.center.astype(table.dtype), self.spectrum.scale.astype(table.dtype))
        return metric, (table - metric.center) / metric.factor


def _direction(spectrum: Spectrum, z: Array, scores: Array, mask: Array, score_fn: Any) -> Array:
    """Return ``lawgd_direction``, as ``descent`` calls it: from z to z."""
    return lawgd_direction(spectrum, spectrum.center + spectrum.scale * z, mask) / spectrum.scale


class _Episode(NamedTuple):
    """Steps taken, and the bet since the last restart."""

    step: Array
    bet: Any


def _restarted(bet: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return a bet that forgets at steps 8, 16, 32, ..."""
    bet = optax.GradientTransformation(as_partial(bet.init), as_partial(bet.update))
    partial = jax.tree_util.Partial
    return optax.GradientTransformation(partial(_begin, bet), partial(_continue, bet))


def _begin(bet: optax.GradientTransformation, params: Any) -> _Episode:
    return _Episode(jnp.zeros((), jnp.int32), bet.init(params))


def _continue(bet: optax.GradientTransformation, updates: Any, state: _Episode, params: Any) -> tuple:
    due = (state.step >= _FIRST) & (state.step & (state.step - 1) == 0)
    inner = jax.lax.cond(due, lambda: bet.init(params), lambda: state.bet)
    moves, inner = bet.update(updates, inner, params)
    return moves, _Episode(state.step + 1, inner)


def lawgd_direction(
    spectrum: Spectrum,
    particles: Float[Array, "N D"],
    mask: Bool[Array, " N"] | None = None,
) -> Float[Array, "N D"]:
    r"""Return :math:`-\frac1N \sum_j \nabla_1 K(x_i, x_j)` for every particle, in its own units.

    Particles where nothing is known of the eigenfunctions go straight to the nearest place where they are, and are not
    counted by the others.

    Args:
        spectrum: of the density, from ``find_spectrum``.
        particles: the cloud x.
        mask: which particles count; None: all. The others get the direction NaN, which freezes a bet on them.

    Returns:
        The direction, in the units of the particles: the move in one unit of the time of the flow. Memory
        O(N K), K eigenfunctions.

    References:
        Chewi, Le Gouic, Lu, Maunu and Rigollet (2020), "SVGD as a kernelized Wasserstein gradient flow of the
        chi-squared divergence", equation LAWGD, section 4.
    """
    mask = jnp.ones(particles.shape[0], bool) if mask is None else mask
    values, slopes, known = evaluate_spectrum(spectrum, particles)
    counted = (known & mask).astype(values.dtype)
    excess = counted @ values / (jnp.maximum(jnp.sum(counted), 1) * spectrum.rates)
    along = -jnp.einsum("k,nkd->nd", excess, slopes)
    move = jnp.where(known[:, None], along, _home(spectrum, particles))
    return jnp.where(mask[:, None], spectrum.scale * move, jnp.nan)


def _home(spectrum: Spectrum, particles: Array) -> Array:
    """The way to the nearest known place, in standard units: by way of the edge of the box, from outside it."""
    w = (particles - spectrum.center) / spectrum.scale
    last = jnp.asarray(spectrum.rows.shape) - 1
    index = jnp.clip(jnp.round((w - spectrum.origin) / spectrum.spacing), 0, last).astype(jnp.int32)
    return spectrum.homes[tuple(index.T)] - w


def evaluate_spectrum(
    spectrum: Spectrum, particles: Float[Array, "N D"]
) -> tuple[Float[Array, "N K"], Float[Array, "N K D"], Bool[Array, " N"]]:
    """Eigenfunctions and their slopes at the particles, linear between grid points.

    Args:
        spectrum: on its grid.
        particles: anywhere.

    Returns:
        Values, zero outside the grid; slopes in standard units, zero outside; whether all grid points around a
        particle are known.
    """
    w = (particles - spectrum.center) / spectrum.scale
    place = (w - spectrum.origin) / spectrum.spacing
    cell = jnp.clip(jnp.floor(place), 0, jnp.asarray(spectrum.rows.shape) - 2)
    share = place - cell
    inside = jnp.all((share >= 0) & (share <= 1), axis=1)
    cell = cell.astype(jnp.int32)
    values, slopes = (jnp.zeros((), particles.dtype) for _ in range(2))
    for corner in itertools.product((0, 1), repeat=particles.shape[1]):
        row = spectrum.rows[tuple((cell + jnp.asarray(corner)).T)]
        weight = jnp.prod(jnp.where(jnp.asarray(corner) == 1, share, 1 - share), axis=1)
        values = values + weight[:, None] * spectrum.values[row]
        slopes = slopes + weight[:, None, None] * spectrum.slopes[row]
        inside = inside & (row < spectrum.values.shape[0] - 1)
    return jnp.where(inside[:, None], values, 0), jnp.where(inside[:, None, None], slopes, 0), inside
