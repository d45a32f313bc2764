"""Particles that are carried to a density without a learning rate."""

from probinfer.coin.descent import CloudInfo, CloudState, descent
from probinfer.coin.diagnostics import particles_for, predicted_sd
from probinfer.coin.engine import SVGD
from probinfer.coin.geometry import Diagonal, Full, Identity
from probinfer.coin.low_rank import LowRank
from probinfer.coin.reports import ParticlesInfo
from probinfer.coin.svgd import svgd

__all__ = [
    "SVGD",
    "CloudInfo",
    "CloudState",
    "Diagonal",
    "Full",
    "Identity",
    "LowRank",
    "ParticlesInfo",
    "descent",
    "particles_for",
    "predicted_sd",
    "svgd",
]
