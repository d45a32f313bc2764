r"""A language model with a reward as a batched Feynman-Kac model: what the particle filter runs.

.. math:: \gamma_t(x_{1:t}) = \prod_{s \le t} p(x_s \mid c, x_{<s})\, G_s(x_{1:s})

Step t of the model is step t + 1 of the texts. A particle holds its text, the cache of its private tokens, and the
state of the potential; the prompt is shared. Its record is the tokens of its step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from probinfer.core.types import Array, field, pytree
from probinfer.lm.generation import texts
from probinfer.lm.generation.replay import replay_step
from probinfer.lm.generation.stepping import Setting, Taken, take_step
from probinfer.lm.generation.texts import End, Record, Text
from probinfer.lm.rewards.base import View
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac

__all__ = ["Ledger", "Particles", "TokenModel", "feynman_kac", "log_target"]


class Ledger(NamedTuple):
    """What a run cost, counted inside the compiled program; scalars.

    Attributes:
        generated: tokens drawn for particles that ran.
        masked: tokens computed for particles that waited or had ended.
        scored: particles that a reward was asked about.
        rescored: tokens read again to weigh ancestors, after every particle.
        forked: rows whose cache was copied.
    """

    generated: Array
    masked: Array
    scored: Array
    rescored: Array
    forked: Array


class Particles(NamedTuple):
    """N particles.

    Attributes:
        text: ``Text``.
        state: of the potential.
        step: ``Record`` of the last step.
        log_prior: (N,) of the whole text.
        log_potential: (N,) sum of the log potentials of all steps.
        last: (N,) the last log potential of a step.
        t: () steps taken.
        ledger: ``Ledger``.
    """

    text: Text
    state: Any
    step: Record
    log_prior: Array
    log_potential: Array
    last: Array
    t: Array
    ledger: Ledger


@pytree
class TokenModel:
    """Everything that a step needs.

    Attributes:
        setting: ``Setting``.
        logits: (V,) after the prompt.
        limit: () most tokens of a text, at most ``max_tokens``.
        num_steps: most steps of a text; a text that has not ended by then is cut; static.
        max_tokens: room for tokens; static.
    """

    setting: Setting
    logits: Any
    limit: Any
    num_steps: int = field(static=True)
    max_tokens: int = field(static=True)


def feynman_kac(model: TokenModel, extend: Any = None) -> BatchedFeynmanKac:
    """The batched Feynman-Kac model of a language model with a reward.

    Args:
        model: the token model.
        extend: another way to take a step, ``extend(model, key, particles, forced) -> (particles, log_weights)``; a
            ``Partial`` or a module-level function.
    """
    extend = Partial(step) if extend is None else extend if isinstance(extend, Partial) else Partial(extend)
    return BatchedFeynmanKac(
        Partial(_init, model, extend),
        Partial(_extend, model, extend),
        gather=Partial(fork, model),
        done=Partial(_done),
        record=Partial(_record),
        log_suffix=Partial(_log_suffix, model),
    )


def empty(model: TokenModel, num: int) -> Particles:
    """Particles before the first step."""
    setting = model.setting
    text = texts.start(setting.network, model.logits, setting.rules, num, model.max_tokens)
    zeros, none = jnp.zeros(num, text.logits.dtype), jnp.zeros((), jnp.int32)
    record = Record(jnp.zeros((num, setting.rules.step.size), jnp.int32), jnp.zeros(num, jnp.int32))
    state = setting.potential.init(setting.context, num)
    return Particles(text, state, record, zeros, zeros, zeros, none, Ledger(none, none, none, none, none))


def fork(model: TokenModel, particles: Particles, ancestors: Array) -> Particles:
    """Row j of the result is row ``ancestors[j]``; what is counted is the rows that were not their own ancestor."""
    num = particles.log_prior.shape[0]
    own = (
        jnp.arange(ancestors.shape[0]) == ancestors
        if ancestors.shape[0] == num
        else jnp.zeros(len(ancestors), bool)
    )
    ledger = particles.ledger._replace(forked=particles.ledger.forked + jnp.sum(~own, dtype=jnp.int32))
    rows = {name: getattr(particles, name)[ancestors] for name in ("log_prior", "log_potential", "last")}
    return particles._replace(
        text=texts.fork(model.setting.network, particles.text, ancestors),
        state=model.setting.potential.gather(particles.state, ancestors),
        step=jax.tree.map(lambda leaf: leaf[ancestors], particles.step),
        ledger=ledger,
        **rows,
    )


def step(
    model: TokenModel, key: Array, particles: Particles, forced: Record | None
) -> tuple[Particles, Array]:
    """Draw a step for every particle and weigh it."""
    text, state, taken = take_step(key, model.setting, particles.text, particles.state, model.limit, forced)
    size = jnp.int32(taken.active.shape[0])
    drawn = jnp.sum(taken.record.length, dtype=jnp.int32)
    ledger = particles.ledger
    counted = ledger._replace(
        generated=ledger.generated + drawn, masked=ledger.masked + taken.num_loops * size - drawn
    )
    return weighed(model, particles._replace(text=text, state=state, ledger=counted), taken)


def weighed(model: TokenModel, particles: Particles, taken: Taken) -> tuple[Particles, Array]:
    """Weigh the step that was taken: log factors of the potential and of the tokens; zero where none was taken."""
    potential, text = model.setting.potential, particles.text
    last_step = particles.t + 1 >= model.num_steps
    over = taken.active & (text.ended == End.RUNNING) & last_step
    ended = jnp.where(over, int(End.MAX_STEPS), text.ended)
    cut = (ended == End.MAX_TOKENS) | (ended == End.MAX_STEPS)
    view = View(
        model.setting.context,
        text.tokens,
        text.length,
        taken.record.tokens,
        taken.record.length,
        taken.active,
        taken.active & (ended == End.FINISHED),
        taken.active & cut,
        taken.log_prior,
        particles.t,
    )
    state, value = potential.advance(particles.state, view)
    value = jnp.where(taken.active, value.astype(taken.log_weight.dtype), 0)
    weight = jnp.where(taken.log_weight == -jnp.inf, -jnp.inf, taken.log_weight + value)
    asked = potential.num_scores * jnp.sum(taken.active, dtype=jnp.int32)
    moved = Particles(
        text._replace(ended=ended.astype(jnp.int32)),
        state,
        taken.record,
        particles.log_prior + taken.log_prior,
        particles.log_potential + value,
        jnp.where(taken.active, value, particles.last),
        particles.t + 1,
        particles.ledger._replace(scored=particles.ledger.scored + asked),
    )
    return moved, weight


def log_target(model: TokenModel, particles: Particles, records: Record, t: Array) -> tuple[Array, Particles]:
    r"""Read steps t, t + 1, ... of paths into particles: log prior and potentials of all that, and where they end.

    Args:
        model: the token model.
        particles: N, which took t steps.
        records: tokens (T, K) and lengths (T,) of one path for all, or (T, N, K) and (T, N).
        t: first step to read.
    """
    num = particles.log_prior.shape[0]

    def row(at: Array) -> Record:
        now = Record(records.tokens[at], records.length[at])
        return (
            now if now.length.ndim else Record(*(jnp.broadcast_to(leaf, (num, *leaf.shape)) for leaf in now))
        )

    def going_on(carry: tuple) -> Array:
        at, _, log_weight = carry
        inside = at < records.length.shape[0]
        more = jnp.any(records.length[jnp.minimum(at, records.length.shape[0] - 1)] > 0)
        return inside & more & jnp.any(log_weight > -jnp.inf)

    def body(carry: tuple) -> tuple:
        at, now, log_weight = carry
        text, state, taken = replay_step(model.setting, now.text, now.state, model.limit, row(at))
        now, weight = weighed(model, now._replace(text=text, state=state), taken)
        read = jnp.sum(taken.record.length, dtype=jnp.int32)
        ledger = now.ledger._replace(rescored=now.ledger.rescored + read)
        return at + 1, now._replace(ledger=ledger), log_weight + weight

    zeros = jnp.zeros(num, particles.log_prior.dtype)
    _, after, log_weight = lax.while_loop(going_on, body, (jnp.asarray(t, jnp.int32), particles, zeros))
    complete = after.text.ended != End.RUNNING
    return jnp.where(complete, log_weight, -jnp.inf), after


def _init(model: TokenModel, extend: Any, key: Array, num: int, reference: Record | None = None) -> tuple:
    return extend(model, key, empty(model, num), reference)


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
    return particles.step


def _log_suffix(model: TokenModel, particles: Particles, records: Record, t: Array) -> Array:
    return log_target(model, particles, records, t)[0]
