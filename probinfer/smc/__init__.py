"""Sequential Monte Carlo: one Feynman-Kac core for state spaces, tempering and everything that resamples.

A model says how particles begin, move and are weighed (``FeynmanKac`` for one particle, ``BatchedFeynmanKac`` for all
at once). ``particle_filter`` returns weighted paths and an unbiased evidence.
"""

from probinfer.smc.feynman_kac import BatchedFeynmanKac, FeynmanKac, lift, take
from probinfer.smc.genealogy import coalescence
from probinfer.smc.particle_filter import Result, particle_filter

__all__ = ["BatchedFeynmanKac", "FeynmanKac", "Result", "coalescence", "lift", "particle_filter", "take"]
