"""Chained arithmetic modulo 11 whose every step can be checked exactly.

A problem is a number and three to seven operations applied from left to right:

    Left to right modulo 11: 7 + 5 * 3 - 2

and its solution has one line a step, then the answer:

    7 + 5 = 1
    1 * 3 = 3
    3 - 2 = 1
    Answer: 1

There is one right text, so the start of a solution is right exactly if it is a prefix of that text. Problems are
split into four disjoint parts by a hash of the problem: ``"train"`` (the language model learns from it),
``"validation"`` (chooses the checkpoint), ``"reward"`` (the reward model learns from it) and ``"evaluation"``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

__all__ = [
    "HEADER",
    "MAX_STEPS",
    "MODULUS",
    "OPERATIONS",
    "SPLITS",
    "TRAINED_STEPS",
    "Check",
    "Problem",
    "Problems",
    "answer",
    "check",
    "draw",
    "pick",
    "stack",
    "values",
]

MODULUS = 11
OPERATIONS = ("+", "-", "*")
MAX_STEPS = 10
TRAINED_STEPS = (3, 7)  # minimum and maximum number of operations that the bundled model is trained on
HEADER = "Left to right modulo 11: "
SPLITS = {
    "train": range(0, 13),
    "validation": range(13, 14),
    "reward": range(14, 15),
    "evaluation": range(15, 16),
}
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_ANSWER = re.compile(r"^Answer: (\d+)$", re.MULTILINE)


class Problem(NamedTuple):
    """One problem.

    Args:
        start: the first number, 0 ... 10.
        operations: one of ``+ - *`` for each step, such as ``"+*-"``.
        operands: the second number of each step, 0 ... 10.
    """

    start: int
    operations: str
    operands: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The question as a line of text."""
        chain = "".join(f" {op} {number}" for op, number in zip(self.operations, self.operands, strict=True))
        return f"{HEADER}{self.start}{chain}\n"

    @property
    def solution(self) -> str:
        """The one right continuation: a line for each step, then the answer."""
        lines, results = [], values(stack([self]))[0]
        for i, (op, number) in enumerate(zip(self.operations, self.operands, strict=True)):
            lines.append(f"{results[i]} {op} {number} = {results[i + 1]}\n")
        return "".join(lines) + f"Answer: {results[-1]}"

    @property
    def answer(self) -> str:
        """The right answer, as ``answer`` finds it in a text."""
        return str(values(stack([self]))[0, -1])


class Problems(NamedTuple):
    """Many problems as arrays, for the vectorized functions; entries beyond ``num_steps`` are zero.

    Args:
        start: (B,), 0 ... 10.
        operations: (B, S), index into ``OPERATIONS``.
        operands: (B, S), 0 ... 10.
        num_steps: (B,), 1 ... S.
    """

    start: Int[np.ndarray, "B"]
    operations: Int[np.ndarray, "B S"]
    operands: Int[np.ndarray, "B S"]
    num_steps: Int[np.ndarray, "B"]


class Check(NamedTuple):
    """What is right in a text.

    Args:
        steps: for each line of the text, whether the text up to its end is a prefix of the right solution.
        answer: whether the answer in the text is right, however it was reached.
    """

    steps: tuple[bool, ...]
    answer: bool


def values(problems: Problems) -> Int[np.ndarray, "B S1"]:
    """Return the running results y_0 = start, y_t = y_{t-1} op_t b_t mod 11, constant beyond the last step.

    Args:
        problems: B problems of at most S steps.

    Returns:
        (B, S + 1) results.
    """
    results = [np.asarray(problems.start, np.int64)]
    for t in range(problems.operations.shape[1]):
        op, number, before = problems.operations[:, t], problems.operands[:, t], results[-1]
        after = np.choose(op, [before + number, before - number, before * number]) % MODULUS
        results.append(np.where(t < problems.num_steps, after, before))
    return np.stack(results, axis=1)


