"""Parse the option ``--reward``: the model's reward, a Python function of a module or a file, or none."""

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
    """Return the reward that ``--reward`` names.

    Args:
        spec: "model", "none", ``module:name`` or ``file.py:name``; None: "model" if the model has a reward, else
            "none". The name is that of a function ``(prompt, text) -> number``, a score, or a reward of ``lm.rewards``.
        meaning: meaning of the numbers; None: odds for a reward model, twist for a function.
        model: the model whose reward "model" refers to.

    Raises:
        ValueError: the object cannot be found or imported, or a meaning is given without numbers.
    """
    spec = ("none" if model.reward is None else "model") if spec is None else spec
    if spec == "none":
        if meaning is not None:
            raise ValueError(f"--meaning {meaning} says what the numbers of a reward mean: give --reward too")
        return None
    if spec == "model":
        if model.reward is None:
            raise ValueError("--reward model: this checkpoint has no reward; give module:function, or none")
        return lm.rewards.from_model(model.reward, **_meaning_option(meaning))
    return _as_reward(spec, _load_object(spec), meaning)


def _as_reward(spec: str, value: Any, meaning: str | None) -> Any:
    if isinstance(value, lm.rewards.Score):
        return lm.rewards.from_score(value, **_meaning_option(meaning))
    if isinstance(value, lm.rewards.Potential) or hasattr(value, "bind"):
        if meaning is not None:
            raise ValueError(f"--reward {spec} already defines its meaning: leave out --meaning")
        return value
    if not callable(value):
        raise ValueError(f"--reward {spec} must be a function (prompt, text) -> number, it is {value!r:.80}")
    return lm.rewards.from_python(value, **_meaning_option(meaning))


def _meaning_option(meaning: str | None) -> dict[str, str]:
    return {} if meaning is None else {"meaning": meaning}


def _load_object(spec: str) -> Any:
    """Return the object ``module:name``; the module may be in the working folder."""
    module_name, colon, name = spec.rpartition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"--reward must be model, none, module:function or file.py:function; got {spec}")
    module = _import_module(spec, module_name)
    value = module
    for part in name.split("."):
        if not hasattr(value, part):
            names = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
            raise ValueError(
                f"--reward {spec}: {module_name} has no {name}; it has {', '.join(names) or 'no functions'}"
            )
        value = getattr(value, part)
    return value


def _import_module(spec: str, module_name: str) -> Any:
    """Import a module by its name or file; its folder joins ``sys.path``, which worker processes search too."""
    path = Path(module_name).expanduser()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise ValueError(f"--reward {spec}: there is no file {path}")
    folder = str(path.resolve().parent) if is_file else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(path.stem if is_file else module_name)
    except Exception as error:  # a user's module may raise anything when it is imported
        raise ValueError(f"--reward {spec}: importing it failed, {type(error).__name__}: {error}") from error
    # Another module of the same name may have been imported before, and would be used in silence.
    if is_file and Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():
        raise ValueError(f"--reward {spec}: another module is called {path.stem}; rename the file")
    return module
