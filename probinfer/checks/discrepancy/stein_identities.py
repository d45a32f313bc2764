r"""Stein identities, coordinate by coordinate: are draws in the right place, and as wide as the others leave them?

For a normal density with precision P, and draws with covariance V about a mean that is off by :math:`\delta`, the mean
scores are :math:`-(P\delta)_j` and the spreads :math:`(VP)_{jj}`. So what is compared is not the width of a
coordinate, :math:`V_{jj}` with :math:`(P^{-1})_{jj}`: draws without any correlation, as wide as the conditionals
:math:`1/P_{jj}`, which are the mean-field optimum, satisfy every identity.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from probinfer.checks.draws import collect, gradients
from probinfer.checks.power.ranks import Detectable
from probinfer.core.types import Array, Float
from probinfer.inference import diagnostics
from probinfer.plots.ranks import axes_or_new, shade

__all__ = ["SteinIdentityReport", "skewed_pvalue", "stein_identity"]

_POWER = 0.9
_WHERE = "the bias in one coordinate alone, the width in all, in a density that is about normal"
_BLIND = (
    "It does not see a width as such, but only given the other coordinates: independent draws as wide as the "
    "conditionals of the density (mean field) pass, however much too narrow they are; shifts of several coordinates "
    "along their correlation show less. Nor does it see the weights of separated modes, nor faults that leave every "
    "coordinate's first two identities true (weak priors, rotations)"
)


@dataclasses.dataclass(frozen=True)
class SteinIdentityReport:
    """Location and spread of every coordinate against what the log density asks.

    Attributes:
        location: ``(d,)``, mean score times the standard deviation of the draws: 0 when right. For a Gaussian of the
            right width the shift of the draws below its mean, in standard deviations.
        location_error: ``(d,)`` its Monte Carlo standard error.
        spread: ``(d,)``, minus the mean of (u − mean u) times the score: 1 when right. For a Gaussian the variance of
            the draws over its own (given the others): below 1 collapsed, above 1 too wide.
        spread_error: ``(d,)`` its Monte Carlo standard error.
        pvalue: smallest of the 2d two-sided p-values, corrected for skewness, times 2d.
        level: of the verdict.
        power: what is found with probability 0.9, where the density is about normal.
    """

    location: np.ndarray
    location_error: np.ndarray
    spread: np.ndarray
    spread_error: np.ndarray
    pvalue: float
    level: float
    power: Detectable

    @property
    def location_z(self) -> np.ndarray:
        """``(d,)`` locations in standard errors."""
        return self.location / self.location_error

    @property
    def spread_z(self) -> np.ndarray:
        """``(d,)`` distances of the spreads from 1 in standard errors."""
        return (self.spread - 1) / self.spread_error

    @property
    def passed(self) -> bool | None:
        """True if no fault was seen, False if one was."""
        return self.pvalue > self.level

    @property
    def verdict(self) -> str:
        """One sentence on what was seen, one on what would have been, one on what cannot be."""
        seen = f"The check {self.power}"
        if self.pvalue > self.level:
            return f"no fault seen (p = {self.pvalue:.2g}). {seen}. {_BLIND}."
        i, j = int(np.argmax(abs(self.location_z))), int(np.argmax(abs(self.spread_z)))
        if abs(self.location_z[i]) >= abs(self.spread_z[j]):
            place = f"location {self.location[i]:.2g}, z = {self.location_z[i]:.1f}"
            fault = f"coordinate {i} is in the wrong place: {place}"
        else:
            word = "collapsed" if self.spread[j] < 1 else "too wide"
            size = f"spread {self.spread[j]:.2g} for 1, z = {self.spread_z[j]:.1f}"
            fault = f"coordinate {j} is {word} given the others: {size}"
        return f"the draws do not fit the density (p = {self.pvalue:.2g}): {fault}. {seen}. {_BLIND}."

    def plot(self, axes: Any = None) -> Any:
        """Draw both z-scores of every coordinate; return the axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        axes = axes_or_new(axes)
        index = np.arange(len(self.location))
        bound = stats.norm.ppf(1 - self.level / (4 * len(index)))
        axes.axhspan(-bound, bound, linewidth=0, **shade())
        if len(index) <= 20:
            axes.set_xticks(index)
        axes.plot(index, self.location_z, "o", label="location")
        axes.plot(index, self.spread_z, "s", label="spread")
        axes.set(xlabel="coordinate", ylabel="standard errors")
        axes.legend()
        return axes


