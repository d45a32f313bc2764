r"""Stein identities for each coordinate: tests of the location of draws, and of their conditional widths.

For a normal density with precision P, and draws with covariance V about a mean that is off by :math:`\delta`, the mean
scores are :math:`-(P\delta)_j` and the spreads :math:`(VP)_{jj}`. So the identities do not compare the marginal widths
:math:`V_{jj}` and :math:`(P^{-1})_{jj}`: uncorrelated draws with the conditional variances :math:`1/P_{jj}`, the
mean-field optimum, satisfy every identity.
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
_UNDETECTED = (
    "It does not test marginal widths, only widths given the other coordinates: independent draws with the conditional "
    "widths of the density (mean field) pass, however narrow they are; shifts of several coordinates along their "
    "correlation are harder to detect. It does not detect wrong weights of separated modes, nor errors that satisfy "
    "both identities in every coordinate (weak priors, rotations)"
)


@dataclasses.dataclass(frozen=True)
class SteinIdentityReport:
    """Location and spread of every coordinate, compared with the log density.

    Attributes:
        location: ``(d,)``, mean score times the standard deviation of the draws; 0 if correct. For a Gaussian of the
            right width, the shift of the draws below its mean in standard deviations.
        location_error: ``(d,)`` Monte Carlo standard error of ``location``.
        spread: ``(d,)``, minus the mean of (u − mean u) times the score; 1 if correct. For a Gaussian, the variance of
            the draws over its conditional variance: below 1 collapsed, above 1 too wide.
        spread_error: ``(d,)`` Monte Carlo standard error of ``spread``.
        pvalue: smallest of the 2d two-sided p-values, corrected for skewness, times 2d.
        level: significance level of the verdict.
        power: errors that are detected with probability 0.9 if the density is nearly normal.
    """

    location: Float[np.ndarray, " d"]
    location_error: Float[np.ndarray, " d"]
    spread: Float[np.ndarray, " d"]
    spread_error: Float[np.ndarray, " d"]
    pvalue: float
    level: float
    power: Detectable

    @property
    def location_z(self) -> np.ndarray:
        """``(d,)`` locations in standard errors."""
        return self.location / self.location_error

    @property
    def spread_z(self) -> np.ndarray:
        """``(d,)`` differences of the spreads from 1 in standard errors."""
        return (self.spread - 1) / self.spread_error

    @property
    def passed(self) -> bool | None:
        """True if no error was detected, False if one was."""
        return self.pvalue > self.level

    @property
    def verdict(self) -> str:
        """The verdict, the errors that could have been detected, and those that cannot be, one sentence each."""
        power = f"The check {self.power}"
        if self.pvalue > self.level:
            return f"no fault seen (p = {self.pvalue:.2g}). {power}. {_UNDETECTED}."
        i, j = int(np.argmax(abs(self.location_z))), int(np.argmax(abs(self.spread_z)))
        if abs(self.location_z[i]) >= abs(self.spread_z[j]):
            statistic = f"location {self.location[i]:.2g}, z = {self.location_z[i]:.1f}"
            fault = f"coordinate {i} is in the wrong place: {statistic}"
        else:
            width = "collapsed" if self.spread[j] < 1 else "too wide"
            statistic = f"spread {self.spread[j]:.2g} instead of 1, z = {self.spread_z[j]:.1f}"
            fault = f"coordinate {j} is {width} given the others: {statistic}"
        return f"the draws do not fit the density (p = {self.pvalue:.2g}): {fault}. {power}. {_UNDETECTED}."

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

    The test needs one gradient per draw, no reference draws and no normalizing constant. Standard errors account for
    autocorrelation, and p-values also for skewness, since the terms of the second identity are skewed even if the draws
    are not.

    Args:
        draws: positions: ``(n, d)`` independent, ``(chain, draw, d)``, or a tree with leaves (chain, draw, ...), on an
            unconstrained scale, where the density is smooth and vanishes at infinity.
        logdensity_fn: position -> scalar, unnormalized.
        level: significance level of the verdict.

    Returns:
        Location and spread of each coordinate with standard errors and z-scores, one p-value over all of them, and the
        verdict, with the errors that these identities cannot detect.

    Raises:
        TypeError: the draws are not floating point, or JAX cannot differentiate the log density.
        ValueError: ``collect`` refuses the draws, or gradients are not finite or all zero.

    References:
        Stein (1972); Gorham and Mackey (2015), "Measuring sample quality with Stein's method", section 2. Hall (1992),
        "On the removal of skewness by transformation" (p-values).
    """
    flat = collect("draws", draws)
    scores = gradients(logdensity_fn, flat).reshape(flat.values.shape)
    location, location_error, spread, spread_error, sizes, skewness = map(
        np.asarray, _identities(flat.values, scores, independent=flat.independent)
    )
    # One p-value over 2d tests, by Bonferroni
    z = np.concatenate([location / location_error, (spread - 1) / spread_error])
    pvalue = min(1.0, len(z) * float(np.min(skewed_pvalue(z, skewness, sizes))))
    errors = np.stack([location_error, spread_error / np.abs(spread)])
    return SteinIdentityReport(
        location=location,
        location_error=location_error,
        spread=spread,
        spread_error=spread_error,
        pvalue=pvalue,
        level=float(level),
        power=_detectable(errors, sizes.reshape(2, -1), skewness.reshape(2, -1), level),
    )


