"""Is a posterior right, and could the check have told if it were not?"""

from probinfer.checks.bands import Band, ecdf_band, ecdf_pvalue
from probinfer.checks.c2st import C2STReport, c2st
from probinfer.checks.detectable import Detectable, band_power, detectable_errors
from probinfer.checks.energy import energy_distance
from probinfer.checks.evidence import EvidenceSandwich, evidence_sandwich
from probinfer.checks.identity import SteinIdentityReport, stein_identity
from probinfer.checks.joint import JointReport, joint_test
from probinfer.checks.ksd import KSDReport, ksd
from probinfer.checks.mmd import mmd
from probinfer.checks.posterior_sbc import posterior_sbc
from probinfer.checks.ranks import RankTable, rank_table
from probinfer.checks.sbc import SbcReport, sbc
from probinfer.checks.sbc_numpyro import sbc_numpyro
from probinfer.checks.sliced import sliced_wasserstein
from probinfer.checks.tarp import TarpReport, tarp
from probinfer.checks.two_sample import TwoSampleReport
from probinfer.checks.uniformity import UniformityReport, holm, uniformity
from probinfer.checks.vsbc import VsbcReport, vsbc
from probinfer.inference.diagnostics import ess, nested_rhat, rhat
from probinfer.numerics.importance import psis

__all__ = [
    "Band",
    "C2STReport",
    "Detectable",
    "EvidenceSandwich",
    "JointReport",
    "KSDReport",
    "RankTable",
    "SbcReport",
    "SteinIdentityReport",
    "TarpReport",
    "TwoSampleReport",
    "UniformityReport",
    "VsbcReport",
    "band_power",
    "c2st",
    "detectable_errors",
    "ecdf_band",
    "ecdf_pvalue",
    "energy_distance",
    "ess",
    "evidence_sandwich",
    "holm",
    "joint_test",
    "ksd",
    "mmd",
    "nested_rhat",
    "posterior_sbc",
    "psis",
    "rank_table",
    "rhat",
    "sbc",
    "sbc_numpyro",
    "sliced_wasserstein",
    "stein_identity",
    "tarp",
    "uniformity",
    "vsbc",
]
