"""Is a posterior right, and could the check have told if it were not?"""

from probinfer.checks.bands import Band
from probinfer.checks.bands import ecdf_band
from probinfer.checks.bands import ecdf_pvalue

__all__ = [
    "Band",
    "ecdf_band",
    "ecdf_pvalue",
]
