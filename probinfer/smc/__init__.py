"""Sequential Monte Carlo: one Feynman-Kac core for state spaces, tempering and everything that resamples.

A model says how particles begin, move and are weighed (``FeynmanKac`` for one particle, ``BatchedFeynmanKac`` for all
at once). ``particle_filter`` returns weighted paths and an unbiased evidence. ``Tempered`` is an engine for any target.
"""

from probinfer.smc.feynman_kac import BatchedFeynmanKac, FeynmanKac, lift, take
from probinfer.smc.genealogy import coalescence
from probinfer.smc.particle_filter import Result, particle_filter
from probinfer.smc.tempered import Tempered, TemperedInfo

__all__ = [
    "BatchedFeynmanKac",
    "FeynmanKac",
    "Result",
    "Tempered",
    "TemperedInfo",
    "coalescence",
    "lift",
    "particle_filter",
    "take",
]
