"""Checks of posteriors, each of which reports the smallest error that it could have detected.

Start with ``calibration`` (``sbc``): are posteriors right on average over simulated data? ``discrepancy`` compares
draws with other draws or with a density, ``invariance`` tests Markov kernels, ``evidence`` bounds a log evidence, and
``power`` computes detectable errors. ``draws`` defines the form of draws that the checks accept.
"""

from probinfer.checks.calibration.around_data import posterior_sbc
from probinfer.checks.calibration.bands import Band, ecdf_band, ecdf_pvalue
from probinfer.checks.calibration.coverage import TARPReport, tarp
from probinfer.checks.calibration.numpyro_models import sbc_numpyro
from probinfer.checks.calibration.rank_uniformity import UniformityReport, holm, uniformity
from probinfer.checks.calibration.ranks import RankTable, rank_table
from probinfer.checks.calibration.simulation_based import SBCReport, sbc
from probinfer.checks.calibration.symmetry import VSBCReport, vsbc
from probinfer.checks.discrepancy.classifier import C2STReport, c2st
from probinfer.checks.discrepancy.energy import energy_distance
from probinfer.checks.discrepancy.kernel_stein import KSDReport, ksd
from probinfer.checks.discrepancy.mean_discrepancy import mmd
from probinfer.checks.discrepancy.sliced import sliced_wasserstein
from probinfer.checks.discrepancy.stein_identities import SteinIdentityReport, stein_identity
from probinfer.checks.discrepancy.two_sample import TwoSampleReport
from probinfer.checks.evidence import EvidenceSandwich, evidence_sandwich
from probinfer.checks.invariance import JointReport, joint_test
from probinfer.checks.power.ranks import Detectable, band_power, detectable_errors
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
    "SBCReport",
    "SteinIdentityReport",
    "TARPReport",
    "TwoSampleReport",
    "UniformityReport",
    "VSBCReport",
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
