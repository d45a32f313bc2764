"""Sites: Gaussian factors in natural parameters, one for each data point.

t_i(f) = exp(lam1_i f − ½ lam2_i f²). The result of every inference method of this package is a set of sites; those of
exact inference have a closed form: for y = f + noise of variance s², lam2 = 1/s² and lam1 = y/s².
"""

from __future__ import annotations

from typing import Any

from probinfer.core.types import pytree

__all__ = ["Sites"]


@pytree
class Sites:
    """t_i(f) = exp(lam1_i f − ½ lam2_i f²).

    Attributes:
        lam1: first natural parameters ``(N,)`` (precision times mean).
        lam2: second natural parameters ``(N,)`` (precision).
    """

    lam1: Any
    lam2: Any
