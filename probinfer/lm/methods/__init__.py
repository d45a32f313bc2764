"""Ways to sample texts, and to search them: all are passes of the same particles with the same ledger."""

from probinfer.lm.methods.adaptive import Adaptive
from probinfer.lm.methods.exact import Exact
from probinfer.lm.methods.filters import BestOfN, Greedy, MajorityVote, ParticleFilter
from probinfer.lm.methods.gibbs import ParallelTempering, ParticleGibbs
from probinfer.lm.methods.search import DVTS, BeamSearch, NestedSMC

__all__ = [
    "DVTS",
    "Adaptive",
    "BeamSearch",
    "BestOfN",
    "Exact",
    "Greedy",
    "MajorityVote",
    "NestedSMC",
    "ParallelTempering",
    "ParticleFilter",
    "ParticleGibbs",
]
