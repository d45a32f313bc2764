"""Particles that are carried to a density without a learning rate."""

from probinfer.coin.descent import CloudInfo, CloudState, descent
from probinfer.coin.geometry import Diagonal, Full, Identity
from probinfer.coin.ksd_descent import ksd_descent
from probinfer.coin.lawgd import lawgd
from probinfer.coin.low_rank import LowRank
from probinfer.coin.svgd import svgd

__all__ = [
    "CloudInfo",
    "CloudState",
    "Diagonal",
    "Full",
    "Identity",
    "LowRank",
    "descent",
    "ksd_descent",
    "lawgd",
    "svgd",
]
