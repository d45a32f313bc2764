"""``probinfer generate``: sample texts of a language model under a reward, show the steps, print the answers."""

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
from probinfer.app.commands.live import StepDisplay, is_correct_so_far, share_bar
from probinfer.app.commands.rewards import MEANINGS, load_reward
from probinfer.app.pages.run_facts import provenance
from probinfer.core.status import Status
from probinfer.lm import infer
from probinfer.lm.reasoner.task import TRAINED_STEPS

__all__ = ["ANSWERS", "METHODS", "GenerateOptions", "run_generate"]

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
_REASONER = "reasoner"  # write ./reasoner for a folder of this name


class GenerateOptions(NamedTuple):
    """Options of ``probinfer generate``; None selects the default of the model.

    Attributes:
        model: a checkpoint folder, or "reasoner".
        prompt: the text, ``@file``, or ``-`` for the standard input.
        reward: "model", "none", or ``module:name``.
        meaning: meaning of the reward's numbers.
        method: one of ``METHODS``.
        n: the budget: number of texts generated in parallel.
        max_tokens: maximum number of tokens of a text.
        step: where a step ends: a delimiter, or a number of tokens.
        temperature: sampling temperature of the tokens.
        chat: whether to apply the chat template.
        stop: strings that end a text.
        answer: one of ``ANSWERS``.
        json: output file, or None.
        live: whether to show the steps.
        seed: seed of the random key.
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


class _GenerationTask(NamedTuple):
    """The prompt and the settings of one call of ``lm.infer``.

    Attributes:
        prompt: the text.
        method: a method of ``lm``.
        answer: text -> answer or None.
        max_tokens: maximum number of tokens of a text.
        is_correct_fn: text so far -> whether it is correct so far; None if that cannot be checked.
    """

    prompt: str
    method: Any
    answer: Callable[[str], str | None]
    max_tokens: int
    is_correct_fn: Callable[[str], bool | None] | None


def run_generate(options: GenerateOptions, *, command: str, console: rich.console.Console) -> lm.Answers:
    """Sample texts, show their steps, print the answers with their probabilities.

    Args:
        options: the user's options.
        command: the command line, recorded in the JSON file.
        console: console of all output.

    Raises:
        ValueError: an option is invalid; the message is one line with advice.
        FileNotFoundError: a folder or a file does not exist.
    """
    _check_options(options)
    text = _read_prompt(options)
    if options.model == _REASONER:
        model = lm.reasoner.model()
        task = _reasoner_task(options, model, text)
    else:
        model = lm.load(options.model)
        task = _checkpoint_task(options, model, text)
    reward = load_reward(options.reward, options.meaning, model)
    answers = _infer(options, model, task, reward, console)
    _print_answers(answers, console)
    if options.json is not None:
        _write_json(Path(options.json), _record(answers, options, command))
        console.print(f"written: {options.json}", markup=False, highlight=False, soft_wrap=True)
    return answers


def _check_options(options: GenerateOptions) -> None:
    """Check the options before any weights are read."""
    for name, choices in (("method", METHODS), ("answer", ANSWERS), ("meaning", MEANINGS)):
        value = getattr(options, name)
        if value is not None and value not in choices:
            raise ValueError(f"--{name} must be one of {', '.join(choices)}; got {value}")
    if options.n < 1:
        raise ValueError(f"--n counts texts and must be at least 1, got {options.n}")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {options.max_tokens}")
    if options.json is not None:
        target = Path(options.json)
        if target.is_dir() or not target.absolute().parent.is_dir():
            raise ValueError(f"--json {options.json}: name a file in an existing folder")
    if options.chat and options.model == _REASONER:
        raise ValueError("--chat: the reasoner has no chat template; leave out --chat")
    if "" in options.stop:
        raise ValueError("--stop: an empty string would end every text at once; leave it out")
    _check_step(options.step)
    METHODS[options.method](options.n, 1)  # raises if the budget is too small for the method


def _check_step(step: str | None) -> None:
    if step == "":
        raise ValueError("--step: an empty string cannot end a step; --step 1 makes steps of one token")
    if step is not None and step.isdecimal() and int(step) < 1:
        raise ValueError(f"--step counts tokens and must be at least 1, got {step}")


def _read_prompt(options: GenerateOptions) -> str | None:
    """Return the text of the prompt, None if there is none."""
    prompt = options.prompt
    if prompt is None:
        return None
    if prompt == "-":
        return sys.stdin.read()
    if prompt.startswith("@"):
        path = Path(prompt[1:]).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"--prompt {prompt}: there is no file {path}")
        return path.read_text(encoding="utf-8")
    return prompt


def _method(options: GenerateOptions, delimiter: str) -> Any:
    step = delimiter if options.step is None else _unescape(options.step)
    return METHODS[options.method](options.n, int(step) if step.isdecimal() else step)


def _unescape(text: str) -> str:
    r"""Replace ``\n`` and ``\t``, which a shell passes as two characters."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _reasoner_task(options: GenerateOptions, model: lm.Model, text: str | None) -> _GenerationTask:
    """Return the task of the bundled model: each line is a step, and each step can be checked."""
    problem = lm.reasoner.problems(options.seed, 1)[0] if text is None else lm.reasoner.parse(text)
    _warn_if_untrained(len(problem.operands))
    return _GenerationTask(
        prompt=problem.prompt,
        method=_method(options, "\n"),
        answer=lm.reasoner.answer if options.answer is None else ANSWERS[options.answer],
        max_tokens=_max_tokens(options, model, problem.prompt, 64),
        is_correct_fn=partial(is_correct_so_far, problem),
    )


