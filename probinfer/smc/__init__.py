"""Sequential Monte Carlo: one Feynman-Kac core for state spaces, tempering and everything that resamples.

A model says how particles begin, move and are weighed (``FeynmanKac`` for one particle, ``BatchedFeynmanKac`` for all
at once). ``particle_filter`` returns weighted paths and an unbiased evidence; ``particle_gibbs`` a Markov chain of
paths with exactly the right law; ``conditional_filter`` is its step; ``parallel_tempering`` several such chains that
exchange paths. ``guided``, ``auxiliary``, ``nested`` and ``resample_move`` turn a model into one that needs fewer
particles.

``Tempered`` is an engine for any target: posterior draws and an unbiased evidence. ``anneal`` weighs independent runs
instead of resampling, and ``annealing`` bounds the evidence from both sides.

``Parameters`` puts priors on what a model depends on. ``PMMH``, ``SMC2`` (with the evidence) and ``ParticleGibbs``
(parameters and path) are engines for it.
"""

from probinfer.smc.annealed import AnnealedInfo, Annealing, anneal, annealing
from probinfer.smc.conditional import conditional_filter
from probinfer.smc.feynman_kac import BatchedFeynmanKac, FeynmanKac, lift, take
from probinfer.smc.genealogy import coalescence
from probinfer.smc.nested import nested, resample_move
from probinfer.smc.parallel_tempering import TemperingResult, parallel_tempering
from probinfer.smc.parameter_gibbs import ParticleGibbs, ParticleGibbsInfo
from probinfer.smc.parameters import Parameters
from probinfer.smc.particle_filter import Result, particle_filter
from probinfer.smc.particle_gibbs import GibbsResult, particle_gibbs
from probinfer.smc.pmmh import PMMH, PMMHInfo
from probinfer.smc.proposals import auxiliary, guided, power
from probinfer.smc.smc2 import SMC2, SMC2Info
from probinfer.smc.tempered import Tempered, TemperedInfo

__all__ = [
    "PMMH",
    "SMC2",
    "AnnealedInfo",
    "Annealing",
    "BatchedFeynmanKac",
    "FeynmanKac",
    "GibbsResult",
    "PMMHInfo",
    "Parameters",
    "ParticleGibbs",
    "ParticleGibbsInfo",
    "Result",
    "SMC2Info",
    "Tempered",
    "TemperedInfo",
    "TemperingResult",
    "anneal",
    "annealing",
    "auxiliary",
    "coalescence",
    "conditional_filter",
    "guided",
    "lift",
    "nested",
    "parallel_tempering",
    "particle_filter",
    "particle_gibbs",
    "power",
    "resample_move",
    "take",
]
