"""Given steps are read instead of drawn: in blocks of tokens, for all particles at once.

Particle Gibbs asks of every ancestor how well it continues in the reference; an exchange of paths and an enumeration
ask the same: the log density of prior and potentials of a path, after any prefix.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array
from probinfer.lm.generation import texts
from probinfer.lm.generation.stepping import (
    GenerationSetup,
    StepResult,
    advance_detector,
    end_reason,
    init_detector,
    next_token_distributions,
    of_token,
)
from probinfer.lm.generation.texts import End, Record, TextState

__all__ = ["replay_step"]

_BLOCK = 32  # tokens read at once: most steps are shorter than their maximum


def replay_step(
    setup: GenerationSetup, text: TextState, potential_state: Any, max_tokens: Array, forced: Record
) -> tuple[TextState, Any, StepResult]:
    """Read a given step, the same or another one for each row, into N texts.

    The log weight of a row is minus infinity where the step is impossible: it would have ended elsewhere, a token
    cannot follow, or the text had ended.

    Args:
        setup: what the tokens depend on.
        text: N texts.
        potential_state: state of the potential.
        max_tokens: maximum number of tokens of a text.
        forced: tokens (N, K) and length (N,); length 0 where no step is taken.

    Returns:
        The texts, the state of the potential, and the step.
    """
    running = text.ended == End.RUNNING
    active = running & (forced.length > 0)
    zeros = jnp.zeros(text.length.shape[0], text.logits.dtype)
    width = min(_BLOCK, forced.tokens.shape[1])
    tokens = jnp.pad(forced.tokens, ((0, 0), (0, -forced.tokens.shape[1] % width)))
    longest = jnp.max(jnp.where(active, forced.length, 0))

    def read_block(carry: tuple) -> tuple:
        first, cache, inner = carry
        block = lax.dynamic_slice_in_dim(tokens, first, width, axis=1)
        hidden, cache = setup.network.extend(setup.prompt, cache, block, text.length + first)
        xs = (first + jnp.arange(width), block.T, jnp.moveaxis(hidden, 1, 0))
        weigh = partial(_weigh_token, setup, max_tokens)
        inner, _ = lax.scan(lambda carry, xs: (weigh(carry, *xs), None), inner, xs)
        return first + width, cache, inner

    # Read: the cache takes whole blocks, and everything else follows token by token without it.
    inner = (
        text._replace(cache=()),
        potential_state,
        active,
        init_detector(setup, zeros.shape[0]),
        zeros,
        zeros,
    )
    carry = (jnp.int32(0), text.cache, inner)
    _, cache, inner = lax.while_loop(lambda carry: carry[0] < longest, read_block, carry)
    after, potential_state, _, _, log_prior, log_weight = inner

    # Weigh: a step that the rules end elsewhere has probability zero.
    agrees = (after.length - text.length == forced.length) & (running | (forced.length == 0))
    result = StepResult(
        record=Record(forced.tokens, forced.length),
        log_prior=log_prior,
        log_weight=jnp.where(agrees, log_weight, -jnp.inf),
        active=active,
        num_loops=jnp.max(forced.length),
    )
    return after._replace(cache=cache), potential_state, result


def _weigh_token(
    setup: GenerationSetup, max_tokens: Array, carry: tuple, j: Array, token: Array, hidden: Array
) -> tuple:
    """Weigh token j of the step in the rows where the step goes on."""
    text, potential_state, active, detector, log_prior, log_weight = carry

    # Weigh by the prior and the potentials alone: a given token has no proposal.
    prior, _, log_potentials = next_token_distributions(
        setup, text.logits, potential_state, text.tokens, text.length
    )
    log_prob = of_token(prior, token)
    weight = log_prob if log_potentials is None else log_prob + of_token(log_potentials, token)
    dead = active & (weight == -jnp.inf)

    # Append the token, and decide whether the text or the step ends with it.
    tokens, length = texts.append_token(text.tokens, text.length, token, active)
    stop, finished = texts.advance_stop(setup.rules, text, token, active)
    ended = end_reason(text.ended, dead, finished, active & (length >= max_tokens))
    detector, step_ends = advance_detector(setup, detector, token, jnp.broadcast_to(j + 1, token.shape))

    # The logits of the next token, and the state of the potential.
    logits = setup.network.head(hidden).astype(text.logits.dtype)
    logits = jnp.where(active[:, None], logits, text.logits)
    potential_state = setup.potential.advance_token(potential_state, token, active)
    log_prior = log_prior + jnp.where(active, log_prob, 0)
    log_weight = log_weight + jnp.where(active, weight, 0)
    text = TextState(cache=(), logits=logits, tokens=tokens, length=length, ended=ended, stop=stop)
    active = active & ~step_ends & (ended == End.RUNNING)
    return text, potential_state, active, detector, log_prior, log_weight
