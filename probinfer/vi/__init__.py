"""Approximations by optimisation, without a learning rate: the mode, and Gaussians in unconstrained space."""

from probinfer.vi.engines import FullRank, MeanField, VIInfo
from probinfer.vi.point import MAP, MAPInfo, maximize

__all__ = ["MAP", "FullRank", "MAPInfo", "MeanField", "VIInfo", "maximize"]
