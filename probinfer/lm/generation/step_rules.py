"""Where a step of a text ends: at a delimiter, after a number of tokens, or after every token.

A step ends where its rule says so, where the text ends, or after its maximum number of tokens. The rule reads the
tokens of the step alone, so the same tokens are the same step after any prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, SupportsIndex

from probinfer.core.errors import shortened
from probinfer.core.types import field, pytree
from probinfer.lm.arguments import as_count
from probinfer.lm.tokens.automaton import build

__all__ = ["StepDetector", "StepRule", "every", "until"]


@pytree
class StepDetector:
    """A step rule for one tokenizer.

    Attributes:
        automaton: finds the delimiters, or None.
        size: maximum number of tokens of a step; static.
    """

    automaton: Any
    size: int = field(static=True)


@dataclass(frozen=True, repr=False)
class StepRule:
    """Where a step ends, before a tokenizer is known.

    Attributes:
        delimiters: strings that end a step; empty: a step is a fixed number of tokens.
        size: maximum number of tokens.
    """

    delimiters: tuple[str, ...]
    size: int

    def bind(self, tokenizer: Any, max_tokens: int) -> StepDetector:
        """Return the rule for a tokenizer, in texts of at most ``max_tokens`` tokens."""
        automaton = build(self.delimiters, tokenizer.token_bytes) if self.delimiters else None
        return StepDetector(automaton, min(self.size, max_tokens))

    def count(self, max_tokens: int) -> int:
        """Return the maximum number of steps of a text of at most ``max_tokens`` tokens."""
        return max_tokens if self.delimiters else -(-max_tokens // self.size)

    def __repr__(self) -> str:
        if not self.delimiters:
            return f"every({self.size})"
        return f"until({', '.join(map(repr, self.delimiters))}, max_tokens={self.size})"


def until(*delimiters: str, max_tokens: SupportsIndex = 256) -> StepRule:
    r"""End a step with the token that completes a delimiter; delimiters may straddle tokens.

    Args:
        *delimiters: strings such as ``"\n\n"``.
        max_tokens: a step without a delimiter ends after this many tokens.

    Raises:
        ValueError: there is no delimiter, one is empty, or the count is below 1.
        TypeError: a delimiter is not a string, or the count is not an integer.
    """
    if not delimiters:
        raise ValueError('until(...) needs a delimiter, such as until("\\n\\n"); every(k) needs none')
    for delimiter in delimiters:
        if not isinstance(delimiter, str):
            raise TypeError(f"a delimiter must be a string, got {shortened(delimiter)}")
        if not delimiter:
            raise ValueError(
                "a delimiter must not be empty, since an empty one matches everywhere: use every(1) for steps of "
                "one token"
            )
    return StepRule(tuple(delimiters), as_count("max_tokens", max_tokens))


def every(num_tokens: SupportsIndex) -> StepRule:
    """End a step after this many tokens, or at the end of the text; ``every(1)`` resamples token by token.

    Raises:
        TypeError: the count is not an integer.
        ValueError: the count is below 1.
    """
    return StepRule((), as_count("num_tokens", num_tokens))
