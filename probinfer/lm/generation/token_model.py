r"""A language model with a reward as a batched Feynman-Kac model: what the particle filter runs.

.. math:: \gamma_t(x_{1:t}) = \prod_{s \le t} p(x_s \mid c, x_{<s})\, G_s(x_{1:s})

Step t of the model is step t + 1 of the texts. A particle holds its text, the cache of its private tokens, and the
state of the potential; the prompt is shared. Its record is the tokens of its last step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from probinfer.core.types import Array, ArrayTree, Float, Int, field, pytree
from probinfer.lm.generation import texts
from probinfer.lm.generation.replay import replay_step
from probinfer.lm.generation.stepping import GenerationSetup, StepResult, sample_step
from probinfer.lm.generation.texts import End, Record, TextState
from probinfer.lm.rewards.base import View
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac

__all__ = [
    "Ledger",
    "Particles",
    "TokenModel",
    "extend_particles",
    "feynman_kac",
    "fork_particles",
    "init_particles",
    "log_target",
]


class Ledger(NamedTuple):
    """What a run cost, counted inside the compiled program.

    Attributes:
        generated: () tokens drawn for particles whose step went on.
        masked: () tokens computed for particles that waited or had ended.
        scored: () particles that a reward was asked about.
        rescored: () tokens read again after every particle, to weigh ancestors.
        forked: () rows whose cache was copied.
    """

    generated: Int[Array, ""]
    masked: Int[Array, ""]
    scored: Int[Array, ""]
    rescored: Int[Array, ""]
    forked: Int[Array, ""]


class Particles(NamedTuple):
    """N particles.

    Attributes:
        text: the texts and their caches.
        potential_state: state of the potential.
        last_step: tokens of the last step.
        log_prior: (N,) log probability of the whole text under the prior, sum_s log p(x_s | c, x_{<s}).
        log_potential: (N,) sum of the log potentials of all steps, sum_s log G_s.
        last_log_potential: (N,) log potential of the last step that the particle took.
        t: () steps taken.
        ledger: what the run has cost so far.
    """

    text: TextState
    potential_state: ArrayTree
    last_step: Record
    log_prior: Float[Array, " N"]
    log_potential: Float[Array, " N"]
    last_log_potential: Float[Array, " N"]
    t: Int[Array, ""]
    ledger: Ledger


@pytree
class TokenModel:
    """Everything that a step needs.

    Attributes:
        setup: what the tokens depend on.
        logits: (V,) logits of the first token after the prompt.
        limit: () maximum number of tokens of a text, at most ``max_tokens``.
        num_steps: maximum number of steps; a text that has not ended by then is cut; static.
        max_tokens: room for the tokens of a text; static.
    """

    setup: GenerationSetup
    logits: Any
    limit: Any
    num_steps: int = field(static=True)
    max_tokens: int = field(static=True)


def feynman_kac(model: TokenModel, extend: Any = None) -> BatchedFeynmanKac:
    """Return the batched Feynman-Kac model of a language model with a reward.

    Args:
        model: the token model.
        extend: how to take a step, ``extend(model, key, particles, forced) -> (particles, log_weights)``; a ``Partial``
            or a module-level function. None: ``extend_particles``.
    """
    if not isinstance(extend, Partial):
        extend = Partial(extend_particles if extend is None else extend)
    return BatchedFeynmanKac(
        Partial(_init, model, extend),
        Partial(_extend, model, extend),
        gather=Partial(fork_particles, model),
        done=Partial(_done),
        record=Partial(_record),
        log_suffix=Partial(_log_suffix, model),
    )


def init_particles(model: TokenModel, num: int) -> Particles:
    """Return particles before the first step."""
    setup = model.setup
    text = texts.init_texts(setup.network, model.logits, setup.rules, num, model.max_tokens)
    zeros, zero = jnp.zeros(num, text.logits.dtype), jnp.zeros((), jnp.int32)
    return Particles(
        text=text,
        potential_state=setup.potential.init(setup.context, num),
        last_step=Record(jnp.zeros((num, setup.rules.step.size), jnp.int32), jnp.zeros(num, jnp.int32)),
        log_prior=zeros,
        log_potential=zeros,
        last_log_potential=zeros,
        t=zero,
        ledger=Ledger(generated=zero, masked=zero, scored=zero, rescored=zero, forked=zero),
    )


def fork_particles(model: TokenModel, particles: Particles, ancestors: Array) -> Particles:
    """Row j of the result is row ``ancestors[j]``; the ledger counts the rows that are not their own ancestors."""
    num = particles.log_prior.shape[0]
    is_own_ancestor = (
        jnp.arange(ancestors.shape[0]) == ancestors
        if ancestors.shape[0] == num
        else jnp.zeros(len(ancestors), bool)
    )
    num_forked = jnp.sum(~is_own_ancestor, dtype=jnp.int32)
    names = ("log_prior", "log_potential", "last_log_potential")
    return particles._replace(
        text=texts.fork(model.setup.network, particles.text, ancestors),
        potential_state=model.setup.potential.gather(particles.potential_state, ancestors),
        last_step=jax.tree.map(lambda leaf: leaf[ancestors], particles.last_step),
        ledger=particles.ledger._replace(forked=particles.ledger.forked + num_forked),
        **{name: getattr(particles, name)[ancestors] for name in names},
    )


def extend_particles(
    model: TokenModel, key: Array, particles: Particles, forced: Record | None
) -> tuple[Particles, Array]:
    """Draw a step for every particle and weigh it.

    Args:
        model: the token model.
        key: random key.
        particles: N particles.
        forced: the step that particle 0 takes instead of drawing one; None: all are drawn.
    """
    # Propagate
    text, potential_state, result = sample_step(
        key, model.setup, particles.text, particles.potential_state, model.limit, forced
    )
    num = jnp.int32(result.active.shape[0])
    num_drawn = jnp.sum(result.record.length, dtype=jnp.int32)
    ledger = particles.ledger
    ledger = ledger._replace(
        generated=ledger.generated + num_drawn,
        masked=ledger.masked + result.num_loops * num - num_drawn,
    )
    # Weigh
    particles = particles._replace(text=text, potential_state=potential_state, ledger=ledger)
    return weigh_step(model, particles, result)


def weigh_step(model: TokenModel, particles: Particles, result: StepResult) -> tuple[Particles, Array]:
    """Weigh the step that was taken.

    Args:
        model: the token model.
        particles: N particles, with the texts after the step and everything else from before it.
        result: the step.

    Returns:
        The particles after the step, and log weights (N,): of the tokens plus that of the potential; zero for particles
        that took no step.
    """
    potential, text = model.setup.potential, particles.text

    # A text that goes on after the last step is cut there.
    is_last = particles.t + 1 >= model.num_steps
    is_cut = result.active & (text.ended == End.RUNNING) & is_last
    ended = jnp.where(is_cut, int(End.MAX_STEPS), text.ended)
    truncated = (ended == End.MAX_TOKENS) | (ended == End.MAX_STEPS)

    # Weigh: where the tokens are impossible the potential is not added, since -inf + inf is NaN.
    view = View(
        context=model.setup.context,
        tokens=text.tokens,
        length=text.length,
        step_tokens=result.record.tokens,
        step_length=result.record.length,
        active=result.active,
        finished=result.active & (ended == End.FINISHED),
        truncated=result.active & truncated,
        step_log_prob=result.log_prior,
        t=particles.t,
    )
    potential_state, log_potential = potential.advance(particles.potential_state, view)
    log_potential = jnp.where(result.active, log_potential.astype(result.log_weight.dtype), 0)
    log_weight = jnp.where(result.log_weight == -jnp.inf, -jnp.inf, result.log_weight + log_potential)

    num_scored = potential.num_scores * jnp.sum(result.active, dtype=jnp.int32)
    after = Particles(
        text=text._replace(ended=ended.astype(jnp.int32)),
        potential_state=potential_state,
        last_step=result.record,
        log_prior=particles.log_prior + result.log_prior,
        log_potential=particles.log_potential + log_potential,
        last_log_potential=jnp.where(result.active, log_potential, particles.last_log_potential),
        t=particles.t + 1,
        ledger=particles.ledger._replace(scored=particles.ledger.scored + num_scored),
    )
    return after, log_weight


def log_target(model: TokenModel, particles: Particles, records: Record, t: Array) -> tuple[Array, Particles]:
    r"""Read steps t, t + 1, ... of paths into particles, and return the log prior and potentials of these steps.

    Args:
        model: the token model.
        particles: N particles, which took t steps.
        records: tokens (T, K) and lengths (T,) of one path for all, or (T, N, K) and (T, N).
        t: first step to read.

    Returns:
        Log densities (N,), minus infinity where a path is impossible or does not end; and the particles at its end.
    """
    num = particles.log_prior.shape[0]

    def record_at(i: Array) -> Record:
        record = Record(records.tokens[i], records.length[i])
        if record.length.ndim:
            return record
        return Record(*(jnp.broadcast_to(leaf, (num, *leaf.shape)) for leaf in record))

    def is_unfinished(carry: tuple) -> Array:
        i, _, log_weight = carry
        inside = i < records.length.shape[0]
        has_step = jnp.any(records.length[jnp.minimum(i, records.length.shape[0] - 1)] > 0)
        return inside & has_step & jnp.any(log_weight > -jnp.inf)

    def read_step(carry: tuple) -> tuple:
        i, now, log_weight = carry
        text, potential_state, result = replay_step(
            model.setup, now.text, now.potential_state, model.limit, record_at(i)
        )
        now, weight = weigh_step(model, now._replace(text=text, potential_state=potential_state), result)
        num_read = jnp.sum(result.record.length, dtype=jnp.int32)
        ledger = now.ledger._replace(rescored=now.ledger.rescored + num_read)
        return i + 1, now._replace(ledger=ledger), log_weight + weight

    zeros = jnp.zeros(num, particles.log_prior.dtype)
    start = (jnp.asarray(t, jnp.int32), particles, zeros)
    _, after, log_weight = lax.while_loop(is_unfinished, read_step, start)
    complete = after.text.ended != End.RUNNING
    return jnp.where(complete, log_weight, -jnp.inf), after


def _init(model: TokenModel, extend: Any, key: Array, num: int, reference: Record | None = None) -> tuple:
    return extend(model, key, init_particles(model, num), reference)


def _extend(
    model: TokenModel,
    extend: Any,
    key: Array,
    particles: Particles,
    t: Array,
    reference: Record | None = None,
) -> tuple:
    return extend(model, key, particles, reference)


def _done(particles: Particles) -> Array:
    return particles.text.ended != End.RUNNING


def _record(particles: Particles) -> Record:
    return particles.last_step


def _log_suffix(model: TokenModel, particles: Particles, records: Record, t: Array) -> Array:
    return log_target(model, particles, records, t)[0]
