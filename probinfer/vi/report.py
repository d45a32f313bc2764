"""What a Gaussian approximation says of itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from probinfer import tails
from probinfer.base import Status
from probinfer.errors import NumericalError, advice
from probinfer.types import ArrayTree

__all__ = ["KHAT", "VIInfo", "details", "refuse_improper"]

KHAT = 0.7  # above: importance weights have no useful mean (Vehtari et al. 2024, section 3)


class VIInfo(NamedTuple):
    """Report of a Gaussian approximation.

    ``elbo`` is the evidence bound on 1000 fresh draws, ``elbo_standard_error`` its error, ``gap`` what the bound on
    the fixed sample exceeds it by (the optimism of the fit). ``khat`` is the Pareto shape of the importance ratios
    p/q: above 0.7 the approximation misses the target too much to be corrected. ``loc`` (d,) and ``scale`` describe
    the Gaussian in unconstrained space: standard deviations (d,) or a lower triangle (d, d). ``num_samples`` is the
    final size of the fixed sample, ``num_gradients`` the gradients the fit took, its start included. ``status`` is
    ``IMPROPER_DENSITY`` if the density is, ``POOR_APPROXIMATION`` if ``khat`` is above 0.7, ``MAX_ITERATIONS`` if the
    gap stayed open at the largest sample, else that of the last optimisation.
    """

    elbo: Any
    elbo_standard_error: Any
    gap: Any
    khat: Any
    loc: Any
    scale: Any
    num_samples: Any
    num_gradients: Any
    status: Any


def details(info: VIInfo) -> str:
    """Say what a warning is about."""
    if int(info.status) == Status.POOR_APPROXIMATION:
        return f"Pareto k-hat is {float(info.khat):.2f}, above {KHAT}"
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
