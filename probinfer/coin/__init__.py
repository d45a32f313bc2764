"""Particles that are carried to a density without a learning rate."""

from probinfer.coin.descent import CloudInfo, CloudState, descent
from probinfer.coin.geometry import Diagonal, Full, Identity
from probinfer.coin.low_rank import LowRank
from probinfer.coin.svgd import svgd

__all__ = ["CloudInfo", "CloudState", "Diagonal", "Full", "Identity", "LowRank", "descent", "svgd"]
