"""``probinfer generate``: texts of a language model under a reward, shown as they grow, and their answers."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
import rich.table
import rich.text

from probinfer import lm
from probinfer.app.commands.live import Screen, bar, is_right
from probinfer.app.commands.rewards import MEANINGS, load_reward
from probinfer.app.pages.run_facts import provenance
from probinfer.core.status import Status
from probinfer.lm import infer
from probinfer.lm.reasoner.task import TRAINED_STEPS

__all__ = ["ANSWERS", "METHODS", "Options", "run_generate"]

METHODS: dict[str, Callable[[int, Any], Any]] = {
    "particle-filter": lambda n, step: lm.ParticleFilter(n, step=step),
    "entropic": lambda n, step: lm.ParticleFilter(n, trigger="entropic", step=step),
    "nested": lambda n, step: lm.NestedSMC(max(n // 4, 1), width=min(n, 4), step=step),
    "particle-gibbs": lambda n, step: lm.ParticleGibbs(n, 4, step=step),
    "parallel-tempering": lambda n, step: lm.ParallelTempering(n, 4, step=step),
    "best-of-n": lambda n, step: lm.BestOfN(n, step=step),
    "weighted-best-of-n": lambda n, step: lm.BestOfN(n, weighted=True, step=step),
    "majority": lambda n, step: lm.MajorityVote(n, step=step),
    "beam": lambda n, step: lm.BeamSearch(n, step=step),
    "dvts": lambda n, step: lm.DVTS(n, step=step),
    "greedy": lambda n, step: lm.Greedy(step=step),
}
ANSWERS = {"boxed": lm.answers.last_boxed, "number": lm.answers.last_number, "text": lm.answers.text}
_REASONER = "reasoner"  # a folder of this name is ./reasoner


class Options(NamedTuple):
    """What the command was asked for; None: what suits the model.

    Attributes:
        model: a checkpoint folder, or "reasoner".
        prompt: the text, ``@file``, or ``-`` for the standard input.
        reward: "model", "none", or ``module:name``.
        meaning: what the numbers of the reward mean.
        method: one of ``METHODS``.
        n: the budget: texts at a time.
        max_tokens: most tokens of a text.
        step: a delimiter, or a number of tokens.
        temperature: of the tokens.
        chat: use the chat template.
        stop: strings that end a text.
        answer: one of ``ANSWERS``.
        json: a file for the result.
        live: show the steps.
        seed: of the random key.
    """

    model: str = _REASONER
    prompt: str | None = None
    reward: str | None = None
    meaning: str | None = None
    method: str = "particle-filter"
    n: int = 16
    max_tokens: int | None = None
    step: str | None = None
    temperature: float = 1.0
    chat: bool = False
    stop: tuple[str, ...] = ()
    answer: str | None = None
    json: str | None = None
    live: bool = True
    seed: int = 0


class _Task(NamedTuple):
    """What is run.

    Attributes:
        prompt: the text.
        method: of ``lm``.
        answer: text -> answer or None.
        max_tokens: most tokens of a text.
        judge: text so far -> whether it is right so far, or None.
    """

    prompt: str
    method: Any
    answer: Callable[[str], str | None]
    max_tokens: int
    judge: Callable[[str], bool | None] | None


def run_generate(options: Options, *, command: str, console: rich.console.Console) -> lm.Answers:
    """Sample texts, show their steps, print the answers with their probabilities.

    Args:
        options: what was asked for.
        command: what the user typed, for the file.
        console: where everything goes.

    Raises:
        ValueError: an option that cannot be; the message is one line with advice.
        FileNotFoundError: a folder or a file is not there.
    """
    _check(options)
    text = _prompt(options)
    if options.model == _REASONER:
        model = lm.reasoner.model()
        task = _reasoner_task(options, model, text)
    else:
        model = lm.load(options.model)
        task = _task(options, model, text)
    reward = load_reward(options.reward, options.meaning, model)
    found = _infer(options, model, task, reward, console)
    _show(found, console)
    if options.json is not None:
        _write(Path(options.json), _record(found, options, command))
        console.print(f"written: {options.json}", markup=False, highlight=False, soft_wrap=True)
    return found


def _check(options: Options) -> None:
    """Refuse, before any weights are read, what cannot be."""
    named = (("method", METHODS), ("answer", ANSWERS), ("meaning", MEANINGS))
    for name, known in named:
        value = getattr(options, name)
        if value is not None and value not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}; got {value}")
    if options.n < 1:
        raise ValueError(f"--n counts texts and must be at least 1, got {options.n}")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {options.max_tokens}")
    if options.json is not None:
        target = Path(options.json)
        if target.is_dir() or not target.absolute().parent.is_dir():
            raise ValueError(f"--json {options.json}: name a file in a folder that is there")
    if options.chat and options.model == _REASONER:
        raise ValueError("--chat: the reasoner has no chat template; leave out --chat")
    if "" in options.stop:
        raise ValueError("--stop: an empty string would end every text at once; leave it out")
    _check_step(options.step)
    METHODS[options.method](options.n, 1)


def _check_step(step: str | None) -> None:
    if step == "":
        raise ValueError("--step: an empty string ends no step; --step 1 makes steps of one token")
    if step is not None and step.isdecimal() and int(step) < 1:
        raise ValueError(f"--step counts tokens and must be at least 1, got {step}")


def _prompt(options: Options) -> str | None:
    """The text of the prompt; None: not given."""
    given = options.prompt
    if given is None:
        return None
    if given == "-":
        return sys.stdin.read()
    if given.startswith("@"):
        path = Path(given[1:]).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"--prompt {given}: there is no file {path}")
        return path.read_text(encoding="utf-8")
    return given


def _method(options: Options, delimiter: str) -> Any:
    step = delimiter if options.step is None else _unescaped(options.step)
    return METHODS[options.method](options.n, int(step) if step.isdecimal() else step)


def _unescaped(text: str) -> str:
    r"""A ``\n`` typed in a shell is two characters, and means one."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _reasoner_task(options: Options, model: lm.Model, text: str | None) -> _Task:
    """Of the bundled model: lines are steps, and every step can be checked."""
    problem = lm.reasoner.problems(options.seed, 1)[0] if text is None else lm.reasoner.parse(text)
    _warn_outside(len(problem.operands))
    answer = lm.reasoner.answer if options.answer is None else ANSWERS[options.answer]
    most = _most_tokens(options, model, problem.prompt, 64)
    return _Task(problem.prompt, _method(options, "\n"), answer, most, partial(is_right, problem))


