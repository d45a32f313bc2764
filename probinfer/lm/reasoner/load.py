"""The reasoner as it comes with the package: its folder, its problems, its checker."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from probinfer.lm.reasoner.task import Problem, answer, check, draw, pick

__all__ = ["Problem", "answer", "check", "folder", "problems"]


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
