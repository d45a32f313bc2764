r"""One step of all particles, token by token: a masked batched loop that ends when the last particle is done.

Every token is weighed by prior times factors over proposal, so that a step drawn by ``q`` carries

.. math:: \sum_j \log p(x_j) + \log g(x_j) - \log q(x_j), \qquad q \propto \mathrm{law} \cdot g

which is the log of the sum over the vocabulary where the law is the prior. Under ``vmap`` over prompts the loop stays
one loop, and what a finished particle holds is masked, not copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array, pytree
from probinfer.lm.generation import texts
from probinfer.lm.generation.proposals import draw
from probinfer.lm.generation.texts import End, Record, Text
from probinfer.lm.models.base import decode, log_softmax

__all__ = ["Setting", "Taken", "laws", "take_step"]


@pytree
class Setting:
    """What the tokens of a run depend on.

    Attributes:
        network: a ``LanguageModel``.
        prompt: what its ``prefill`` keeps.
        context: ``Context``.
        proposal: ``Proposal``.
        rules: ``Rules``.
        potential: ``Potential``.
    """

    network: Any
    prompt: Any
    context: Any
    proposal: Any
    rules: Any
    potential: Any


class Taken(NamedTuple):
    """A step that was taken.

    Attributes:
        record: the tokens.
        log_prior: (N,) log probability of the tokens under the prior.
        log_weight: (N,) of the tokens: corrections and factors of tokens; minus infinity where nothing could follow, or
            a forced path could not.
        active: (N,) who took it.
        num_loops: () tokens of the longest.
    """

    record: Record
    log_prior: Array
    log_weight: Array
    active: Array
    num_loops: Array


class _Loop(NamedTuple):
    i: Array
    active: Array
    text: Text
    potential: Any
    step: Record
    step_state: Array
    log_prior: Array
    log_weight: Array


def laws(setting: Setting, logits: Array, state: Any, tokens: Array, length: Array) -> tuple:
    """Log prior, log proposal and log factors (or None) of the next token, (N, V) each."""
    log_law = setting.proposal.log_law(logits)
    log_prior = setting.proposal.log_prior(logits, log_law)
    if not setting.potential.per_token:
        return log_prior, log_law, None
    factors = setting.potential.log_factors(state, tokens, length).astype(log_law.dtype)
    return log_prior, log_softmax(log_law + factors), factors


def take_step(
    key: Array, setting: Setting, text: Text, state: Any, max_tokens: Array, forced: Record | None = None
) -> tuple[Text, Any, Taken]:
    """Draw a step for every particle that runs.

    Args:
        key: random key.
        setting: the laws.
        text: N texts.
        state: of the potential; only its ``advance_token`` is called here.
        max_tokens: most tokens of a text, at most the room in ``text``.
        forced: the step that slot 0 takes instead of drawing it, tokens (K,) and length ().
    """
    num, size = text.length.shape[0], setting.rules.step.size
    running = text.ended == End.RUNNING
    zeros = jnp.zeros(num, text.logits.dtype)
    step = Record(jnp.zeros((num, size), jnp.int32), jnp.zeros(num, jnp.int32))
    first = _Loop(jnp.int32(0), running, text, state, step, _step_start(setting, num), zeros, zeros)
    last = _while_any(first, key, setting, max_tokens, forced)
    log_weight = last.log_weight
    if forced is not None:
        agrees = last.step.length[0] == forced.length
        log_weight = log_weight.at[0].set(jnp.where(agrees, log_weight[0], -jnp.inf))
    taken = Taken(last.step, last.log_prior, log_weight, running, last.i)
    return last.text, last.potential, taken


def _step_start(setting: Setting, num: int) -> Array:
    automaton = setting.rules.step.automaton
    if automaton is None:
        return jnp.zeros(num, jnp.int32)
    return jnp.broadcast_to(automaton.start().astype(jnp.int32), (num,))


def _while_any(first: _Loop, *args: Any) -> _Loop:
    """Loop while any particle is active; of several prompts, while any of any prompt is."""

    @jax.custom_batching.custom_vmap
    def run(loop: _Loop, args: tuple) -> _Loop:
        return lax.while_loop(lambda loop: jnp.any(loop.active), lambda loop: _token(loop, *args), loop)

    @run.def_vmap
    def run_many(size: int, batched: Any, loop: _Loop, args: tuple) -> tuple:
        loop_batched, args_batched = batched
        loop = jax.tree.map(
            lambda leaf, has: leaf if has else jnp.broadcast_to(leaf, (size, *leaf.shape)), loop, loop_batched
        )
        axes = jax.tree.map(lambda has: 0 if has else None, args_batched)
        body = jax.vmap(_token_of, in_axes=(0, axes))
        found = lax.while_loop(lambda loop: jnp.any(loop.active), lambda loop: body(loop, args), loop)
        return found, jax.tree.map(lambda _: True, found)

    return run(first, args)


def _token_of(loop: _Loop, args: tuple) -> _Loop:
    return _token(loop, *args)


def _token(loop: _Loop, key: Array, setting: Setting, max_tokens: Array, forced: Record | None) -> _Loop:
    """Draw, weigh and write one token of every active particle, and read it."""
    text, active = loop.text, loop.active
    log_prior, log_proposal, factors = laws(setting, text.logits, loop.potential, text.tokens, text.length)
    token = draw(jax.random.fold_in(key, loop.i), log_proposal)
    if forced is not None:
        planned = forced.tokens[jnp.minimum(loop.i, forced.tokens.shape[0] - 1)]
        token = token.at[0].set(jnp.where(loop.i < forced.length, planned, token[0]))

    def of_token(log_probs: Array) -> Array:
        return jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]

    prior, proposed = of_token(log_prior), of_token(log_proposal)
    weight = prior - proposed + (0 if factors is None else of_token(factors))
    weight = jnp.where(proposed == -jnp.inf, -jnp.inf, weight)
    dead = active & (weight == -jnp.inf)
    tokens, length = texts.append(text, token, active)
    stop, finished = texts.stop_hit(setting.rules, text, token, active)
    ended = _ending(text.ended, dead, finished, active & (length >= max_tokens))
    rows = jnp.arange(token.shape[0])
    place = jnp.where(active, loop.step.length, loop.step.tokens.shape[1])
    step = Record(loop.step.tokens.at[rows, place].set(token, mode="drop"), loop.step.length + active)
    step_state, step_over = _step_over(setting, loop.step_state, token, step.length)
    logits, cache = decode(setting.network, setting.prompt, text.cache, token, text.length)
    logits = jnp.where(active[:, None], logits.astype(text.logits.dtype), text.logits)
    potential = setting.potential.advance_token(loop.potential, token, active)
    return _Loop(
        loop.i + 1,
        active & ~step_over & (ended == End.RUNNING),
        Text(cache, logits, tokens, length, ended, stop),
        potential,
        step,
        step_state,
        loop.log_prior + jnp.where(active, prior, 0),
        loop.log_weight + jnp.where(active, weight, 0),
    )


def _ending(ended: Array, dead: Array, finished: Array, full: Array) -> Array:
    reason = jnp.where(full, int(End.MAX_TOKENS), int(End.RUNNING))
    reason = jnp.where(finished, int(End.FINISHED), reason)
    reason = jnp.where(dead, int(End.DEAD), reason)
    return jnp.where(ended == End.RUNNING, reason, ended).astype(jnp.int32)


def _step_over(setting: Setting, state: Array, token: Array, length: Array) -> tuple[Array, Array]:
    rule = setting.rules.step
    over = length >= rule.size
    if rule.automaton is None:
        return state, over
    state = rule.automaton.step(state, token).astype(jnp.int32)
    return state, over | rule.automaton.hit(state)
