"""From prompts to token models: tokens in buckets, the prompt read once, limits and memory checked before a run."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import shortened
from probinfer.lm.arguments import as_count, as_stop
from probinfer.lm.generation.proposals import Proposal
from probinfer.lm.generation.stepping import Setting
from probinfer.lm.generation.texts import Rules
from probinfer.lm.generation.token_model import TokenModel
from probinfer.lm.models.base import Context, bucket
from probinfer.lm.models.memory import check_memory
from probinfer.lm.models.model import Model
from probinfer.lm.rewards.algebra import Potential
from probinfer.lm.rewards.model import RewardModel
from probinfer.lm.tokens.automaton import build
from probinfer.lm.tokens.texts import encode_chat

__all__ = ["Limits", "encode", "encode_all", "limits_of", "prepare"]


class Limits(NamedTuple):
    """Where texts end.

    Attributes:
        max_tokens: most tokens of a text.
        max_steps: most steps, or None: as many as fit.
        stop: strings that end a text.
    """

    max_tokens: int
    max_steps: int | None
    stop: tuple[str, ...]


def encode(model: Model, prompt: Any, chat: bool) -> np.ndarray:
    """Tokens of a prompt: a string, messages (with ``chat``), or token numbers.

    Raises:
        TypeError: it is none of them.
        ValueError: it is empty, or has tokens that the network does not know.
    """
    if chat:
        tokens = encode_chat(model.tokenizer, prompt)
    elif isinstance(prompt, str):
        tokens = _encode_text(model, prompt)
    elif isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], dict):
        raise TypeError("a list of messages is a chat: pass chat=True")
    elif isinstance(prompt, (list, tuple, np.ndarray, jax.Array)):
        tokens = np.asarray(prompt)
    else:
        raise TypeError(
            f"a prompt is a string, messages with chat=True, or token numbers; got {shortened(prompt)}"
        )
    tokens = np.asarray(tokens)
    if tokens.size == 0:
        raise ValueError("the prompt is empty: a language model needs a token to begin with")
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(
            f"token numbers are one vector of integers, got {tokens.dtype} of shape {tokens.shape}"
        )
    if tokens.min() < 0 or tokens.max() >= model.network.vocab_size:
        raise ValueError(
            f"tokens must be in 0 ... {model.network.vocab_size - 1}, got {tokens.min()} ... {tokens.max()}"
        )
    return tokens.astype(np.int32)


def _encode_text(model: Model, prompt: str) -> np.ndarray:
    """Tokens of a text; one that the tokenizer refuses is read as a task of the model, if it has tasks."""
    try:
        return model.tokenizer.encode(prompt)
    except ValueError:
        if model.read_task is None:
            raise
        return model.tokenizer.encode(model.read_task(prompt))


def limits_of(max_tokens: Any, max_steps: Any, stop: Any) -> Limits:
    """Limits of what a user gave.

    Raises:
        TypeError: a count is no integer, ``stop`` no strings.
        ValueError: a count is below 1, or a string empty.
    """
    most = None if max_steps is None else as_count("max_steps", max_steps)
    return Limits(as_count("max_tokens", max_tokens), most, as_stop(stop))


def encode_all(model: Model, prompts: list, chat: bool) -> list[np.ndarray]:
    """Tokens of each prompt.

    Raises:
        TypeError: as ``encode``, with the number of the prompt.
        ValueError: likewise.
    """
    found = []
    for i, prompt in enumerate(prompts):
        try:
            found.append(encode(model, prompt, chat))
        except (TypeError, ValueError) as error:
            if len(prompts) == 1:
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"prompt {i} of {len(prompts)} (counted from 0): {error}") from error
    return found


def prepare(
    model: Model,
    prompts: list[np.ndarray],
    method: Any,
    potential: Potential,
    proposal: Proposal,
    limits: Limits,
    batch: int = 1,
) -> list[TokenModel]:
    """One token model a prompt, all of the same shapes: the longest prompt decides the bucket.

    Args:
        model: network and tokenizer.
        prompts: their tokens.
        method: what will run.
        potential: the reward.
        proposal: how tokens are drawn.
        limits: where texts end.
        batch: how many of the prompts will run side by side.

    Raises:
        ValueError: a prompt and its continuation do not fit into the context.
        MemoryError: the caches would not fit into the memory.
    """
    network, size = model.network, bucket(max(len(tokens) for tokens in prompts))
    _check_length([len(tokens) for tokens in prompts], limits.max_tokens, network.max_context)
    more = {"batch": batch, "num_prompts": len(prompts), "chains": _num_chains(method)}
    check_memory(network, method.num_rows, size, limits.max_tokens, potential, **more)
    potential = _with_room(potential, limits.max_tokens)
    rules = _rules(model, method, limits)
    steps = method.step.count(limits.max_tokens)
    steps = steps if limits.max_steps is None else min(steps, limits.max_steps)
    read = partial(_read, network, size, proposal, rules, potential, steps, limits.max_tokens)
    return [read(tokens) for tokens in prompts]


def _check_length(lengths: list[int], max_tokens: int, max_context: int) -> None:
    """Refuse a prompt that does not fit, by its number."""
    longest = max(lengths)
    if longest + max_tokens <= max_context:
        return
    which = f" ({lengths.index(longest)} of {len(lengths)}, counted from 0)" if len(lengths) > 1 else ""
    room = max_context - longest
    advice = f"max_tokens={room} fits" if room > 0 else "shorten the prompt"
    raise ValueError(
        f"the longest prompt{which} has {longest} tokens, which with max_tokens={max_tokens} is more than the context "
        f"of {max_context}: {advice}"
    )


def _num_chains(method: Any) -> int:
    repeated = getattr(method, "method", method)
    return len(getattr(repeated, "powers", (1,))) if hasattr(repeated, "num_iterations") else 0


def _with_room(potential: Potential, max_tokens: int) -> Potential:
    """Reward models with a cache of their own get room for the texts of this run, and no more."""

    def fit(leaf: Any) -> Any:
        return (
            leaf.with_room(max_tokens) if isinstance(leaf, RewardModel) and leaf.max_tokens is None else leaf
        )

    return jax.tree.map(fit, potential, is_leaf=lambda leaf: isinstance(leaf, RewardModel))


def _rules(model: Model, method: Any, limits: Limits) -> Rules:
    named = getattr(
        model.tokenizer, "special_tokens", {}
    )  # special tokens have no bytes: found by their number
    strings = tuple(string for string in limits.stop if string not in named)
    ends = (*model.tokenizer.eos_ids, *(named[string] for string in limits.stop if string in named))
    stop = build(strings, model.tokenizer.token_bytes) if strings else None
    eos = jnp.asarray(ends, jnp.int32)
    return Rules(method.step.bind(model.tokenizer, limits.max_tokens), stop, eos)


@partial(jax.jit)
def _prefill(network: Any, tokens: jax.Array, length: jax.Array) -> tuple:
    hidden, prompt = network.prefill(tokens, length)
    return network.head(hidden), prompt


def _read(
    network: Any,
    size: int,
    proposal: Proposal,
    rules: Rules,
    potential: Potential,
    num_steps: int,
    max_tokens: int,
    tokens: np.ndarray,
) -> TokenModel:
    padded = np.zeros(size, np.int32)
    padded[: len(tokens)] = tokens
    context = Context(jnp.asarray(padded), jnp.asarray(len(tokens), jnp.int32))
    logits, prompt = _prefill(network, *context)
    setting = Setting(network, prompt, context, proposal, rules, potential)
    return TokenModel(setting, logits, jnp.asarray(max_tokens, jnp.int32), num_steps, max_tokens)
