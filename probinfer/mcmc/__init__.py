"""Markov chain Monte Carlo without settings: NUTS, HMC, and any blackjax algorithm.

``NUTS`` and ``HMC`` are engines (open ``engines`` first); ``chains`` is the algorithm that they iterate. The
transitions, the estimate of the metric and the step-size rule are blackjax's; the starting points, the warm-up pooled
over chains, its stopping rule and the choice of the metric are ours.
"""

from probinfer.mcmc.adaptation.warmup import WarmupConfig
from probinfer.mcmc.blackjax_engine import Blackjax
from probinfer.mcmc.engines import HMC, NUTS
from probinfer.mcmc.ensemble import ChainsInfo, ChainsState, Trajectories, chains
from probinfer.mcmc.lanes.hmc import HMCPosteriorSampler
from probinfer.mcmc.lanes.info import SamplerInfo
from probinfer.mcmc.lanes.nuts import NUTSPosteriorSampler
from probinfer.mcmc.lanes.sampler import posterior_sampler
from probinfer.mcmc.report import BlackjaxInfo, MCMCInfo

__all__ = [
    "HMC",
    "NUTS",
    "Blackjax",
    "BlackjaxInfo",
    "ChainsInfo",
    "ChainsState",
    "HMCPosteriorSampler",
    "MCMCInfo",
    "NUTSPosteriorSampler",
    "SamplerInfo",
    "Trajectories",
    "WarmupConfig",
    "chains",
    "posterior_sampler",
]
