"""From prompts to answers: the facade."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.arguments import check_key
from probinfer.core.errors import warn_interrupted
from probinfer.core.identity import refresh_classes
from probinfer.core.status import Status
from probinfer.core.types import PRNGKey
from probinfer.lm.answers import notices
from probinfer.lm.answers import reading as extractors
from probinfer.lm.answers.result import Answers, Cost
from probinfer.lm.arguments import as_count, check_answer, check_watch
from probinfer.lm.generation import events
from probinfer.lm.generation.events import step_callback
from probinfer.lm.generation.prompts import encode_all, limits_of, prepare
from probinfer.lm.generation.proposals import Proposal, as_proposal
from probinfer.lm.generation.token_model import TokenModel
from probinfer.lm.methods.adaptive import Adaptive, run_adaptively
from probinfer.lm.methods.base import WeightedTexts, check_method, has_evidence
from probinfer.lm.methods.filters import ParticleFilter
from probinfer.lm.models.model import Model, check_model
from probinfer.lm.rewards.algebra import Potential, UnitPotential
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

    The prompt is read once and shared; the tokens that particles add are cached and forked. The whole run is one
    compiled program, used again for prompts that are padded to the same length (a power of two) and for rewards of the
    same form.

    Args:
        key: random key.
        model: from ``lm.load`` or ``lm.reasoner``, or ``lm.Model(network, tokenizer)``.
        prompt: a string, token ids, messages (with ``chat``), or a list of prompts.
        reward: from ``lm.rewards``; None: the model alone. A reward model stands for its odds.
        method: ``lm.ParticleFilter(...)`` or another; None: a particle filter with 16 particles.
        answer: text -> answer or None; ``lm.answers.last_boxed``, ``text``, ``last_number``. None: that of the model,
            if it has one, else ``last_boxed``. A text for which it fails has no answer, and a warning says how many
            failed and why.
        stop: strings that end a text.
        max_tokens: maximum number of tokens of a text; a longer text is cut, and weighed as it is.
        max_steps: maximum number of steps of a text, likewise; None: as many as ``max_tokens`` allows.
        proposal: how tokens are drawn; None: from the model.
        chat: put the prompt into the chat template of the model.
        progress: a progress bar, by default on a terminal.
        watch: called after every step with an ``lm.Event``; a true return value ends the run (of its prompt).
        batch: number of prompts that run side by side; None: one on a CPU, 8 elsewhere.

    Returns:
        ``Answers``, or a list of them for a list of prompts. After Ctrl-C, of the prompts that were finished, in order;
        if steps are reported (``watch``, or a progress bar of a single prompt), also of the texts so far, with the
        status ``INTERRUPTED``.

    Raises:
        KeyboardInterrupt: Ctrl-C before there was an answer, or twice.
        TypeError: an argument is of the wrong kind.
        ValueError: a prompt is empty or does not fit (of several it is named), or a setting is unknown.
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
    refresh_classes(model, method, reward, proposal)
    limits, proposal = limits_of(max_tokens, max_steps, stop), as_proposal(proposal)
    is_list = _is_list_of_prompts(prompt)
    prompts = list(prompt) if is_list else [prompt]
    tokens = encode_all(model, prompts, chat)
    potential = bind(reward, model.tokenizer)
    one_by_one = watch is not None or isinstance(method, Adaptive)
    batch_size = 1 if one_by_one else min(_batch_size(batch), len(tokens))
    start_time, faults_before = time.perf_counter(), notices.faults_of(potential)
    models = prepare(model, tokens, method, detached(potential), proposal, limits, batch_size)
    keys = list(jax.random.split(key, len(models))) if is_list else [key]
    notices.allow_workers(True, potential)
    with interrupts.deferred(at_second=partial(notices.allow_workers, False, potential)):
        runs = _run_all(keys, models, method, model.tokenizer, reader, progress, watch, batch_size)
    seconds = (time.perf_counter() - start_time) / len(runs)
    faults = notices.faults_since(faults_before, potential)
    finish = partial(_answers, model, method, potential, proposal, reader, faults, seconds)
    results = [finish(prompt_tokens, *run) for prompt_tokens, run in zip(tokens, runs)]
    notices.warn(results, potential, reader)
    if len(results) < len(tokens):
        warn_interrupted(
            f"{len(results)} of {len(tokens)} prompts were begun, and their answers are returned"
        )
    return results if is_list else results[0]


def stream(*args: Any, **settings: Any) -> Iterator[Any]:
    """Yield an ``lm.Event`` after every step of ``lm.infer``, and the return value of ``lm.infer`` last.

    The last item is an ``lm.Answers``; for a list of prompts, which run one after another, it is a list of them, and
    ``event.prompt`` is the index of the prompt.

    Args:
        *args: arguments of ``lm.infer``.
        **settings: settings of ``lm.infer``, without ``watch``.
    """
    return events.stream(infer, *args, **settings)


def _is_list_of_prompts(prompt: Any) -> bool:
    """Whether a prompt is a list of strings, of token lists, or of chats."""
    if isinstance(prompt, (str, np.ndarray, jax.Array)) or not isinstance(prompt, (list, tuple)):
        return False
    if not prompt:
        raise ValueError("there is no prompt in the list")
    return not isinstance(prompt[0], (dict, int, np.integer))


def _batch_size(batch: SupportsIndex | None) -> int:
    if batch is None:
        return 1 if jax.default_backend() == "cpu" else 8
    return as_count("batch", batch)


@partial(jax.jit, static_argnames="batched")
def run_prepared(key: Any, model: TokenModel, method: Any, batched: bool = False) -> WeightedTexts:
    """Run a method as one program; with ``batched``, for several prompts side by side."""
    if not batched:
        return method.run(key, model)
    axes = _batch_axes(model)
    return jax.vmap(lambda key, model: method.run(key, model), in_axes=(0, axes))(key, model)


def _batch_axes(model: TokenModel) -> TokenModel:
    """Return the axes for ``vmap``: prompts are stacked, everything else is shared."""
    shared = jax.tree.map(lambda _: None, model)
    prompt, context, logits = jax.tree.map(
        lambda _: 0, (model.setup.prompt, model.setup.context, model.logits)
    )
    return replace(shared, setup=replace(shared.setup, prompt=prompt, context=context), logits=logits)


def _run_all(
    keys: list,
    models: list[TokenModel],
    method: Any,
    tokenizer: Any,
    reader: notices.Reader,
    progress: Any,
    watch: Any,
    batch: int,
) -> list[tuple[WeightedTexts, int]]:
    """Return the draws of each prompt, and the number of batches of the method that they come from."""
    by_step = watch is not None or (bars.is_on(progress) and len(models) == 1)
    pairs = list(zip(keys, models, strict=True))
    if isinstance(method, Adaptive):
        with bars.task("batches", method.max_rounds, progress) as bar:
            read = partial(_read_answer, tokenizer, reader)
            return interrupts.each(
                lambda pair, stop: run_adaptively(pair[0], pair[1], method, read, run_prepared, bar, stop),
                pairs,
            )
    total = _num_reports(method, models[0]) if by_step else len(models)
    with bars.task("steps" if by_step else "prompts", total, progress) as bar:
        if by_step:
            callbacks = [step_callback(tokenizer, watch, bar, i) for i in range(len(pairs))]
            return interrupts.each(partial(_run_by_step, method), list(zip(pairs, callbacks, strict=True)))

        def run_batch(start: int, stop: Any) -> list[WeightedTexts]:
            rows = slice(start, start + batch)
            draws = _run_batch(*_fill_batch(keys[rows], models[rows], batch), method)[: len(models) - start]
            bar.update(start + len(draws))
            return draws

        batches = interrupts.each(run_batch, range(0, len(models), batch))
        return [(draws, 1) for batch_draws in batches for draws in batch_draws]


def _run_by_step(method: Any, task: tuple, stop: interrupts.Interruption) -> tuple[WeightedTexts, int]:
    """Run step by step, until the callback or Ctrl-C ends the run."""
    pair, callback = task
    interrupted = False

    def report(snapshot: Any) -> Any:
        nonlocal interrupted
        enough = callback(snapshot)
        interrupted = not enough and stop.requested
        return enough or interrupted

    draws = method.run(*pair, watch=report)
    if interrupted:
        draws = draws._replace(status=jnp.maximum(draws.status, jnp.int32(Status.INTERRUPTED)))
    return draws, 1


def _fill_batch(keys: list, models: list[TokenModel], size: int) -> tuple[list, list[TokenModel]]:
    """Repeat the last prompt until the batch is as large as the others, so that nothing is compiled for a remainder."""
    num_missing = size - len(models)
    return keys + keys[-1:] * num_missing, models + models[-1:] * num_missing


def _read_answer(tokenizer: Any, reader: notices.Reader, tokens: np.ndarray) -> str | None:
    return reader(continuation(tokenizer, tokens))


def _num_reports(method: Any, model: TokenModel) -> int:
    """Return how often a run calls back: after every iteration of a chain, or after every step."""
    return getattr(method, "num_iterations", model.num_steps)


def _run_batch(keys: list, models: list[TokenModel], method: Any) -> list[WeightedTexts]:
    if len(models) == 1:
        return [interrupts.wait(run_prepared(keys[0], models[0], method))]
    parts = [(m.setup.prompt, m.setup.context, m.logits) for m in models]
    prompt, context, logits = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    setup = replace(models[0].setup, prompt=prompt, context=context)
    stacked = replace(models[0], setup=setup, logits=logits)
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
    raw: WeightedTexts,
    num_rounds: int,
) -> Answers:
    draws: Any = jax.tree.map(np.asarray, raw)
    decode = partial(continuation, model.tokenizer)
    tokens = [row[:length] for row, length in zip(draws.tokens, draws.length, strict=True)]
    texts = [decode(row) for row in tokens]
    log_weights = np.asarray(draws.log_weights, float)
    with np.errstate(invalid="ignore"):  # the status reports NaN
        total = np.logaddexp.reduce(log_weights)
    uniform = np.full(len(texts), -np.log(len(texts)))
    log_evidence = float(draws.log_evidence)
    bytes_per_row = model.network.cache_bytes(1, draws.tokens.shape[1])
    ledger = draws.ledger
    cost = Cost(
        samples=num_rounds * _num_samples(method),
        generated=int(ledger.generated),
        masked=int(ledger.masked),
        prompt=len(prompt),
        reward_calls=int(ledger.scored),
        rescored=int(ledger.rescored),
        forked=int(ledger.forked),
        bytes_copied=int(ledger.forked) * bytes_per_row,
        seconds=seconds,
    )
    target = proposal.description
    if potential.description != "nothing":
        target = f"{target}, times {potential.description}"
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
        target=method.description.format(
            target=target, prior=_describe_prior(proposal, potential), unused=_describe_unused(potential)
        ),
        ledger=cost,
        faults=faults,
        tokens=tokens,
        method=method,
        decode=decode,
    )


def _describe_prior(proposal: Proposal, potential: Potential) -> str:
    """Say what texts are drawn from if the reward chooses no texts."""
    note = ", with tokens drawn in proportion to their potentials" if potential.per_token else ""
    return f"{proposal.description}{note}"


def _describe_unused(potential: Potential) -> str:
    """Say what a method that does not choose by the reward does with it."""
    if isinstance(potential, UnitPotential):
        return ""
    if potential.per_token:
        return "; of the reward only the potentials of tokens are used"
    return "; the reward is not used"


def _num_samples(method: Any) -> int:
    """Return N, times the number of passes; of one batch if there are several."""
    if isinstance(method, Adaptive):
        return _num_samples(method.method)
    num_passes = getattr(method, "num_iterations", 0) + 1
    num_chains = len(getattr(method, "powers", (1,)))
    num = getattr(method, "n", getattr(method, "num_particles", 1))
    if hasattr(method, "width") and hasattr(method, "num_particles"):
        num *= method.width
    return num * num_passes * num_chains