def _warn_outside(num: int) -> None:
    """One line on stderr where the reasoner has not learnt problems of ``num`` operations."""
    fewest, most = TRAINED_STEPS
    if not fewest <= num <= most:
        words = f"the reasoner was trained on {fewest} to {most} operations, this prompt has {num}"
        print(f"warning: {words}: its texts and scores may be wrong", file=sys.stderr)


def _task(options: Options, model: lm.Model, text: str | None) -> _Task:
    """Of a checkpoint."""
    if text is None:
        raise ValueError("--prompt is missing: give a text, @file, or - to read the standard input")
    try:
        prompt = model.tokenizer.render(text) if options.chat else text
    except ValueError as error:
        none = "this checkpoint has no chat template: it may be a base model, leave out --chat"
        raise ValueError(f"--chat: {none if 'no chat template' in str(error) else error}") from error
    most = _most_tokens(options, model, prompt, 512)
    return _Task(text, _method(options, "\n\n"), ANSWERS[options.answer or "boxed"], most, None)


def _most_tokens(options: Options, model: lm.Model, prompt: str, usual: int) -> int:
    """As many as asked for, or as usual, or as fit."""
    used = len(model.tokenizer.encode(prompt, special=not options.chat))
    room = model.network.max_context - used
    if used == 0:
        raise ValueError("--prompt: it is empty, and a language model needs a token to begin with")
    if room < 1:
        raise ValueError(
            f"--prompt: {used} tokens do not fit into the context of {model.network.max_context}; shorten it"
        )
    if options.max_tokens is not None and options.max_tokens > room:
        raise ValueError(f"--max-tokens {options.max_tokens}: {room} fit behind a prompt of {used} tokens")
    return options.max_tokens or min(usual, room)


