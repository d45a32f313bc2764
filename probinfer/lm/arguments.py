"""Arguments that several functions take: checked before anything is compiled."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import shortened

__all__ = ["as_count", "as_stop", "check_answer", "check_watch", "concrete_number"]


def as_count(name: str, value: Any, minimum: int = 1) -> int:
    """Return an int of at least ``minimum``; integers of NumPy are accepted.

    Raises:
        TypeError: the value is not an integer.
        ValueError: it is below the minimum.
    """
    message = f"{name} must be an int of at least {minimum}, got {shortened(value)}"
    if isinstance(value, bool):
        raise TypeError(message)
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(message) from None
    if number < minimum:
        raise ValueError(message)
    return number


def concrete_number(name: str, value: Any) -> float | None:
    """Return a number of Python, NumPy or JAX as a float; None if it is traced, so that its value is not known yet.

    Raises:
        TypeError: it is not a single number.
    """
    dtype = getattr(value, "dtype", None)
    numeric = isinstance(value, (int, float)) if dtype is None else _is_real(dtype)
    if isinstance(value, bool) or not numeric or jnp.ndim(value):
        raise TypeError(f"{name} must be a number, got {shortened(value)}")
    return None if isinstance(value, jax.core.Tracer) else float(value)


def _is_real(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, np.floating) or jnp.issubdtype(dtype, np.integer))


def as_stop(stop: Any) -> tuple[str, ...]:
    """Return the strings that end a text, given one string or several.

    Raises:
        TypeError: they are not strings.
        ValueError: one is empty.
    """
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, (tuple, list, set, frozenset)) or not all(
        isinstance(string, str) for string in strings
    ):
        raise TypeError(f'stop is a string or several, such as stop=("\\n",); got {shortened(stop)}')
    if "" in strings:
        raise ValueError("an empty stop string would match everywhere: leave it out")
    return tuple(strings)


def check_answer(answer: Any) -> Callable[[str], str | None]:
    """Return the function that reads answers from texts.

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
    """Refuse a ``watch`` that cannot be called.

    Raises:
        TypeError: it cannot be called.
    """
    if watch is not None and not callable(watch):
        raise TypeError(
            f"watch is a function of an lm.Event, called after every step; got {shortened(watch)}"
        )
