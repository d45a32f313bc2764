"""From prompts to answers: the facade."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer import progress as bars
from probinfer.base import Status
from probinfer.errors import ConvergenceWarning, advice, check_key, shortened
from probinfer.lm import answers as extractors
from probinfer.lm import events
from probinfer.lm.events import onlooker
from probinfer.lm.methods.adaptive import Adaptive, run_adaptively
from probinfer.lm.methods.base import Draws, has_evidence
from probinfer.lm.methods.filters import ParticleFilter
from probinfer.lm.model import Model
from probinfer.lm.prompts import Limits, encode, prepare
from probinfer.lm.proposals import Proposal
from probinfer.lm.result import Answers, Cost
from probinfer.lm.rewards.algebra import Potential
from probinfer.lm.rewards.deferred import bind
from probinfer.lm.rewards.host import HostScore
from probinfer.lm.token_model import TokenModel
from probinfer.types import PRNGKey

__all__ = ["infer", "run_prepared", "stream"]

_CODE = {
    Status.DEGENERATE_WEIGHTS: "every particle died: no text that was tried has a positive weight. The texts are those "
    "before the last step; use more particles, a softer reward (reward * 0.5), or look at one text's rewards",
    Status.NON_FINITE: "a reward became NaN or plus infinity: the texts are those before that step; clip the reward",
}


def infer(
    key: PRNGKey,
    model: Any,
    prompt: Any,
    reward: Any = None,
    method: Any = None,
    *,
    answer: Callable[[str], str | None] = extractors.last_boxed,
    stop: Any = (),
    max_tokens: int = 512,
    max_steps: int | None = 64,
    proposal: Proposal | None = None,
    chat: bool = False,
    progress: Any = None,
    watch: Callable[[Any], Any] | None = None,
    batch: int | None = None,
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
        answer: text -> answer or None; ``lm.answers.last_boxed``, ``text``, ``last_number``.
        stop: strings that end a text.
        max_tokens: most tokens of a text; longer ones are cut, and are weighed as they are.
        max_steps: most steps of a text, likewise; None: as many as the tokens allow.
        proposal: how tokens are drawn; None: from the model.
        chat: put the prompt into the chat template of the model.
        progress: a bar, by default on a terminal.
        watch: called after every step with an ``lm.Event``; a true return value ends the run.
        batch: how many prompts run side by side; None: one on a CPU, 8 elsewhere.

    Returns:
        ``Answers``, or a list of them for a list of prompts.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an empty prompt, one that does not fit, an unknown setting.
        MemoryError: the caches, of the reward too and of all prompts side by side, would not fit.

    References:
        Puri et al. (2025); Lew et al. (2023).
    """
    check_key(key)
    if not isinstance(model, Model):
        raise TypeError(f"expected a model of lm.load(folder) or lm.reasoner(), got {shortened(model)}")
    method = ParticleFilter(num_particles=16) if method is None else method
    if not hasattr(method, "num_rows"):
        raise TypeError(
            f"expected a method such as lm.ParticleFilter(num_particles=16), got {shortened(method)}"
        )
    several = _are_several(prompt, chat)
    prompts = list(prompt) if several else [prompt]
    tokens = [encode(model, one, chat) for one in prompts]
    potential = bind(reward, model.tokenizer)
    proposal = Proposal() if proposal is None else proposal
    limits = Limits(
        _positive("max_tokens", max_tokens), max_steps, (stop,) if isinstance(stop, str) else tuple(stop)
    )
    alone = watch is not None or isinstance(method, Adaptive)
    size = 1 if alone else min(_side_by_side(batch), len(tokens))
    started = time.perf_counter()
    models = prepare(model, tokens, method, potential, proposal, limits, size)
    keys = list(jax.random.split(key, len(models))) if several else [key]
    runs = _run_all(keys, models, method, model.tokenizer, answer, progress, watch, size)
    seconds = (time.perf_counter() - started) / len(runs)
    finish = partial(_answers, model, method, potential, proposal, answer, seconds)
    found = [finish(one, *run) for one, run in zip(tokens, runs, strict=True)]
    for result in found[:1]:
        _warn(result)
    return found if several else found[0]