def _infer(
    options: Options, model: lm.Model, task: _Task, reward: Any, console: rich.console.Console
) -> lm.Answers:
    """Run, with the steps on show; warnings become lines of their own."""
    settings: dict[str, Any] = {
        "answer": task.answer,
        "stop": tuple(map(_unescaped, options.stop)),
        "max_tokens": task.max_tokens,
        "proposal": lm.Proposal(temperature=options.temperature),
        "chat": options.chat,
        "progress": False,
    }
    console.print(task.prompt.strip(), style="bold", markup=False, highlight=False, soft_wrap=True)
    run = partial(infer, jax.random.key(options.seed), model, task.prompt, reward, task.method, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if options.live:
            with Screen(console, task.judge, redraw=console.is_terminal) as screen:
                found: Any = run(watch=screen)
        else:
            found = run()
    said = dict.fromkeys(str(item.message) for item in caught)
    for message in sorted(said, key=lambda words: not words.startswith("rewards failed")):  # the cause first
        console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)
    return found


def _show(found: lm.Answers, console: rich.console.Console) -> None:
    """Answers, the text of largest weight, the target, the cost."""
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    if found.status == Status.OK:
        table = rich.table.Table("answer", "probability", title="Answers", title_justify="left")
        for answer, share in found.answers[:10]:
            words = "no answer" if answer is None else " ".join(answer.split())
            table.add_row(rich.text.Text(words[:100], overflow="ellipsis"), bar(share, 20))
        say()
        console.print(table)
        if found.best is None:
            say("No text has an answer of this kind: --answer number or --answer text find others.")
        say("\nThe heaviest text with the likeliest answer:", style="bold")
        say(_typical(found).rstrip() + "\n")
    lines = dataclasses.replace(found, faults="").summary().splitlines()  # faults were said as a warning
    say("\n".join(line for line in lines if not line.startswith("  ")))


def _typical(found: lm.Answers) -> str:
    """The text of largest weight among those with the best answer."""
    fits = [i for i, answer in enumerate(found.extracted) if answer == found.best]
    return found.texts[max(fits, key=lambda i: found.log_weights[i])] if fits else found.text


def _record(found: lm.Answers, options: Options, command: str) -> dict[str, Any]:
    """The result for machines; numbers that are not finite are null."""
    rows = zip(
        found.texts, found.extracted, found.log_weights, found.log_scores, found.log_prior, found.ended
    )
    texts = [
        {
            "text": text,
            "answer": answer,
            "weight": math.exp(weight),
            "log_score": _finite(score),
            "log_prior": _finite(prior),
            "end": lm.End(int(end)).name.lower(),
        }
        for text, answer, weight, score, prior, end in rows
    ]
    return {
        "prompt": found.prompt,
        "answers": [{"answer": answer, "probability": _finite(share)} for answer, share in found.answers],
        "best": found.best,
        "log_evidence": _finite(found.log_evidence),
        "ess": [_finite(value) for value in np.asarray(found.ess)[: found.num_steps]],
        "status": Status(found.status).name.lower(),
        "target": found.target,
        "faults": found.faults,
        "cost": dataclasses.asdict(found.ledger),
        "texts": texts,
        "method": repr(found.method),
        "settings": options._asdict(),
        "run": dict(provenance(command, seed=options.seed, seconds=found.ledger.seconds)),
    }


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _write(path: Path, record: dict[str, Any]) -> None:
    """The file is whole or not there at all."""
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial_path.replace(path)
