"""The bundled reasoner: the model, its folder, its problems, its checker."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

import jax.numpy as jnp

from probinfer.lm.models.folder import load
from probinfer.lm.models.model import Model
from probinfer.lm.reasoner.files import read_reward
from probinfer.lm.reasoner.task import (
    HEADER,
    MAX_STEPS,
    MODULUS,
    Problem,
    answer,
    check,
    draw,
    pick,
)

__all__ = ["Problem", "answer", "check", "folder", "model", "parse", "problems"]

_CHAIN = re.compile(r"\d+(?:\s*[+*-]\s*\d+)+")


def folder() -> Path:
    """Return the checkpoint folder of the bundled model, which contains that of its reward model.

    Raises:
        FileNotFoundError: the package was built without the weights.
    """
    weights = Path(str(importlib.resources.files("probinfer.lm.reasoner") / "weights"))
    if not (weights / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the weights of the reasoner are not in {weights}: install the package from a full wheel, or train them "
            f"by benchmarks/reasoner_train.py (minutes)"
        )
    return weights


def model() -> Model:
    r"""Load the bundled model for chained arithmetic, p(solution | problem), with its process reward model.

    Returns:
        The model, in float32; a step of its texts is a line, ``lm.until("\n")``. By default ``lm.infer`` reads its
        answers by ``lm.reasoner.answer``, and a prompt such as ``"7 + 5 * 3"`` by ``lm.reasoner.parse``.

    Raises:
        FileNotFoundError: the package was built without the weights.
    """
    weights = folder()
    loaded = load(weights, dtype=jnp.float32)
    reward = read_reward(weights)
    return Model(
        network=loaded.network,
        tokenizer=loaded.tokenizer,
        reward=reward,
        answer=answer,
        read_task=_read_task,
    )


def _read_task(text: str) -> str:
    return parse(text).prompt


def parse(text: str) -> Problem:
    r"""Return the problem in a text such as ``7 + 5 * 3 - 2``, with or without the header of a prompt.

    Raises:
        ValueError: it is not a chain of + - * with numbers from 0 to 10, or it is longer than the checker supports.

    Example:
        >>> parse("7+5 * 3").prompt
        'Left to right modulo 11: 7 + 5 * 3\n'
    """
    chain = text.strip().removeprefix(HEADER.strip()).strip()
    numbers = [int(number) for number in re.findall(r"\d+", chain)]
    if not _CHAIN.fullmatch(chain) or max(numbers) >= MODULUS or len(numbers) > MAX_STEPS + 1:
        raise ValueError(
            f"the reasoner knows chains such as '7 + 5 * 3 - 2': numbers 0 to {MODULUS - 1}, one to {MAX_STEPS} times "
            f"+ - or *, from left to right; got {chain[:80]!r}"
        )
    return Problem(numbers[0], "".join(re.findall(r"[+*-]", chain)), tuple(numbers[1:]))


def problems(
    seed: int, num: int, steps: tuple[int, int] = (3, 7), split: str = "evaluation"
) -> list[Problem]:
    """Draw distinct problems that the reasoner was not trained on.

    Args:
        seed: the same seed gives the same problems.
        num: number of problems.
        steps: minimum and maximum number of operations; the model was trained on 3 to 7.
        split: the part of the problems: "evaluation", or "reward", "validation", "train", which training has used.

    Returns:
        Problems with ``.prompt``, ``.solution`` and ``.answer``; ``check(problem, text)`` checks a text.

    Example:
        >>> first = problems(0, 5)[0]
        >>> check(first, first.solution).answer
        True
    """
    rows = draw(seed, num, steps, split)
    return [pick(rows, i) for i in range(num)]
