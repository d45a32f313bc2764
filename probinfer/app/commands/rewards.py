"""A reward from what was typed: the model's own, a Python function of a module or a file, or none."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from probinfer import lm
from probinfer.lm.rewards.meanings import MEANINGS

__all__ = ["MEANINGS", "load_reward"]


def load_reward(spec: str | None, meaning: str | None, model: lm.Model) -> Any:
    """The reward that ``--reward`` names.

    Args:
        spec: "model", "none", ``module:name`` or ``file.py:name``; None: "model" where it has one, else "none". The
            name is a function ``(prompt, text) -> number``, a score, or a reward of ``lm.rewards``.
        meaning: of the numbers; None: odds of a reward model, the twist of a function.
        model: whose own reward is meant.

    Raises:
        ValueError: it cannot be found or imported; a meaning without numbers.
    """
    spec = ("none" if model.reward is None else "model") if spec is None else spec
    if spec == "none":
        if meaning is not None:
            raise ValueError(f"--meaning {meaning} says what a reward's numbers mean: give --reward too")
        return None
    if spec == "model":
        if model.reward is None:
            raise ValueError("--reward model: this checkpoint has none; give module:function, or none")
        return lm.rewards.from_model(model.reward, **_stated(meaning))
    return _reward(spec, _found(spec), meaning)


def _reward(spec: str, found: Any, meaning: str | None) -> Any:
    if isinstance(found, lm.rewards.Score):
        return lm.rewards.from_score(found, **_stated(meaning))
    if isinstance(found, lm.rewards.Potential) or hasattr(found, "bind"):
        if meaning is not None:
            raise ValueError(f"--reward {spec} has a meaning of its own: leave out --meaning")
        return found
    if not callable(found):
        raise ValueError(f"--reward {spec} must be a function (prompt, text) -> number, it is {found!r:.80}")
    return lm.rewards.from_python(found, **_stated(meaning))


def _stated(meaning: str | None) -> dict[str, str]:
    return {} if meaning is None else {"meaning": meaning}


def _found(spec: str) -> Any:
    """The object ``module:name``; modules of the working folder are found too."""
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(f"--reward must be model, none, module:function or file.py:function; got {spec}")
    module = _module(spec, where)
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
            raise ValueError(
                f"--reward {spec}: {where} has no {name}; it has {', '.join(names) or 'nothing'}"
            )
        found = getattr(found, part)
    return found


def _module(spec: str, where: str) -> Any:
    """Import by name; worker processes look in the same places."""
    path = Path(where).expanduser()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise ValueError(f"--reward {spec}: there is no file {path}")
    folder = str(path.resolve().parent) if is_file else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(path.stem if is_file else where)
    except Exception as error:  # whatever the module does
        raise ValueError(f"--reward {spec}: importing it failed, {type(error).__name__}: {error}") from error
    if is_file and Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():
        raise ValueError(f"--reward {spec}: another module is called {path.stem}; rename the file")
    return module