def stein_identity(draws: Any, logdensity_fn: Any, *, level: float = 0.05) -> SteinIdentityReport:
    r"""Test :math:`E[\partial_j \log p(u)] = 0` and :math:`E[(u - \bar u)_j \partial_j \log p(u)] = -1` for every j.

    Needs one gradient a draw, no reference draws and no normaliser. Standard errors allow for autocorrelation; p-values
    for skewness too, since the terms of the second identity are skewed even where the draws are not.

    Args:
        draws: positions: ``(n, d)`` independent, ``(chain, draw, d)``, or a tree with leaves (chain, draw, ...), on a
            scale where the density is smooth and vanishes at the ends: unconstrained.
        logdensity_fn: position -> scalar, unnormalised.
        level: of the verdict.

    Returns:
        Location and spread of each coordinate with errors and z-scores; a p-value over all; verdict, with what these
        identities cannot see.

    Raises:
        TypeError: draws that are not floating point, a log density that JAX cannot differentiate.
        ValueError: draws that ``collect`` refuses, gradients that are not finite or all zero.

    References:
        Stein (1972); Gorham and Mackey (2015), "Measuring sample quality with Stein's method", section 2. Hall (1992),
        "On the removal of skewness by transformation" (p-values).
    """
    found = collect("draws", draws)
    scores = gradients(logdensity_fn, found).reshape(found.values.shape)
    location, location_error, spread, spread_error, sizes, skewness = map(
        np.asarray, _identities(found.values, scores, independent=found.independent)
    )
    z = np.concatenate([location / location_error, (spread - 1) / spread_error])
    smallest = float(np.min(skewed_pvalue(z, skewness, sizes)))
    pvalue = min(1.0, len(z) * smallest)
    errors = np.stack([location_error, spread_error / np.abs(spread)])
    shown = _detectable(errors, sizes.reshape(2, -1), skewness.reshape(2, -1), level)
    return SteinIdentityReport(location, location_error, spread, spread_error, pvalue, float(level), shown)


def _detectable(errors: np.ndarray, sizes: np.ndarray, skewness: np.ndarray, level: float) -> Detectable:
    """The errors at which z passes its critical value with the power; rows are locations and spreads, columns d."""
    low, high = (sign * _critical(sign, sizes, skewness, level) for sign in (-1, 1))
    margin = stats.norm.ppf(_POWER)
    # A shift moves the mean score by E[score^2] times it (Fisher's information).
    information = np.maximum(sizes[0], 2.0) * errors[0] ** 2
    shift = errors[0] * (np.maximum(low, high)[0] + margin) / information
    # Widths times s make the spread s^2, and its standard error too.
    narrow = 1 / (1 + (low[1] + margin) * errors[1])
    room = 1 - (high[1] + margin) * errors[1]
    wide = np.where(room > 0, 1 / np.where(room > 0, room, 1), np.inf)
    # Any coordinate may be the one that is shifted; one that shows is enough where all widths are wrong.
    bias, too_narrow, too_wide = (float(x) for x in (shift.max(), np.sqrt(narrow.max()), np.sqrt(wide.min())))
    return Detectable(bias, too_narrow, too_wide, _POWER, float(level), _WHERE)


def _critical(sign: int, sizes: np.ndarray, skewness: np.ndarray, level: float) -> np.ndarray:
    """The z at which ``skewed_pvalue`` over all of them is the level: below zero or above."""
    sizes = np.maximum(sizes, 2.0)
    cleared = sign * stats.t.isf(level / (2 * sizes.size), sizes - 1) / np.sqrt(sizes)
    skewness = np.where(np.abs(skewness) < 1e-6, 1e-6, skewness)
    cube = 1 + skewness * (cleared - skewness / (6 * sizes))
    return np.sqrt(sizes) * 3 / skewness * (np.cbrt(cube) - 1)


def skewed_pvalue(
    z: Float[np.ndarray, " K"], skewness: Float[np.ndarray, " K"], sizes: Float[np.ndarray, " K"]
) -> Float[np.ndarray, " K"]:
    r"""Return two-sided p-values of studentised means of skewed quantities.

    The first term of the Edgeworth expansion of z is removed: with :math:`s = z/\sqrt n`, skewness :math:`\gamma`,
    :math:`\sqrt n \{s + \gamma s^2/3 + \gamma^2 s^3/27 + \gamma/(6n)\}` is compared with Student's t.

    Args:
        z: mean minus its expectation, in standard errors.
        skewness: of the quantities.
        sizes: effective numbers of independent values.

    References:
        Hall (1992), "On the removal of skewness by transformation", Journal of the Royal Statistical Society B 54.
    """
    sizes = np.maximum(sizes, 2.0)
    s = z / np.sqrt(sizes)
    cleared = np.sqrt(sizes) * (s + skewness * s**2 / 3 + skewness**2 * s**3 / 27 + skewness / (6 * sizes))
    return 2 * stats.t.sf(np.abs(cleared), sizes - 1)


def _identities(values: Array, scores: Array, *, independent: bool) -> tuple[Array, ...]:
    axes = (0, 1)
    deviation = jnp.std(values, axis=axes)
    places = scores * deviation
    widths = -(values - jnp.mean(values, axis=axes)) * scores
    errors = [_error(quantity, independent) for quantity in (places, widths)]
    sizes = [
        jnp.var(quantity, axis=axes) / error**2
        for quantity, error in zip((places, widths), errors, strict=True)
    ]
    return (
        jnp.mean(places, axis=axes),
        errors[0],
        jnp.mean(widths, axis=axes),
        errors[1],
        jnp.concatenate(sizes),
        jnp.concatenate([_skewness(quantity) for quantity in (places, widths)]),
    )


def _skewness(quantity: Array) -> Array:
    centred = quantity - jnp.mean(quantity, axis=(0, 1))
    return jnp.mean(centred**3, axis=(0, 1)) / jnp.mean(centred**2, axis=(0, 1)) ** 1.5


def _error(quantity: Array, independent: bool) -> Array:
    """Monte Carlo standard error of the mean of each coordinate."""
    if independent:
        return jnp.std(quantity, axis=(0, 1), ddof=1) / jnp.sqrt(quantity.shape[1])
    return _mcse(quantity)


_mcse = jax.jit(diagnostics.mcse_mean)
