"""Sequential Monte Carlo: one Feynman-Kac core for state spaces, tempering and everything that resamples.

A model says how particles begin, move and are weighed (``FeynmanKac`` for one particle, ``BatchedFeynmanKac`` for all
at once). ``particle_filter`` returns weighted paths and an unbiased evidence; ``particle_gibbs`` a Markov chain of
paths with exactly the right law; ``conditional_filter`` is its step.
"""

from probinfer.smc.conditional import conditional_filter
from probinfer.smc.feynman_kac import BatchedFeynmanKac, FeynmanKac, lift, take
from probinfer.smc.genealogy import coalescence
from probinfer.smc.particle_filter import Result, particle_filter
from probinfer.smc.particle_gibbs import GibbsResult, particle_gibbs

__all__ = [
    "BatchedFeynmanKac",
    "FeynmanKac",
    "GibbsResult",
    "Result",
    "coalescence",
    "conditional_filter",
    "lift",
    "particle_filter",
    "particle_gibbs",
    "take",
]
