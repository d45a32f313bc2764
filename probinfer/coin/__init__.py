"""Particle samplers without a learning rate: coin sampling, and its constrained and latent-variable variants.

Start with ``stein_descent`` (``svgd``) and ``cloud_descent``, the step that the samplers share.
"""

from probinfer.coin.cloud.geometry import Diagonal, Full, Identity
from probinfer.coin.cloud.low_rank import LowRank
from probinfer.coin.cloud_descent import CloudInfo, CloudState, descent
from probinfer.coin.constrained.mirrored import MirroredInfo, MirroredState, mirrored_svgd, mirrored_svmd
from probinfer.coin.constrained.mirrors import BijectorMirror, Box, Orthant, Simplex, mirror_from_bijector
from probinfer.coin.constrained.repulsion import MIEDInfo, MIEDState, mied
from probinfer.coin.discrepancy_descent import KSDDescent, ksd_descent
from probinfer.coin.engine.diagnostics import particles_for, predicted_sd
from probinfer.coin.engine.reports import ParticlesInfo
from probinfer.coin.engine.svgd import SVGD
from probinfer.coin.laplacian.direction import lawgd
from probinfer.coin.laplacian.engine import LAWGD
from probinfer.coin.marginal_likelihood import EMInfo, EMState, em
from probinfer.coin.stein_descent import svgd

__all__ = [
    "LAWGD",
    "SVGD",
    "BijectorMirror",
    "Box",
    "CloudInfo",
    "CloudState",
    "Diagonal",
    "EMInfo",
    "EMState",
    "Full",
    "Identity",
    "KSDDescent",
    "LowRank",
    "MIEDInfo",
    "MIEDState",
    "MirroredInfo",
    "MirroredState",
    "Orthant",
    "ParticlesInfo",
    "Simplex",
    "descent",
    "em",
    "ksd_descent",
    "lawgd",
    "mied",
    "mirror_from_bijector",
    "mirrored_svgd",
    "mirrored_svmd",
    "particles_for",
    "predicted_sd",
    "svgd",
]
