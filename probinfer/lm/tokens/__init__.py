"""From text to token ids and back, chat templates, and the automaton that finds delimiters.

Start with ``tokenizer`` (of a checkpoint) or ``vocabulary`` (a few words). ``texts`` decodes tokens that follow others.
"""

from probinfer.lm.tokens.automaton import Automaton, build
from probinfer.lm.tokens.chat import ChatTemplate
from probinfer.lm.tokens.texts import continuation, encode_chat
from probinfer.lm.tokens.tokenizer import Tokenizer
from probinfer.lm.tokens.vocabulary import Vocabulary

__all__ = [
    "Automaton",
    "ChatTemplate",
    "Tokenizer",
    "Vocabulary",
    "build",
    "continuation",
    "encode_chat",
]
