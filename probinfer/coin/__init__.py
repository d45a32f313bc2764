"""Particles that are carried to a density without a learning rate."""

from probinfer.coin.descent import CloudInfo, CloudState, descent
from probinfer.coin.diagnostics import particles_for, predicted_sd
from probinfer.coin.engine import SVGD
from probinfer.coin.geometry import Diagonal, Full, Identity
from probinfer.coin.ksd_descent import KSDDescent, ksd_descent
from probinfer.coin.lawgd import lawgd
from probinfer.coin.lawgd_engine import LAWGD
from probinfer.coin.low_rank import LowRank
from probinfer.coin.reports import ParticlesInfo
from probinfer.coin.svgd import svgd

__all__ = [
    "LAWGD",
    "SVGD",
    "CloudInfo",
    "CloudState",
    "Diagonal",
    "Full",
    "Identity",
    "KSDDescent",
    "LowRank",
    "ParticlesInfo",
    "descent",
    "ksd_descent",
    "lawgd",
    "particles_for",
    "predicted_sd",
    "svgd",
]
