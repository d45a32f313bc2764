"""Approximations by optimisation, without a learning rate: the mode, and Gaussians in unconstrained space."""

from probinfer.vi.point import MAP, MAPInfo, maximize

__all__ = ["MAP", "MAPInfo", "maximize"]
