"""Markov chain Monte Carlo without settings: NUTS, HMC, and any blackjax algorithm.

``NUTS`` and ``HMC`` are engines; ``chains`` is the algorithm they loop. The transitions, the estimate of the metric
and the step-size rule are blackjax's; ours are the starting points, the warm-up pooled over chains, its end, and the
choice of the metric.
"""

from probinfer.mcmc.adaptation.warmup import WarmupConfig
from probinfer.mcmc.blackjax_engine import Blackjax
from probinfer.mcmc.engines import HMC, NUTS
from probinfer.mcmc.ensemble import ChainsInfo, ChainsState, Trajectories, chains
from probinfer.mcmc.lanes.hmc import HmcPosteriorSampler
from probinfer.mcmc.lanes.info import SamplerInfo
from probinfer.mcmc.lanes.nuts import NutsPosteriorSampler
from probinfer.mcmc.lanes.sampler import posterior_sampler
from probinfer.mcmc.report import BlackjaxInfo, MCMCInfo

__all__ = [
    "HMC",
    "NUTS",
    "Blackjax",
    "BlackjaxInfo",
    "ChainsInfo",
    "ChainsState",
    "HmcPosteriorSampler",
    "MCMCInfo",
    "NutsPosteriorSampler",
    "SamplerInfo",
    "Trajectories",
    "WarmupConfig",
    "chains",
    "posterior_sampler",
]
