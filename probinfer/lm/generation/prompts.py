"""From prompts to token models: prompts are padded to few sizes and read once; limits and memory are checked first."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import shortened
from probinfer.lm.arguments import as_count, as_stop
from probinfer.lm.generation.proposals import Proposal
from probinfer.lm.generation.stepping import GenerationSetup
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
        max_tokens: maximum number of tokens of a text.
        max_steps: maximum number of steps; None: as many as ``max_tokens`` allows.
        stop: strings that end a text.
    """

    max_tokens: int
    max_steps: int | None
    stop: tuple[str, ...]


def encode(model: Model, prompt: Any, chat: bool) -> np.ndarray:
    """Return the tokens (T,) of a prompt: a string, messages (with ``chat``), or token ids.

    Raises:
        TypeError: the prompt is none of them.
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
            f"a prompt is a string, messages with chat=True, or token ids; got {shortened(prompt)}"
        )
    tokens = np.asarray(tokens)
    if tokens.size == 0:
        raise ValueError("the prompt is empty: a language model needs a token to begin with")
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(
            f"token ids must be one vector of integers, got {tokens.dtype} of shape {tokens.shape}"
        )
    if tokens.min() < 0 or tokens.max() >= model.network.vocab_size:
        raise ValueError(
            f"tokens must be in 0 ... {model.network.vocab_size - 1}, got {tokens.min()} ... {tokens.max()}"
        )
    return tokens.astype(np.int32)


def _encode_text(model: Model, prompt: str) -> np.ndarray:
    """Return the tokens of a text; a text that the tokenizer refuses is parsed as a task, if the model has tasks."""
    try:
        return model.tokenizer.encode(prompt)
    except ValueError:
        if model.read_task is None:
            raise
        return model.tokenizer.encode(model.read_task(prompt))


def limits_of(max_tokens: Any, max_steps: Any, stop: Any) -> Limits:
    """Check the limits that a user has given.

    Raises:
        TypeError: a count is not an integer, or ``stop`` is not strings.
        ValueError: a count is below 1, or a string is empty.
    """
    max_steps = None if max_steps is None else as_count("max_steps", max_steps)
    return Limits(as_count("max_tokens", max_tokens), max_steps, as_stop(stop))


def encode_all(model: Model, prompts: list, chat: bool) -> list[np.ndarray]:
    """Return the tokens of each prompt.

    Raises:
        TypeError: as ``encode``, with the number of the prompt.
        ValueError: likewise.
    """
    tokens = []
    for i, prompt in enumerate(prompts):
        try:
            tokens.append(encode(model, prompt, chat))
        except (TypeError, ValueError) as error:
            if len(prompts) == 1:
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"prompt {i} of {len(prompts)} (counted from 0): {error}") from error
    return tokens


def prepare(
    model: Model,
    prompts: list[np.ndarray],
    method: Any,
    potential: Potential,
    proposal: Proposal,
    limits: Limits,
    batch: int = 1,
) -> list[TokenModel]:
    """Return one token model for each prompt, all of the same shapes: the longest prompt decides the padded size.

    Args:
        model: network and tokenizer.
        prompts: tokens of each prompt.
        method: the method that will run.
        potential: the reward.
        proposal: how tokens are drawn.
        limits: where texts end.
        batch: number of prompts that will run side by side.

    Raises:
        ValueError: a prompt and its continuation do not fit into the context.
        MemoryError: the caches would not fit into the memory.
    """
    network, size = model.network, bucket(max(len(tokens) for tokens in prompts))
    _check_length([len(tokens) for tokens in prompts], limits.max_tokens, network.max_context)
    counts = {"batch": batch, "num_prompts": len(prompts), "chains": _num_chains(method)}
    check_memory(network, method.num_rows, size, limits.max_tokens, potential, **counts)
    potential = _with_room(potential, limits.max_tokens)
    rules = _rules(model, method, limits)
    num_steps = method.step.count(limits.max_tokens)
    num_steps = num_steps if limits.max_steps is None else min(num_steps, limits.max_steps)
    read = partial(_token_model, network, size, proposal, rules, potential, num_steps, limits.max_tokens)
    return [read(tokens) for tokens in prompts]


def _check_length(lengths: list[int], max_tokens: int, max_context: int) -> None:
    """Refuse a prompt that does not fit, and name its number."""
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
    """Return the number of chains of particle Gibbs; 0 for other methods."""
    repeated = getattr(method, "method", method)
    return len(getattr(repeated, "powers", (1,))) if hasattr(repeated, "num_iterations") else 0


def _with_room(potential: Potential, max_tokens: int) -> Potential:
    """Give reward models with a cache of their own room for the texts of this run, and no more."""

    def fit(leaf: Any) -> Any:
        return (
            leaf.with_room(max_tokens) if isinstance(leaf, RewardModel) and leaf.max_tokens is None else leaf
        )

    return jax.tree.map(fit, potential, is_leaf=lambda leaf: isinstance(leaf, RewardModel))


def _rules(model: Model, method: Any, limits: Limits) -> Rules:
    # special tokens have no bytes that the automaton could find, so they are recognized by their id
    special = getattr(model.tokenizer, "special_tokens", {})
    strings = tuple(string for string in limits.stop if string not in special)
    end_ids = (*model.tokenizer.eos_ids, *(special[string] for string in limits.stop if string in special))
    stop = build(strings, model.tokenizer.token_bytes) if strings else None
    eos = jnp.asarray(end_ids, jnp.int32)
    return Rules(method.step.bind(model.tokenizer, limits.max_tokens), stop, eos)


@partial(jax.jit)
def _prefill(network: Any, tokens: jax.Array, length: jax.Array) -> tuple:
    hidden, prompt = network.prefill(tokens, length)
    return network.head(hidden), prompt


def _token_model(
    network: Any,
    size: int,
    proposal: Proposal,
    rules: Rules,
    potential: Potential,
    num_steps: int,
    max_tokens: int,
    tokens: np.ndarray,
) -> TokenModel:
    """Read a prompt into the network."""
    padded = np.zeros(size, np.int32)
    padded[: len(tokens)] = tokens
    context = Context(jnp.asarray(padded), jnp.asarray(len(tokens), jnp.int32))
    logits, prompt = _prefill(network, *context)
    setup = GenerationSetup(
        network=network,
        prompt=prompt,
        context=context,
        proposal=proposal,
        rules=rules,
        potential=potential,
    )
    return TokenModel(
        setup=setup,
        logits=logits,
        limit=jnp.asarray(max_tokens, jnp.int32),
        num_steps=num_steps,
        max_tokens=max_tokens,
    )
