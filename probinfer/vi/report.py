"""The report of a Gaussian approximation, and the texts of its warnings."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Float, Int
from probinfer.inference import tails

__all__ = ["MAX_KHAT", "VIInfo", "details", "refuse_improper"]

MAX_KHAT = 0.7  # above, importance weights have no useful mean (Vehtari et al. 2024, section 3)


class VIInfo(NamedTuple):
    """Report of a Gaussian approximation.

    ``khat`` judges the *weights*, not the Gaussian: up to 0.7 weighted means are accurate to a few of their Monte Carlo
    errors, while the mean and the standard deviations of the Gaussian may be off by tenths of a standard deviation. It
    is estimated from few large ratios, so ``identity`` checks the weights against the gradients. Both are blind to what
    the draws never visit, such as a second mode.

    Attributes:
        elbo: evidence lower bound on 1000 fresh draws.
        elbo_standard_error: of the ELBO.
        gap: bound on the fixed sample minus the ELBO, the optimism of the fit.
        khat: Pareto shape of the importance ratios of the draws.
        identity: largest deviation of :math:`-E[z_j g_k]` from 1 (j = k) or 0, beyond 2.5 standard errors; z and g are
            weighted draws and gradients, whitened by the weighted covariance.
        loc: location of the Gaussian in unconstrained space.
        scale: standard deviations, or a lower triangle.
        num_samples: final size of the fixed sample.
        num_gradients: of the whole fit, the ascent to the typical set included.
        status: ``IMPROPER_DENSITY`` if the density is; ``POOR_APPROXIMATION`` if weights cannot correct the draws:
            ``khat`` above 0.7 and an effective sample size below a quarter of the draws, or ``identity`` above 0.1 (the
            draws then have no weights); ``MAX_ITERATIONS`` if the gap stayed open at the largest sample; else that of
            the last optimization.
    """

    elbo: Float[Array, ""]
    elbo_standard_error: Float[Array, ""]
    gap: Float[Array, ""]
    khat: Float[Array, ""]
    identity: Float[Array, ""]
    loc: Float[Array, " d"]
    scale: Float[Array, " d"] | Float[Array, "d d"]
    num_samples: Int[Array, ""]
    num_gradients: Int[Array, ""]
    status: Int[Array, ""] | Status


def details(info: VIInfo) -> str:
    """Return the reason for a warning."""
    if int(info.status) == Status.POOR_APPROXIMATION:
        if not float(info.khat) <= MAX_KHAT:
            return f"Pareto k-hat is {float(info.khat):.2f}, above {MAX_KHAT}"
        return (
            f"weighted draws miss the identity -E[z g] = 1 by {float(info.identity):.2f} beyond their errors (k-hat "
            f"{float(info.khat):.2f})"
        )
    return f"the fit to {int(info.num_samples)} points exceeds the fresh bound by {float(info.gap):.2g} nats"


def refuse_improper(name: str, logdensity_fn: Any, position: ArrayTree, error: NumericalError) -> None:
    """Raise an error with the better reason if the density is improper.

    Args:
        name: of the engine, for the message.
        logdensity_fn: log density of a position.
        position: unconstrained, without a leading axis.
        error: the error of the fit.

    Raises:
        NumericalError: the density is improper.
    """
    reason = tails.improper(logdensity_fn, jax.tree.map(lambda leaf: leaf[None], position))
    if reason:
        status = Status.IMPROPER_DENSITY
        raise NumericalError(f"{name}: {reason}; {advice(status)}", status) from error
