"""Is a posterior right, and could the check have told if it were not?"""

from probinfer.checks.bands import Band
from probinfer.checks.bands import ecdf_band
from probinfer.checks.bands import ecdf_pvalue
from probinfer.checks.detectable import Detectable
from probinfer.checks.detectable import band_power
from probinfer.checks.detectable import detectable_errors
from probinfer.checks.ranks import RankTable
from probinfer.checks.ranks import rank_table
from probinfer.checks.uniformity import UniformityReport
from probinfer.checks.uniformity import holm
from probinfer.checks.uniformity import uniformity

__all__ = [
    "Band",
    "Detectable",
    "RankTable",
    "UniformityReport",
    "band_power",
    "detectable_errors",
    "ecdf_band",
    "ecdf_pvalue",
    "holm",
    "rank_table",
    "uniformity",
]
