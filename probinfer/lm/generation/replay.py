"""Given steps read instead of drawn: in blocks of tokens, for all particles at once.

What particle Gibbs asks of every ancestor (how well does it continue in the reference?), what an exchange of paths and
an enumeration need: the log density of prior and potentials of a path, after any prefix.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array
from probinfer.lm.generation import texts
from probinfer.lm.generation.stepping import Setting, Taken, _ending, _step_over, _step_start, laws
from probinfer.lm.generation.texts import End, Record, Text

__all__ = ["replay_step"]

_BLOCK = 32  # tokens read at once: steps are shorter than the room for them


def replay_step(
    setting: Setting, text: Text, state: Any, max_tokens: Array, forced: Record
) -> tuple[Text, Any, Taken]:
    """Read the same or different steps into N texts.

    The log weight of a row is minus infinity where the step could not have been taken: it would have ended elsewhere, a
    token cannot follow, or the text had ended.

    Args:
        setting: the laws.
        text: N texts.
        state: of the potential.
        max_tokens: most tokens of a text.
        forced: tokens (N, K), length (N,); length 0 where no step is taken.
    """
    running = text.ended == End.RUNNING
    taking = running & (forced.length > 0)
    zeros = jnp.zeros(text.length.shape[0], text.logits.dtype)
    width = min(_BLOCK, forced.tokens.shape[1])
    tokens = jnp.pad(forced.tokens, ((0, 0), (0, -forced.tokens.shape[1] % width)))
    longest = jnp.max(jnp.where(taking, forced.length, 0))

    def block(carry: tuple) -> tuple:
        first, cache, (rest, *others) = carry
        part = lax.dynamic_slice_in_dim(tokens, first, width, axis=1)
        hidden, cache = setting.network.extend(setting.prompt, cache, part, text.length + first)
        xs = (first + jnp.arange(width), part.T, jnp.moveaxis(hidden, 1, 0))
        read = partial(_read, setting, max_tokens)
        following, _ = lax.scan(lambda carry, xs: (read(carry, *xs), None), (rest, *others), xs)
        return first + width, cache, following

    inner = (text._replace(cache=()), state, taking, _step_start(setting, zeros.shape[0]), zeros, zeros)
    carry = (jnp.int32(0), text.cache, inner)
    _, cache, inner = lax.while_loop(lambda carry: carry[0] < longest, block, carry)
    rest, state, _, _, log_prior, log_weight = inner
    took = rest.length - text.length
    agrees = (took == forced.length) & (running | (forced.length == 0))
    log_weight = jnp.where(agrees, log_weight, -jnp.inf)
    record = Record(forced.tokens, forced.length)
    taken = Taken(record, log_prior, log_weight, taking, jnp.max(forced.length))
    return rest._replace(cache=cache), state, taken


def _read(setting: Setting, max_tokens: Array, carry: tuple, j: Array, token: Array, hidden: Array) -> tuple:
    """Weigh token j of the step where it is still going on."""
    text, state, active, step_state, log_prior, log_weight = carry
    prior, _, factors = laws(setting, text.logits, state, text.tokens, text.length)

    def of_token(log_probs: Array) -> Array:
        return jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]

    own = of_token(prior)
    weight = own if factors is None else own + of_token(factors)
    dead = active & (weight == -jnp.inf)
    tokens, length = texts.append(text, token, active)
    stop, finished = texts.stop_hit(setting.rules, text, token, active)
    ended = _ending(text.ended, dead, finished, active & (length >= max_tokens))
    step_state, over = _step_over(setting, step_state, token, jnp.broadcast_to(j + 1, token.shape))
    logits = setting.network.head(hidden).astype(text.logits.dtype)
    logits = jnp.where(active[:, None], logits, text.logits)
    state = setting.potential.advance_token(state, token, active)
    log_prior = log_prior + jnp.where(active, own, 0)
    log_weight = log_weight + jnp.where(active, weight, 0)
    text = Text((), logits, tokens, length, ended, stop)
    return text, state, active & ~over & (ended == End.RUNNING), step_state, log_prior, log_weight
