"""The reasoner as it comes with the package: the model, its folder, its problems, its checker."""

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
    """The checkpoint folder of the bundled model, with its reward model beside it.

    Raises:
        FileNotFoundError: the package was built without the weights.
    """
    found = Path(str(importlib.resources.files("probinfer.lm.reasoner") / "weights"))
    if not (found / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the weights of the reasoner are not in {found}: install the package from a full wheel, or train them by "
            f"benchmarks/reasoner_train.py (minutes)"
        )
    return found


def model() -> Model:
    r"""The bundled model for chained arithmetic, p(solution | problem), with its process reward model as ``reward``.

    Returns:
        The model, in float32; a step of its texts is a line, ``lm.until("\n")``. ``lm.infer`` reads its answers by
        ``lm.reasoner.answer`` unless told otherwise, and a prompt such as ``"7 + 5 * 3"`` by ``lm.reasoner.parse``.

    Raises:
        FileNotFoundError: the package was built without the weights.
    """
    where = folder()
    found = load(where, dtype=jnp.float32)
    return Model(found.network, found.tokenizer, read_reward(where), answer=answer, read_task=_read_task)


def _read_task(text: str) -> str:
    return parse(text).prompt


def parse(text: str) -> Problem:
    r"""The problem in a text such as ``7 + 5 * 3 - 2``, with or without the words before it.

    Raises:
        ValueError: it is no chain of + - * with numbers from 0 to 10, or a longer one than the checker knows.

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
    """Distinct problems that the reasoner has not seen.

    Args:
        seed: the same seed gives the same problems.
        num: how many.
        steps: fewest and most operations; the model was trained on 3 to 7.
        split: the part they are of: "evaluation", or "reward", "validation", "train", which training has used.

    Returns:
        Problems with ``.prompt``, ``.solution`` and ``.answer``; ``check(problem, text)`` judges a text.

    Example:
        >>> first = problems(0, 5)[0]
        >>> check(first, first.solution).answer
        True
    """
    rows = draw(seed, num, steps, split)
    return [pick(rows, i) for i in range(num)]
