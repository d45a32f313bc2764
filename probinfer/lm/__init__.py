"""Language models as state-space models: inference-time scaling by particles, inside one compiled program.

``load`` reads a Hugging Face folder, ``reasoner`` the small model that comes with the library. ``infer`` samples texts
from the model times a reward by a method, and votes on their answers; ``stream`` yields its steps as they happen.
``evidence_bounds`` bounds the log evidence of a prompt from both sides. ``rewards`` defines what a reward means;
``Tabular`` and ``Exact`` are a model and a method whose answers are known exactly. Open ``facade`` first.
"""

from probinfer.lm import answers, reasoner, rewards
from probinfer.lm.answers import selectors
from probinfer.lm.answers.ancestry import Genealogy, genealogy
from probinfer.lm.answers.result import Answers, Cost
from probinfer.lm.evidence import EvidenceBounds, evidence_bounds
from probinfer.lm.facade import infer, stream
from probinfer.lm.generation.events import Event
from probinfer.lm.generation.proposals import Proposal
from probinfer.lm.generation.step_rules import every, until
from probinfer.lm.generation.texts import End
from probinfer.lm.methods.adaptive import Adaptive
from probinfer.lm.methods.exact import Exact
from probinfer.lm.methods.filters import BestOfN, Greedy, MajorityVote, ParticleFilter
from probinfer.lm.methods.gibbs import ParallelTempering, ParticleGibbs
from probinfer.lm.methods.search import DVTS, BeamSearch, NestedSMC
from probinfer.lm.models import checkpoints
from probinfer.lm.models.base import LanguageModel
from probinfer.lm.models.folder import load
from probinfer.lm.models.model import Model
from probinfer.lm.models.tabular import Tabular
from probinfer.lm.tokens.tokenizer import Tokenizer
from probinfer.lm.tokens.vocabulary import Vocabulary

__all__ = [
    "DVTS",
    "Adaptive",
    "Answers",
    "BeamSearch",
    "BestOfN",
    "Cost",
    "End",
    "Event",
    "EvidenceBounds",
    "Exact",
    "Genealogy",
    "Greedy",
    "LanguageModel",
    "MajorityVote",
    "Model",
    "NestedSMC",
    "ParallelTempering",
    "ParticleFilter",
    "ParticleGibbs",
    "Proposal",
    "Tabular",
    "Tokenizer",
    "Vocabulary",
    "answers",
    "checkpoints",
    "every",
    "evidence_bounds",
    "genealogy",
    "infer",
    "load",
    "reasoner",
    "rewards",
    "selectors",
    "stream",
    "until",
]
