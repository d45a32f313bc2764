"""Approximations by optimization, without a learning rate: the mode, and Gaussians in unconstrained space.

Open ``engines`` first: ``MeanField`` and ``FullRank`` fit a Gaussian (``fitting``, ``gaussian``) and weigh its draws
(``weighing``). ``point`` finds the mode.
"""

from probinfer.vi.engines import FullRank, MeanField
from probinfer.vi.point import MAP, MAPInfo, maximize
from probinfer.vi.report import VIInfo

__all__ = ["MAP", "FullRank", "MAPInfo", "MeanField", "VIInfo", "maximize"]