def stream(*args: Any, **settings: Any) -> Iterator[Any]:
    """Yield an ``lm.Event`` after every step of ``lm.infer``, and its ``lm.Answers`` last.

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


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    return value


def _side_by_side(batch: int | None) -> int:
    if batch is None:
        return 1 if jax.default_backend() == "cpu" else 8
    return _positive("batch", batch)


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
    answer: Any,
    progress: Any,
    watch: Any,
    batch: int,
) -> list[tuple[Draws, int]]:
    """The draws of each prompt, and in how many batches of the method they came."""
    watched = watch is not None or (bars.is_on(progress) and len(models) == 1)
    pairs = list(zip(keys, models, strict=True))
    if isinstance(method, Adaptive):
        with bars.task("batches", method.max_rounds, progress) as line:
            read = partial(_read, tokenizer, answer)
            return [run_adaptively(k, m, method, read, run_prepared, line) for k, m in pairs]
    total = _num_watched(method, models[0]) if watched else len(models)
    with bars.task("steps" if watched else "prompts", total, progress) as line:
        if watched:
            look = onlooker(tokenizer, watch, line)
            return [(method.run(k, m, watch=look), 1) for k, m in pairs]
        found: list[Draws] = []
        while len(found) < len(models):
            now = slice(len(found), len(found) + batch)
            found += _batch(*_filled(keys[now], models[now], min(batch, len(models))), method)
            line.update(min(len(found), len(models)))
        return [(draws, 1) for draws in found[: len(models)]]


def _filled(keys: list, models: list[TokenModel], size: int) -> tuple[list, list[TokenModel]]:
    """The last prompt repeated until the batch is as large as the others: nothing is compiled for a remainder."""
    missing = size - len(models)
    return keys + keys[-1:] * missing, models + models[-1:] * missing


def _read(tokenizer: Any, answer: Any, tokens: np.ndarray) -> str | None:
    return _extract(answer, tokenizer.decode(tokens))


def _num_watched(method: Any, model: TokenModel) -> int:
    return getattr(method, "num_iterations", model.num_steps)


def _batch(keys: list, models: list[TokenModel], method: Any) -> list[Draws]:
    if len(models) == 1:
        return [jax.block_until_ready(run_prepared(keys[0], models[0], method))]
    import dataclasses

    parts = [(m.setting.prompt, m.setting.context, m.logits) for m in models]
    prompt, context, logits = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    setting = dataclasses.replace(models[0].setting, prompt=prompt, context=context)
    stacked = dataclasses.replace(models[0], setting=setting, logits=logits)
    draws = jax.block_until_ready(run_prepared(jnp.stack(keys), stacked, method, batched=True))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], draws) for i in range(len(models))]


def _answers(
    model: Model,
    method: Any,
    potential: Potential,
    proposal: Proposal,
    answer: Any,
    seconds: float,
    prompt: np.ndarray,
    raw: Draws,
    num_rounds: int,
) -> Answers:
    draws: Any = jax.tree.map(np.asarray, raw)
    decode = model.tokenizer.decode
    tokens = [row[:length] for row, length in zip(draws.tokens, draws.length, strict=True)]
    texts = [decode(row) for row in tokens]
    log_weights = np.asarray(draws.log_weights, float)
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
    faults = _faults(potential)
    return Answers(
        prompt=decode(prompt),
        texts=texts,
        extracted=[_extract(answer, text) for text in texts],
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
        target=method.words.format(target=law, prior=_prior_words(proposal, potential)),
        ledger=cost,
        faults=faults,
        tokens=tokens,
        method=method,
        decode=decode,
    )


def _prior_words(proposal: Proposal, potential: Potential) -> str:
    """What texts are drawn from where the reward does not choose."""
    return f"{proposal.words}, each token by the factors of tokens" if potential.per_token else proposal.words


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


def _extract(answer: Any, text: str) -> str | None:
    found = answer(text)
    if found is not None and not isinstance(found, str):
        raise TypeError(f"answer(text) must return a string or None, got {shortened(found)}")
    return found


def _faults(potential: Potential) -> str:
    leaves = jax.tree.leaves(potential, is_leaf=lambda leaf: isinstance(leaf, HostScore))
    reports = [leaf.faults for leaf in leaves if isinstance(leaf, HostScore)]
    return "\n".join(str(report) for report in reports if report.counts)


def _warn(result: Answers) -> None:
    if result.status != Status.OK:
        message = _CODE.get(result.status, advice(result.status))
        warnings.warn(message, ConvergenceWarning, stacklevel=3)
    if result.faults:
        warnings.warn(f"rewards failed: {result.faults}", ConvergenceWarning, stacklevel=3)
