"""Methods that sample texts, and methods that search them: all run the same particles and keep the same ledger.

Start with ``base`` (the contract, and the pass that most methods share) and ``filters`` (the particle filter).
"""

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
