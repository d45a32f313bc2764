"""What a Gaussian approximation says of itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import ArrayTree
from probinfer.inference import tails

__all__ = ["KHAT", "VIInfo", "details", "refuse_improper"]

KHAT = 0.7  # above: importance weights have no useful mean (Vehtari et al. 2024, section 3)


class VIInfo(NamedTuple):
    """Report of a Gaussian approximation.

    ``elbo`` is the evidence bound on 1000 fresh draws, ``elbo_standard_error`` its error, ``gap`` what the bound on
    the fixed sample exceeds it by (the optimism of the fit). ``loc`` (d,) and ``scale`` describe the Gaussian in
    unconstrained space: standard deviations (d,) or a lower triangle (d, d). ``num_samples`` is the final size of the
    fixed sample, ``num_gradients`` the gradients the fit took, its start included.

    ``khat`` is the Pareto shape of the importance ratios of the draws. It is a promise of the *weights*, not of the
    Gaussian: up to 0.7 weighted means can be trusted to a few of their Monte Carlo errors, while the mean and the
    standard deviations of the Gaussian may be off by tenths of a standard deviation. It is estimated from few large
    ratios, so ``identity`` holds the promise against the gradients: by how much :math:`-E[z_j g_k]` differs from 1
    (j = k) or 0, beyond 2.5 standard errors, at most (z, g: weighted draws and gradients, whitened by the weighted
    covariance). Both are blind to what the draws never visit, such as a second mode.

    ``status`` is ``IMPROPER_DENSITY`` if the density is. It is ``POOR_APPROXIMATION`` where weights mend nothing:
    ``khat`` above 0.7 and weights worth less than a quarter of the draws, or ``identity`` above 0.1; then there are
    none. It is ``MAX_ITERATIONS`` if the gap stayed open at the largest sample, else that of the last optimisation.
    """

    elbo: Any
    elbo_standard_error: Any
    gap: Any
    khat: Any
    identity: Any
    loc: Any
    scale: Any
    num_samples: Any
    num_gradients: Any
    status: Any


def details(info: VIInfo) -> str:
    """Say what a warning is about."""
    if int(info.status) == Status.POOR_APPROXIMATION:
        if not float(info.khat) <= KHAT:
            return f"Pareto k-hat is {float(info.khat):.2f}, above {KHAT}"
        return (
            f"weighted draws miss the identity -E[z g] = 1 by {float(info.identity):.2f} beyond their errors (k-hat "
            f"{float(info.khat):.2f})"
        )
    return f"the fit to {int(info.num_samples)} points exceeds the fresh bound by {float(info.gap):.2g} nats"


def refuse_improper(name: str, logdensity_fn: Any, position: ArrayTree, error: NumericalError) -> None:
    """Raise with the better reason, if the density is improper.

    Raises:
        NumericalError: it is.
    """
    found = tails.improper(logdensity_fn, jax.tree.map(lambda leaf: leaf[None], position))
    if found:
        status = Status.IMPROPER_DENSITY
        raise NumericalError(f"{name}: {found}; {advice(status)}", status) from error
