r"""One step of all particles, token by token: a masked batched loop that ends when the last particle is done.

Every token is weighed by prior times token potential over proposal, so that a step drawn by ``q`` carries

.. math:: \sum_j \log p(x_j) + \log g(x_j) - \log q(x_j), \qquad q \propto \mathrm{proposal} \cdot g

which is the log of the sum over the vocabulary where the proposal is the prior. Under ``vmap`` over prompts the loop
stays one loop, and the state of a finished particle is masked, not copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, pytree
from probinfer.lm.generation import texts
from probinfer.lm.generation.proposals import draw
from probinfer.lm.generation.texts import End, Record, TextState
from probinfer.lm.models.base import decode, log_softmax

__all__ = [
    "GenerationSetup",
    "StepResult",
    "advance_detector",
    "end_reason",
    "init_detector",
    "next_token_distributions",
    "of_token",
    "sample_step",
]


@pytree
class GenerationSetup:
    """What the tokens of a run depend on.

    Attributes:
        network: a ``LanguageModel``.
        prompt: what its ``prefill`` keeps of the prompt.
        context: ``Context``, the tokens of the prompt.
        proposal: ``Proposal``.
        rules: ``Rules``, where steps and texts end.
        potential: ``Potential``.
    """

    network: Any
    prompt: Any
    context: Any
    proposal: Any
    rules: Any
    potential: Any


class StepResult(NamedTuple):
    """One step of N particles.

    Attributes:
        record: the tokens of the step.
        log_prior: (N,) log probability of the tokens under the prior.
        log_weight: (N,) log weight of the tokens: log prior - log proposal + log token potentials; minus infinity where
            no token could follow, or where a forced step was impossible.
        active: (N,) whether the particle took the step.
        num_loops: () number of tokens of the longest step.
    """

    record: Record
    log_prior: Float[Array, " N"]
    log_weight: Float[Array, " N"]
    active: Bool[Array, " N"]
    num_loops: Int[Array, ""]


class _TokenLoopState(NamedTuple):
    """State of the loop over the tokens of one step.

    Attributes:
        i: () index of the next token.
        active: (N,) whether the step of the particle goes on.
        text: the texts so far.
        potential_state: state of the potential.
        record: tokens of the step so far.
        detector: (N,) state of the step detector.
        log_prior: (N,) as in ``StepResult``.
        log_weight: (N,) as in ``StepResult``.
    """

    i: Int[Array, ""]
    active: Bool[Array, " N"]
    text: TextState
    potential_state: ArrayTree
    record: Record
    detector: Int[Array, " N"]
    log_prior: Float[Array, " N"]
    log_weight: Float[Array, " N"]


def next_token_distributions(
    setup: GenerationSetup, logits: Array, potential_state: Any, tokens: Array, length: Array
) -> tuple:
    """Return log prior, log proposal and log token potentials (or None) of the next token, (N, V) each."""
    base = setup.proposal.log_probs(logits)
    log_prior = setup.proposal.log_prior(logits, base)
    if not setup.potential.per_token:
        return log_prior, base, None
    log_potentials = setup.potential.log_token_potentials(potential_state, tokens, length).astype(base.dtype)
    return log_prior, log_softmax(base + log_potentials), log_potentials


def sample_step(
    key: Array,
    setup: GenerationSetup,
    text: TextState,
    potential_state: Any,
    max_tokens: Array,
    forced: Record | None = None,
) -> tuple[TextState, Any, StepResult]:
    """Draw a step for every particle whose text has not ended.

    Args:
        key: random key.
        setup: what the tokens depend on.
        text: N texts.
        potential_state: state of the potential; of the potential only ``advance_token`` is called here.
        max_tokens: maximum number of tokens of a text, at most the room in ``text``.
        forced: the step that particle 0 takes instead of drawing one, tokens (K,) and length ().

    Returns:
        The texts, the state of the potential, and the step.
    """
    num, size = text.length.shape[0], setup.rules.step.size
    running = text.ended == End.RUNNING
    zeros = jnp.zeros(num, text.logits.dtype)
    first = _TokenLoopState(
        i=jnp.int32(0),
        active=running,
        text=text,
        potential_state=potential_state,
        record=Record(jnp.zeros((num, size), jnp.int32), jnp.zeros(num, jnp.int32)),
        detector=init_detector(setup, num),
        log_prior=zeros,
        log_weight=zeros,
    )
    last = _loop_while_active(first, key, setup, max_tokens, forced)
    log_weight = last.log_weight
    if forced is not None:
        # A forced step that the rules end elsewhere has probability zero.
        agrees = last.record.length[0] == forced.length
        log_weight = log_weight.at[0].set(jnp.where(agrees, log_weight[0], -jnp.inf))
    result = StepResult(
        record=last.record,
        log_prior=last.log_prior,
        log_weight=log_weight,
        active=running,
        num_loops=last.i,
    )
    return last.text, last.potential_state, result


def init_detector(setup: GenerationSetup, num: int) -> Array:
    """Return the states (N,) of the step detector before the first token of a step."""
    automaton = setup.rules.step.automaton
    if automaton is None:
        return jnp.zeros(num, jnp.int32)
    return jnp.broadcast_to(automaton.start().astype(jnp.int32), (num,))


def advance_detector(
    setup: GenerationSetup, state: Array, token: Array, length: Array
) -> tuple[Array, Array]:
    """Return the states (N,) after one more token, and whether the step ends with it.

    Args:
        setup: holds the step detector.
        state: states before the token.
        token: (N,) the token.
        length: (N,) number of tokens of the step, this one included.
    """
    detector = setup.rules.step
    ends = length >= detector.size
    if detector.automaton is None:
        return state, ends
    state = detector.automaton.step(state, token).astype(jnp.int32)
    return state, ends | detector.automaton.hit(state)


def end_reason(ended: Array, dead: Array, finished: Array, full: Array) -> Array:
    """Return an ``End`` for each text: death before an end token or stop string, and these before the limit."""
    reason = jnp.where(full, int(End.MAX_TOKENS), int(End.RUNNING))
    reason = jnp.where(finished, int(End.FINISHED), reason)
    reason = jnp.where(dead, int(End.DEAD), reason)
    return jnp.where(ended == End.RUNNING, reason, ended).astype(jnp.int32)


def of_token(values: Array, token: Array) -> Array:
    """Return ``values[n, token[n]]`` of values (N, V)."""
    return jnp.take_along_axis(values, token[:, None], axis=1)[:, 0]


def _loop_while_active(first: _TokenLoopState, *args: Any) -> _TokenLoopState:
    """Loop while any particle is active; of several prompts, while any particle of any prompt is.

    Without a rule of its own, ``vmap`` of a ``while_loop`` with a batched condition selects between the old and the new
    state in every round, and so copies the caches. Here inactive particles are masked in the body already.
    """

    @jax.custom_batching.custom_vmap
    def run(state: _TokenLoopState, args: tuple) -> _TokenLoopState:
        return lax.while_loop(
            lambda state: jnp.any(state.active), lambda state: _sample_token(state, args), state
        )

    @run.def_vmap
    def run_many(size: int, batched: Any, state: _TokenLoopState, args: tuple) -> tuple:
        state_batched, args_batched = batched
        state = jax.tree.map(
            lambda leaf, has: leaf if has else jnp.broadcast_to(leaf, (size, *leaf.shape)),
            state,
            state_batched,
        )
        axes = jax.tree.map(lambda has: 0 if has else None, args_batched)
        body = jax.vmap(_sample_token, in_axes=(0, axes))
        last = lax.while_loop(lambda state: jnp.any(state.active), lambda state: body(state, args), state)
        return last, jax.tree.map(lambda _: True, last)

    return run(first, args)


def _sample_token(loop: _TokenLoopState, args: tuple) -> _TokenLoopState:
    """Draw, weigh and append one token of every active particle, and read it into the cache."""
    key, setup, max_tokens, forced = args
    text, active = loop.text, loop.active

    # Propagate: draw the next token, or take that of the forced step.
    log_prior, log_proposal, log_potentials = next_token_distributions(
        setup, text.logits, loop.potential_state, text.tokens, text.length
    )
    token = draw(jax.random.fold_in(key, loop.i), log_proposal)
    if forced is not None:
        planned = forced.tokens[jnp.minimum(loop.i, forced.tokens.shape[0] - 1)]
        token = token.at[0].set(jnp.where(loop.i < forced.length, planned, token[0]))

    # Weigh: log p + log g - log q. Where q is zero the difference could be NaN, and the token is impossible.
    prior, proposed = of_token(log_prior, token), of_token(log_proposal, token)
    weight = prior - proposed + (0 if log_potentials is None else of_token(log_potentials, token))
    weight = jnp.where(proposed == -jnp.inf, -jnp.inf, weight)
    dead = active & (weight == -jnp.inf)

    # Append the token, and decide whether the text or the step ends with it.
    tokens, length = texts.append_token(text.tokens, text.length, token, active)
    stop, finished = texts.advance_stop(setup.rules, text, token, active)
    ended = end_reason(text.ended, dead, finished, active & (length >= max_tokens))
    record = Record(*texts.append_token(loop.record.tokens, loop.record.length, token, active))
    detector, step_ends = advance_detector(setup, loop.detector, token, record.length)

    # Read the token: the logits of the next one, and the state of the potential.
    logits, cache = decode(setup.network, setup.prompt, text.cache, token, text.length)
    logits = jnp.where(active[:, None], logits.astype(text.logits.dtype), text.logits)
    potential_state = setup.potential.advance_token(loop.potential_state, token, active)
    return _TokenLoopState(
        i=loop.i + 1,
        active=active & ~step_ends & (ended == End.RUNNING),
        text=TextState(cache=cache, logits=logits, tokens=tokens, length=length, ended=ended, stop=stop),
        potential_state=potential_state,
        record=record,
        detector=detector,
        log_prior=loop.log_prior + jnp.where(active, prior, 0),
        log_weight=loop.log_weight + jnp.where(active, weight, 0),
    )
