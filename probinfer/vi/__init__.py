"""Approximations by optimisation, without a learning rate: the mode, and Gaussians in unconstrained space."""

from probinfer.vi.engines import FullRank, MeanField
from probinfer.vi.point import MAP, MAPInfo, maximize
from probinfer.vi.report import VIInfo

__all__ = ["MAP", "FullRank", "MAPInfo", "MeanField", "VIInfo", "maximize"]
