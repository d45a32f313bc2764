"""Is a posterior right, and could the check have told if it were not?"""

from probinfer.checks.bands import Band, ecdf_band, ecdf_pvalue
from probinfer.checks.detectable import Detectable, band_power, detectable_errors
from probinfer.checks.ranks import RankTable, rank_table
from probinfer.checks.tarp import TarpReport, tarp
from probinfer.checks.uniformity import UniformityReport, holm, uniformity
from probinfer.checks.vsbc import VsbcReport, vsbc

__all__ = [
    "Band",
    "Detectable",
    "RankTable",
    "TarpReport",
    "UniformityReport",
    "VsbcReport",
    "band_power",
    "detectable_errors",
    "ecdf_band",
    "ecdf_pvalue",
    "holm",
    "rank_table",
    "tarp",
    "uniformity",
    "vsbc",
]
