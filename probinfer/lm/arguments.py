"""Arguments that several functions take: read and refused before anything is compiled."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import shortened

__all__ = ["as_count", "as_stop", "check_answer", "check_watch", "known_number"]


def as_count(name: str, value: Any, least: int = 1) -> int:
    """An int of at least ``least``; NumPy's integers are taken too.

    Raises:
        TypeError: it is no integer.
        ValueError: it is too small.
    """
    expected = f"{name} must be an int of at least {least}, got {shortened(value)}"
    if isinstance(value, bool):
        raise TypeError(expected)
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(expected) from None
    if number < least:
        raise ValueError(expected)
    return number


def known_number(name: str, value: Any) -> float | None:
    """The value of a number where it is known now, whatever holds it: Python, NumPy or JAX; None of a traced one.

    Raises:
        TypeError: it is no single number.
    """
    kind = getattr(value, "dtype", None)
    numeric = isinstance(value, (int, float)) if kind is None else _is_real(kind)
    if isinstance(value, bool) or not numeric or jnp.ndim(value):
        raise TypeError(f"{name} must be a number, got {shortened(value)}")
    return None if isinstance(value, jax.core.Tracer) else float(value)


def _is_real(kind: Any) -> bool:
    return bool(jnp.issubdtype(kind, np.floating) or jnp.issubdtype(kind, np.integer))


def as_stop(stop: Any) -> tuple[str, ...]:
    """The strings that end a text, of one string or of several.

    Raises:
        TypeError: they are no strings.
        ValueError: one is empty.
    """
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, (tuple, list, set, frozenset)) or not all(
        isinstance(string, str) for string in strings
    ):
        raise TypeError(f'stop is a string or several, such as stop=("\\n",); got {shortened(stop)}')
    if "" in strings:
        raise ValueError("an empty stop string is everywhere: leave it out")
    return tuple(strings)


def check_answer(answer: Any) -> Callable[[str], str | None]:
    """Return what reads answers from texts.

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(answer):
        raise TypeError(
            f"answer is a function of a text that returns its answer or None: lm.answers.last_boxed, "
            f"lm.answers.last_number, lm.answers.text (the text itself) or your own; got {shortened(answer)}"
        )
    return answer


def check_watch(watch: Any) -> None:
    """Refuse what cannot look on.

    Raises:
        TypeError: it cannot be called.
    """
    if watch is not None and not callable(watch):
        raise TypeError(
            f"watch is a function of an lm.Event, called after every step; got {shortened(watch)}"
        )