def _detectable(errors: np.ndarray, sizes: np.ndarray, skewness: np.ndarray, level: float) -> Detectable:
    """Return the errors at which z passes its critical value with the power; rows are locations and spreads."""
    low, high = (sign * _critical(sign, sizes, skewness, level) for sign in (-1, 1))
    margin = stats.norm.ppf(_POWER)
    # A shift changes the mean score by the shift times E[score^2] (Fisher information).
    information = np.maximum(sizes[0], 2.0) * errors[0] ** 2
    shift = errors[0] * (np.maximum(low, high)[0] + margin) / information
    # If widths are s times too large, the spread is s^2, and its standard error grows by the same factor.
    narrow = 1 / (1 + (low[1] + margin) * errors[1])
    inverse = 1 - (high[1] + margin) * errors[1]
    wide = np.where(inverse > 0, 1 / np.where(inverse > 0, inverse, 1), np.inf)
    # The shifted coordinate may be any one (maximum); if all widths are wrong, one detection suffices.
    return Detectable(
        bias=float(shift.max()),
        too_narrow=float(np.sqrt(narrow.max())),
        too_wide=float(np.sqrt(wide.min())),
        power=_POWER,
        level=float(level),
        where=_WHERE,
    )


def _critical(sign: int, sizes: np.ndarray, skewness: np.ndarray, level: float) -> np.ndarray:
    """Return the z of the given sign at which ``skewed_pvalue`` times the number of tests is the level."""
    sizes = np.maximum(sizes, 2.0)
    corrected = sign * stats.t.isf(level / (2 * sizes.size), sizes - 1) / np.sqrt(sizes)
    skewness = np.where(np.abs(skewness) < 1e-6, 1e-6, skewness)
    cube = 1 + skewness * (corrected - skewness / (6 * sizes))
    return np.sqrt(sizes) * 3 / skewness * (np.cbrt(cube) - 1)


def skewed_pvalue(
    z: Float[np.ndarray, " K"], skewness: Float[np.ndarray, " K"], sizes: Float[np.ndarray, " K"]
) -> Float[np.ndarray, " K"]:
    r"""Return two-sided p-values of studentized means of skewed quantities.

    The first term of the Edgeworth expansion of z is removed: with :math:`s = z/\sqrt n`, skewness :math:`\gamma`,
    :math:`\sqrt n \{s + \gamma s^2/3 + \gamma^2 s^3/27 + \gamma/(6n)\}` is compared with Student's t.

    Args:
        z: means minus their expectations, in standard errors.
        skewness: skewness of the quantities.
        sizes: effective numbers of independent values.

    References:
        Hall (1992), "On the removal of skewness by transformation", Journal of the Royal Statistical Society B 54.
    """
    sizes = np.maximum(sizes, 2.0)
    s = z / np.sqrt(sizes)
    corrected = np.sqrt(sizes) * (s + skewness * s**2 / 3 + skewness**2 * s**3 / 27 + skewness / (6 * sizes))
    return 2 * stats.t.sf(np.abs(corrected), sizes - 1)


def _identities(values: Array, scores: Array, *, independent: bool) -> tuple[Array, ...]:
    """Return the mean and error of both identities (d,), then their effective sizes and skewness (2d,)."""
    axes = (0, 1)
    deviation = jnp.std(values, axis=axes)
    locations = scores * deviation
    spreads = -(values - jnp.mean(values, axis=axes)) * scores
    errors = [_error(quantity, independent) for quantity in (locations, spreads)]
    sizes = [
        jnp.var(quantity, axis=axes) / error**2
        for quantity, error in zip((locations, spreads), errors, strict=True)
    ]
    return (
        jnp.mean(locations, axis=axes),
        errors[0],
        jnp.mean(spreads, axis=axes),
        errors[1],
        jnp.concatenate(sizes),
        jnp.concatenate([_skewness(quantity) for quantity in (locations, spreads)]),
    )


def _skewness(quantity: Array) -> Array:
    centered = quantity - jnp.mean(quantity, axis=(0, 1))
    return jnp.mean(centered**3, axis=(0, 1)) / jnp.mean(centered**2, axis=(0, 1)) ** 1.5


def _error(quantity: Array, independent: bool) -> Array:
    """Return the Monte Carlo standard error of the mean of each coordinate."""
    if independent:
        return jnp.std(quantity, axis=(0, 1), ddof=1) / jnp.sqrt(quantity.shape[1])
    return _mcse(quantity)


_mcse = jax.jit(diagnostics.mcse_mean)
