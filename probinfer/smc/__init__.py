"""Sequential Monte Carlo: one Feynman-Kac core for state-space models, tempering and everything that resamples.

A model says how particles start, propagate and are weighed (``FeynmanKac`` for one particle, ``BatchedFeynmanKac`` for
all at once). ``particle_filter`` returns weighted paths and an unbiased estimate of the evidence. ``particle_gibbs`` is
a Markov chain of paths with exactly the right distribution, ``conditional_filter`` its step, and
``parallel_tempering`` several such chains that exchange paths. ``guided``, ``auxiliary``, ``nested`` and
``resample_move`` turn a model into one that needs fewer particles.

``state_space`` builds a model from its distributions. ``backward_smoother`` draws paths given all data and
``two_filter`` weighs the states of each step; ``online`` filters one observation at a time in constant memory.
``from_cuthbert`` and ``from_dynamax`` take models of other libraries.

``Tempered`` is an engine for any target: posterior draws and an unbiased estimate of the evidence. ``anneal`` weighs
independent runs instead of resampling, and ``annealing`` bounds the evidence from both sides.

``Parameters`` puts priors on the parameters of a model. ``PMMH``, ``SMC2`` (with the evidence) and ``ParticleGibbs``
(parameters and path) are engines for it.

``fuse`` turns draws of sub-posteriors, each of a shard of the data, into draws of their product. ``composed`` samples
powers and products of distributions from the scores of diffusion models. ``host_potential`` weighs particles in Python.
"""

from probinfer.smc.conditional.filter import conditional_filter
from probinfer.smc.conditional.gibbs import GibbsResult, particle_gibbs
from probinfer.smc.conditional.tempering import TemperingResult, parallel_tempering
from probinfer.smc.diffusion.correctors import composed, sample_composed
from probinfer.smc.diffusion.noise import VarianceExploding, VariancePreserving
from probinfer.smc.filtering.filter import Result, particle_filter
from probinfer.smc.filtering.genealogy import coalescence
from probinfer.smc.filtering.streaming import OnlineInfo, OnlineState, online
from probinfer.smc.fusion import fuse
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac, FeynmanKac, lift, take
from probinfer.smc.models.host_potentials import host_potential
from probinfer.smc.models.interop import CuthbertModel, from_cuthbert, from_dynamax, to_cuthbert
from probinfer.smc.models.nested_steps import nested, resample_move
from probinfer.smc.models.proposals import auxiliary, guided, power
from probinfer.smc.models.state_space_model import observing, state_space
from probinfer.smc.parameters.gibbs import ParticleGibbs, ParticleGibbsInfo
from probinfer.smc.parameters.model import Parameters
from probinfer.smc.parameters.pmmh import PMMH, PMMHInfo
from probinfer.smc.parameters.smc2 import SMC2, SMC2Info
from probinfer.smc.smoothing.artificial_priors import ArtificialPrior
from probinfer.smc.smoothing.backward import SmootherResult, backward_smoother
from probinfer.smc.smoothing.two_filters import TwoFilterResult, two_filter
from probinfer.smc.tempered.annealed import AnnealedInfo, Annealing, anneal, annealing
from probinfer.smc.tempered.engine import Tempered, TemperedInfo

__all__ = [
    "PMMH",
    "SMC2",
    "AnnealedInfo",
    "Annealing",
    "ArtificialPrior",
    "BatchedFeynmanKac",
    "CuthbertModel",
    "FeynmanKac",
    "GibbsResult",
    "OnlineInfo",
    "OnlineState",
    "PMMHInfo",
    "Parameters",
    "ParticleGibbs",
    "ParticleGibbsInfo",
    "Result",
    "SMC2Info",
    "SmootherResult",
    "Tempered",
    "TemperedInfo",
    "TemperingResult",
    "TwoFilterResult",
    "VarianceExploding",
    "VariancePreserving",
    "anneal",
    "annealing",
    "auxiliary",
    "backward_smoother",
    "coalescence",
    "composed",
    "conditional_filter",
    "from_cuthbert",
    "from_dynamax",
    "fuse",
    "guided",
    "host_potential",
    "lift",
    "nested",
    "observing",
    "online",
    "parallel_tempering",
    "particle_filter",
    "particle_gibbs",
    "power",
    "resample_move",
    "sample_composed",
    "state_space",
    "take",
    "to_cuthbert",
    "two_filter",
]
