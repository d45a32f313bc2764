"""What one step of a particle is: until a delimiter, a number of tokens, or one token.

A step ends where its rule says so, where the text ends, or after its largest number of tokens. The rule reads the
tokens of the step alone, so the same tokens are the same step after any prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, SupportsIndex

from probinfer.core.errors import shortened
from probinfer.core.types import field, pytree
from probinfer.lm.arguments import as_count
from probinfer.lm.tokens.automaton import build

__all__ = ["Rule", "Step", "every", "until"]


@pytree
class Rule:
    """A step for one tokenizer.

    Attributes:
        automaton: finds the delimiters, or None.
        size: most tokens of a step; static.
    """

    automaton: Any
    size: int = field(static=True)


@dataclass(frozen=True, repr=False)
class Step:
    """A step before a tokenizer is known.

    Attributes:
        delimiters: none: a fixed number of tokens.
        size: most tokens.
    """

    delimiters: tuple[str, ...]
    size: int

    def bind(self, tokenizer: Any, most: int) -> Rule:
        """Return the rule for a tokenizer, in texts of at most ``most`` tokens."""
        found = build(self.delimiters, tokenizer.token_bytes) if self.delimiters else None
        return Rule(found, min(self.size, most))

    def count(self, most: int) -> int:
        """How many steps a text of at most ``most`` tokens can have."""
        return most if self.delimiters else -(-most // self.size)

    def __repr__(self) -> str:
        if not self.delimiters:
            return f"every({self.size})"
        return f"until({', '.join(map(repr, self.delimiters))}, max_tokens={self.size})"


def until(*delimiters: str, max_tokens: SupportsIndex = 256) -> Step:
    r"""A step ends with the token in which a delimiter is complete; delimiters may straddle tokens.

    Args:
        *delimiters: strings such as ``"\n\n"``.
        max_tokens: a step without delimiter ends after so many tokens.

    Raises:
        ValueError: no delimiter, an empty one, or a count below 1.
        TypeError: a delimiter is no string, or the count no integer.
    """
    if not delimiters:
        raise ValueError('until(...) needs a delimiter, such as until("\\n\\n"); every(k) needs none')
    for delimiter in delimiters:
        if not isinstance(delimiter, str):
            raise TypeError(f"a delimiter is a string, got {shortened(delimiter)}")
        if not delimiter:
            raise ValueError("an empty delimiter is everywhere: use every(1) for steps of one token")
    return Step(tuple(delimiters), as_count("max_tokens", max_tokens))


def every(num_tokens: SupportsIndex) -> Step:
    """A step is so many tokens, or what is left of the text; ``every(1)`` resamples token by token.

    Raises:
        TypeError: no integer.
        ValueError: a count below 1.
    """
    return Step((), as_count("num_tokens", num_tokens))