def _warn_if_untrained(num_operations: int) -> None:
    """Print one line on stderr if the reasoner was not trained on problems of this length."""
    min_steps, max_steps = TRAINED_STEPS
    if not min_steps <= num_operations <= max_steps:
        text = (
            f"the reasoner was trained on {min_steps} to {max_steps} operations, "
            f"this prompt has {num_operations}"
        )
        print(f"warning: {text}: its texts and scores may be wrong", file=sys.stderr)


def _checkpoint_task(options: GenerateOptions, model: lm.Model, text: str | None) -> _GenerationTask:
    """Return the task of a user's checkpoint."""
    if text is None:
        raise ValueError("--prompt is missing: give a text, @file, or - to read the standard input")
    try:
        prompt = model.tokenizer.render(text) if options.chat else text
    except ValueError as error:
        advice = "this checkpoint has no chat template: it may be a base model, leave out --chat"
        raise ValueError(f"--chat: {advice if 'no chat template' in str(error) else error}") from error
    return _GenerationTask(
        prompt=text,
        method=_method(options, "\n\n"),
        answer=ANSWERS[options.answer or "boxed"],
        max_tokens=_max_tokens(options, model, prompt, 512),
        is_correct_fn=None,
    )


def _max_tokens(options: GenerateOptions, model: lm.Model, prompt: str, default: int) -> int:
    """Return the maximum number of tokens of a text: the user's, or the default cut to the model's context."""
    num_prompt_tokens = len(model.tokenizer.encode(prompt, special=not options.chat))
    remaining = model.network.max_context - num_prompt_tokens
    if num_prompt_tokens == 0:
        raise ValueError("--prompt: it is empty, but a language model needs at least one token")
    if remaining < 1:
        raise ValueError(
            f"--prompt: {num_prompt_tokens} tokens do not fit into the context of {model.network.max_context}; "
            "shorten it"
        )
    if options.max_tokens is not None and options.max_tokens > remaining:
        raise ValueError(
            f"--max-tokens {options.max_tokens}: after a prompt of {num_prompt_tokens} tokens, at most {remaining} fit"
        )
    return options.max_tokens or min(default, remaining)


def _infer(
    options: GenerateOptions,
    model: lm.Model,
    task: _GenerationTask,
    reward: Any,
    console: rich.console.Console,
) -> lm.Answers:
    """Run the method, show its steps, and print its warnings as separate lines."""
    settings: dict[str, Any] = {
        "answer": task.answer,
        "stop": tuple(map(_unescape, options.stop)),
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
            with StepDisplay(console, task.is_correct_fn, redraw=console.is_terminal) as display:
                answers: Any = run(watch=display)
        else:
            answers = run()
    messages = dict.fromkeys(str(item.message) for item in caught)
    # The cause (failed rewards) comes before its consequences.
    for message in sorted(messages, key=lambda message: not message.startswith("rewards failed")):
        console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)
    return answers


def _print_answers(answers: lm.Answers, console: rich.console.Console) -> None:
    """Print the answers, the text of largest weight, the target, and the cost."""
    print_text = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    if answers.status == Status.OK:
        table = rich.table.Table("answer", "probability", title="Answers", title_justify="left")
        for answer, probability in answers.answers[:10]:
            text = "no answer" if answer is None else " ".join(answer.split())
            table.add_row(rich.text.Text(text[:100], overflow="ellipsis"), share_bar(probability, 20))
        print_text()
        console.print(table)
        if answers.best is None:
            print_text("No text has an answer of this kind: try --answer number or --answer text.")
        print_text("\nThe text of largest weight with the most probable answer:", style="bold")
        print_text(_best_text(answers).rstrip() + "\n")
    lines = dataclasses.replace(answers, faults="").summary().splitlines()  # the warnings report the faults
    print_text("\n".join(line for line in lines if not line.startswith("  ")))


def _best_text(answers: lm.Answers) -> str:
    """Return the text of largest weight among those with the best answer."""
    candidates = [i for i, answer in enumerate(answers.extracted) if answer == answers.best]
    return (
        answers.texts[max(candidates, key=lambda i: answers.log_weights[i])] if candidates else answers.text
    )


def _record(answers: lm.Answers, options: GenerateOptions, command: str) -> dict[str, Any]:
    """Return the content of the JSON file; numbers that are not finite become null."""
    rows = zip(
        answers.texts,
        answers.extracted,
        answers.log_weights,
        answers.log_scores,
        answers.log_prior,
        answers.ended,
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
        "prompt": answers.prompt,
        "answers": [{"answer": answer, "probability": _finite(share)} for answer, share in answers.answers],
        "best": answers.best,
        "log_evidence": _finite(answers.log_evidence),
        "ess": [_finite(value) for value in np.asarray(answers.ess)[: answers.num_steps]],
        "status": Status(answers.status).name.lower(),
        "target": answers.target,
        "faults": answers.faults,
        "cost": dataclasses.asdict(answers.ledger),
        "texts": texts,
        "method": repr(answers.method),
        "settings": options._asdict(),
        "run": dict(provenance(command, seed=options.seed, seconds=answers.ledger.seconds)),
    }


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _write_json(path: Path, record: dict[str, Any]) -> None:
    """Write the file atomically: an interrupted run leaves no partial file of this name."""
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial_path.replace(path)