def draw(
    seed: int | tuple[int, ...], num: int, steps: tuple[int, int] = (3, 7), split: str = "evaluation"
) -> Problems:
    """Draw distinct problems of one part, with a number of steps uniform on ``steps[0] ... steps[1]``.

    Args:
        seed: seed of the draws; the same seed gives the same problems, which also begin a longer list.
        num: number of problems.
        steps: minimum and maximum number of steps.
        split: the part, see the module.

    Raises:
        ValueError: the part is unknown, the range of steps is outside 1 ... 10, or there are fewer problems than
            ``num``.
    """
    _check_draw(num, steps, split)
    rng = np.random.default_rng(seed)
    distinct: list[Problems] = []
    max_blocks = 20 + 2 * num  # after as many draws there are no more distinct problems
    for _ in range(max_blocks):
        drawn = _propose(rng, 512, steps)
        in_split = np.isin(_hash(drawn) % np.uint64(16), list(SPLITS[split]))
        parts = [*distinct, _rows(drawn, in_split)]
        merged = Problems(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        _, first = np.unique(_hash(merged), return_index=True)
        distinct = [_rows(merged, np.sort(first))]
        if len(first) >= num:
            return _rows(distinct[0], slice(num))
    raise ValueError(
        f"there are fewer than {num} different problems of {steps[0]} to {steps[1]} steps in '{split}'"
    )


def pick(problems: Problems, i: int) -> Problem:
    """Return problem number i."""
    length = int(problems.num_steps[i])
    operations = "".join(OPERATIONS[j] for j in problems.operations[i, :length])
    return Problem(int(problems.start[i]), operations, tuple(int(b) for b in problems.operands[i, :length]))


def stack(problems: Iterable[Problem], width: int = 0) -> Problems:
    """Return problems as arrays, with at least ``width`` columns.

    Raises:
        ValueError: a number is outside 0 ... 10, an operation is unknown, or there is not one operand for each.
    """
    rows = list(problems)
    for problem in rows:
        _check_problem(problem)
    width = max([width, *(len(problem.operands) for problem in rows)])
    operations, operands = np.zeros((2, len(rows), width), np.int64)
    for i, problem in enumerate(rows):
        operations[i, : len(problem.operations)] = [OPERATIONS.index(op) for op in problem.operations]
        operands[i, : len(problem.operands)] = problem.operands
    start = np.array([problem.start for problem in rows], np.int64)
    return Problems(
        start, operations, operands, np.array([len(problem.operands) for problem in rows], np.int64)
    )


def answer(text: str) -> str | None:
    r"""Return the number on the last line ``Answer: ...`` of a text, ``None`` if there is no such line.

    >>> answer("3 - 2 = 1\nAnswer: 1")
    '1'
    """
    numbers = _ANSWER.findall(text)
    return numbers[-1] if numbers else None


def check(problem: Any, text: Any) -> Check:
    r"""Check a continuation of ``problem.prompt``, line by line and by its answer.

    A line that has not ended yet is right if the text so far is a prefix of the solution.

    >>> problem = Problem(7, "+*-", (5, 3, 2))
    >>> check(problem, "7 + 5 = 1\n1 * 3 = 4\nAnswer: 1")
    Check(steps=(True, False, False), answer=True)
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    _check_problem(problem)
    solution, end, right = problem.solution, 0, []
    for line in _LINE.findall(text):
        end += len(line)
        right.append(solution.startswith(text[:end]))
    return Check(tuple(right), answer(text) == problem.answer)


def _rows(problems: Problems, index: Any) -> Problems:
    return Problems(*(array[index] for array in problems))


def _propose(rng: np.random.Generator, num: int, steps: tuple[int, int]) -> Problems:
    """Draw problems of all parts."""
    num_steps = rng.integers(steps[0], steps[1] + 1, num)
    inside = np.arange(steps[1]) < num_steps[:, None]
    operations = rng.integers(0, len(OPERATIONS), (num, steps[1])) * inside
    operands = rng.integers(0, MODULUS, (num, steps[1])) * inside
    return Problems(rng.integers(0, MODULUS, num), operations, operands, num_steps)


def _hash(problems: Problems) -> Shaped[np.ndarray, "B"]:
    """Return 64 bits of each problem, which do not depend on the width of the arrays (one ``_mix`` for each digit)."""
    code = _mix(problems.num_steps.astype(np.uint64) * np.uint64(MODULUS) + problems.start.astype(np.uint64))
    for t in range(problems.operations.shape[1]):
        digit = (problems.operations[:, t] * MODULUS + problems.operands[:, t] + 1).astype(np.uint64)
        code = np.where(t < problems.num_steps, _mix(code ^ (digit * np.uint64(0x9E3779B97F4A7C15))), code)
    return code


def _mix(code: Shaped[np.ndarray, "B"]) -> Shaped[np.ndarray, "B"]:
    """Apply the mixing function of SplitMix, Steele, Lea and Flood (2014)."""
    code = (code ^ (code >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    code = (code ^ (code >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return code ^ (code >> np.uint64(31))


def _check_draw(num: int, steps: tuple[int, int], split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if num < 1:
        raise ValueError(f"num must be at least 1 problem, got {num}")
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1] <= MAX_STEPS:
        raise ValueError(f"steps must be (fewest, most) within 1 ... {MAX_STEPS}, got {steps}")


def _check_problem(problem: Any) -> None:
    if not isinstance(problem, Problem):
        raise TypeError(f"expected a Problem, as problems() gives; got {type(problem).__name__}")
    if not problem.operands or len(problem.operations) != len(problem.operands):
        raise ValueError(f"a problem needs one operand for each operation, got {problem}")
    if any(op not in OPERATIONS for op in problem.operations):
        raise ValueError(f"operations are {' '.join(OPERATIONS)}; got {problem.operations!r}")
    if any(not 0 <= number < MODULUS for number in (problem.start, *problem.operands)):
        raise ValueError(f"numbers are 0 ... {MODULUS - 1}; got {problem}")
