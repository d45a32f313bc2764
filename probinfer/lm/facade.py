"""From prompts to answers: the facade."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import check_key, warn_interrupted
from probinfer.core.identity import notice
from probinfer.core.status import Status
from probinfer.core.types import PRNGKey
from probinfer.lm.answers import notices
from probinfer.lm.answers import reading as extractors
from probinfer.lm.answers.result import Answers, Cost
from probinfer.lm.arguments import as_count, check_answer, check_watch
from probinfer.lm.generation import events
from probinfer.lm.generation.events import make_step_callback
from probinfer.lm.generation.prompts import encode_all, limits_of, prepare
from probinfer.lm.generation.proposals import Proposal, as_proposal
from probinfer.lm.generation.token_model import TokenModel
from probinfer.lm.methods.adaptive import Adaptive, run_adaptively
from probinfer.lm.methods.base import Draws, check_method, has_evidence
from probinfer.lm.methods.filters import ParticleFilter
from probinfer.lm.models.model import Model, check_model
from probinfer.lm.rewards.algebra import Nothing, Potential
from probinfer.lm.rewards.deferred import bind
from probinfer.lm.rewards.host.registry import detached
from probinfer.lm.tokens.texts import continuation
from probinfer.running import interrupts
from probinfer.running import progress as bars

__all__ = ["infer", "run_prepared", "stream"]


def infer(
    key: PRNGKey,
    model: Any,
    prompt: Any,
    reward: Any = None,
    method: Any = None,
    *,
    answer: Callable[[str], str | None] | None = None,
    stop: Any = (),
    max_tokens: SupportsIndex = 512,
    max_steps: SupportsIndex | None = 64,
    proposal: Proposal | None = None,
    chat: bool = False,
    progress: Any = None,
    watch: Callable[[Any], Any] | None = None,
    batch: SupportsIndex | None = None,
) -> Answers | list[Answers]:
    r"""Sample texts x after a prompt c from :math:`p(x \mid c)\,G(x) / Z`, and vote on their answers.

    The prompt is read once and shared; what particles add is cached and forked. The whole run is one compiled program,
    used again for prompts of the same bucket of lengths (powers of two) and for rewards of the same form.

    Args:
        key: random key.
        model: from ``lm.load`` or ``lm.reasoner``, or ``lm.Model(network, tokenizer)``.
        prompt: a string, token numbers, messages (with ``chat``), or a list of prompts.
        reward: of ``lm.rewards``; None: the model alone. A reward model is taken by its odds.
        method: ``lm.ParticleFilter(...)`` or another; None: a particle filter with 16 particles.
        answer: text -> answer or None; ``lm.answers.last_boxed``, ``text``, ``last_number``. None: that of the model,
            if it has one, else ``last_boxed``. A text for which it fails has no answer; how many and why is a warning.
        stop: strings that end a text.
        max_tokens: most tokens of a text; longer ones are cut, and are weighed as they are.
        max_steps: most steps of a text, likewise; None: as many as the tokens allow.
        proposal: how tokens are drawn; None: from the model.
        chat: put the prompt into the chat template of the model.
        progress: a bar, by default on a terminal.
        watch: called after every step with an ``lm.Event``; a true return value ends the run (of its prompt).
        batch: how many prompts run side by side; None: one on a CPU, 8 elsewhere.

    Returns:
        ``Answers``, or a list of them for a list of prompts. After Ctrl-C, of the prompts that were finished, the first
        ones, and where steps are watched (``watch``, or a bar of a single prompt) of the texts so far, with the status
        ``INTERRUPTED``.

    Raises:
        KeyboardInterrupt: Ctrl-C before there was an answer, or twice.
        TypeError: an argument is of the wrong kind.
        ValueError: an empty prompt, one that does not fit (of several it is named), an unknown setting.
        MemoryError: the caches, of the reward too and of all prompts side by side, would not fit.

    References:
        Puri et al. (2025); Lew et al. (2023).
    """
    check_key(key)
    check_model(model)
    method = ParticleFilter(num_particles=16) if method is None else method
    check_method(method)
    check_watch(watch)
    answer = (model.answer or extractors.last_boxed) if answer is None else answer
    reader = notices.Reader(check_answer(answer))
    notice(model, method, reward, proposal)
    limits, proposal = limits_of(max_tokens, max_steps, stop), as_proposal(proposal)
    several = _are_several(prompt, chat)
    prompts = list(prompt) if several else [prompt]
    tokens = encode_all(model, prompts, chat)
    potential = bind(reward, model.tokenizer)
    alone = watch is not None or isinstance(method, Adaptive)
    size = 1 if alone else min(_side_by_side(batch), len(tokens))
    started, before = time.perf_counter(), notices.faults_of(potential)
    models = prepare(model, tokens, method, detached(potential), proposal, limits, size)
    keys = list(jax.random.split(key, len(models))) if several else [key]
    notices.let_workers(True, potential)
    with interrupts.deferred(at_second=partial(notices.let_workers, False, potential)):
        runs = _run_all(keys, models, method, model.tokenizer, reader, progress, watch, size)
    seconds = (time.perf_counter() - started) / len(runs)
    faults = notices.faults_since(before, potential)
    finish = partial(_answers, model, method, potential, proposal, reader, faults, seconds)
    found = [finish(one, *run) for one, run in zip(tokens, runs)]
    notices.warn(found, potential, reader)
    if len(found) < len(tokens):
        warn_interrupted(f"{len(found)} of {len(tokens)} prompts were begun, and their answers are returned")
    return found if several else found[0]


def stream(*args: Any, **settings: Any) -> Iterator[Any]:
    """Yield an ``lm.Event`` after every step of ``lm.infer``, and what it returns last.

    That is an ``lm.Answers``; for a list of prompts, which run one after another, a list of them, and ``event.prompt``
    is the index of the prompt.

    Args:
        *args: those of ``lm.infer``.
        **settings: likewise, without ``watch``.
    """
    return events.stream(infer, *args, **settings)


def _are_several(prompt: Any, chat: bool) -> bool:
    """A list of strings, of token lists, or of chats."""
    if isinstance(prompt, (str, np.ndarray, jax.Array)) or not isinstance(prompt, (list, tuple)):
        return False
    if not prompt:
        raise ValueError("there is no prompt in the list")
    return not isinstance(prompt[0], (dict, int, np.integer))


def _side_by_side(batch: SupportsIndex | None) -> int:
    if batch is None:
        return 1 if jax.default_backend() == "cpu" else 8
    return as_count("batch", batch)


@partial(jax.jit, static_argnames="batched")
def run_prepared(key: Any, model: TokenModel, method: Any, batched: bool = False) -> Draws:
    """Run a method as one program; with ``batched``, of several prompts side by side."""
    if not batched:
        return method.run(key, model)
    axes = _axes(model)
    return jax.vmap(lambda key, model: method.run(key, model), in_axes=(0, axes))(key, model)


def _axes(model: TokenModel) -> TokenModel:
    """Prompts are stacked, everything else is shared."""
    import dataclasses

    shared = jax.tree.map(lambda _: None, model)
    stacked = jax.tree.map(lambda _: 0, (model.setting.prompt, model.setting.context, model.logits))
    setting = dataclasses.replace(shared.setting, prompt=stacked[0], context=stacked[1])
    return dataclasses.replace(shared, setting=setting, logits=stacked[2])


def _run_all(
    keys: list,
    models: list[TokenModel],
    method: Any,
    tokenizer: Any,
    reader: notices.Reader,
    progress: Any,
    watch: Any,
    batch: int,
) -> list[tuple[Draws, int]]:
    """The draws of each prompt, and in how many batches of the method they came."""
    watched = watch is not None or (bars.is_on(progress) and len(models) == 1)
    pairs = list(zip(keys, models, strict=True))
    if isinstance(method, Adaptive):
        with bars.task("batches", method.max_rounds, progress) as line:
            read = partial(_read, tokenizer, reader)
            return interrupts.each(
                lambda pair, stop: run_adaptively(pair[0], pair[1], method, read, run_prepared, line, stop),
                pairs,
            )
    total = _num_watched(method, models[0]) if watched else len(models)
    with bars.task("steps" if watched else "prompts", total, progress) as line:
        if watched:
            callbacks = [make_step_callback(tokenizer, watch, line, i) for i in range(len(pairs))]
            return interrupts.each(partial(_watched, method), list(zip(pairs, callbacks, strict=True)))

        def several(start: int, stop: Any) -> list[Draws]:
            now = slice(start, start + batch)
            draws = _batch(*_filled(keys[now], models[now], batch), method)[: len(models) - start]
            line.update(start + len(draws))
            return draws

        parts = interrupts.each(several, range(0, len(models), batch))
        return [(draws, 1) for part in parts for draws in part]


def _watched(method: Any, task: tuple, stop: interrupts.Interruption) -> tuple[Draws, int]:
    """Run step by step, until the callback or Ctrl-C ends it."""
    pair, look = task
    ended = False

    def look_and_listen(seen: Any) -> Any:
        nonlocal ended
        enough = look(seen)
        ended = not enough and stop.requested
        return enough or ended

    draws = method.run(*pair, watch=look_and_listen)
    if ended:
        draws = draws._replace(status=jnp.maximum(draws.status, jnp.int32(Status.INTERRUPTED)))
    return draws, 1


def _filled(keys: list, models: list[TokenModel], size: int) -> tuple[list, list[TokenModel]]:
    """The last prompt repeated until the batch is as large as the others: nothing is compiled for a remainder."""
    missing = size - len(models)
    return keys + keys[-1:] * missing, models + models[-1:] * missing


def _read(tokenizer: Any, reader: notices.Reader, tokens: np.ndarray) -> str | None:
    return reader(continuation(tokenizer, tokens))


def _num_watched(method: Any, model: TokenModel) -> int:
    return getattr(method, "num_iterations", model.num_steps)


def _batch(keys: list, models: list[TokenModel], method: Any) -> list[Draws]:
    if len(models) == 1:
        return [interrupts.wait(run_prepared(keys[0], models[0], method))]
    import dataclasses

    parts = [(m.setting.prompt, m.setting.context, m.logits) for m in models]
    prompt, context, logits = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    setting = dataclasses.replace(models[0].setting, prompt=prompt, context=context)
    stacked = dataclasses.replace(models[0], setting=setting, logits=logits)
    draws = interrupts.wait(run_prepared(jnp.stack(keys), stacked, method, batched=True))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], draws) for i in range(len(models))]


def _answers(
    model: Model,
    method: Any,
    potential: Potential,
    proposal: Proposal,
    reader: notices.Reader,
    faults: str,
    seconds: float,
    prompt: np.ndarray,
    raw: Draws,
    num_rounds: int,
) -> Answers:
    draws: Any = jax.tree.map(np.asarray, raw)
    decode = partial(continuation, model.tokenizer)
    tokens = [row[:length] for row, length in zip(draws.tokens, draws.length, strict=True)]
    texts = [decode(row) for row in tokens]
    log_weights = np.asarray(draws.log_weights, float)
    with np.errstate(invalid="ignore"):  # NaN: the status says so
        total = np.logaddexp.reduce(log_weights)
    uniform = np.full(len(texts), -np.log(len(texts)))
    log_evidence = float(draws.log_evidence)
    per_row = model.network.cache_bytes(1, draws.tokens.shape[1])
    ledger = draws.ledger
    cost = Cost(
        samples=num_rounds * _samples(method),
        generated=int(ledger.generated),
        masked=int(ledger.masked),
        prompt=len(prompt),
        reward_calls=int(ledger.scored),
        rescored=int(ledger.rescored),
        forked=int(ledger.forked),
        bytes_copied=int(ledger.forked) * per_row,
        seconds=seconds,
    )
    law = f"{proposal.words}, times {potential.words}" if potential.words != "nothing" else proposal.words
    return Answers(
        prompt=model.tokenizer.decode(prompt),
        texts=texts,
        extracted=[reader(text) for text in texts],
        log_weights=log_weights - total if np.isfinite(total) else uniform,
        log_scores=np.asarray(draws.log_score, float),
        log_prior=np.asarray(draws.log_prior, float),
        log_potential=np.asarray(draws.log_potential, float),
        ended=draws.ended,
        log_evidence=log_evidence if has_evidence(method) else None,
        ess=draws.ess,
        ancestors=draws.ancestors,
        step_lengths=draws.step_lengths,
        num_steps=int(draws.num_steps),
        status=Status(int(draws.status)),
        target=method.words.format(
            target=law, prior=_prior_words(proposal, potential), unused=_unused_words(potential)
        ),
        ledger=cost,
        faults=faults,
        tokens=tokens,
        method=method,
        decode=decode,
    )


def _prior_words(proposal: Proposal, potential: Potential) -> str:
    """What texts are drawn from where the reward does not choose."""
    return f"{proposal.words}, each token by the factors of tokens" if potential.per_token else proposal.words


def _unused_words(potential: Potential) -> str:
    """What a method that asks no reward says of one."""
    if isinstance(potential, Nothing):
        return ""
    return (
        "; of the reward the factors of tokens alone" if potential.per_token else "; the reward is not used"
    )


def _samples(method: Any) -> int:
    """N, or N times the passes; of one batch where there are several."""
    if isinstance(method, Adaptive):
        return _samples(method.method)
    passes = getattr(method, "num_iterations", 0) + 1
    chains = len(getattr(method, "powers", (1,)))
    one = getattr(method, "n", getattr(method, "num_particles", 1)) * (
        method.width if hasattr(method, "width") and hasattr(method, "num_particles") else 1
    )
    return one * passes * chains
