"""Arguments, checked once: each check refuses a bad value and says what was expected, what came and what to do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import shortened

__all__ = [
    "BATCH_MODES",
    "check_count",
    "check_counts",
    "check_finite",
    "check_floating",
    "check_key",
    "check_mode",
]

BATCH_MODES = ("auto", "map", "vmap")


def check_key(key: Any) -> None:
    """Refuse what is not one typed random key.

    Raises:
        TypeError: a number, an old-style key, or several keys.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key) or jnp.shape(key) != ():
        raise TypeError(f"key must be one typed key, from jax.random.key(seed); got {shortened(key)}")


def check_count(name: str, value: Any, minimum: int = 1, *, maximum: int | None = None) -> int:
    """Return a count as a Python integer.

    Args:
        name: of the argument, for the message.
        value: should be a Python or NumPy integer; booleans are refused.
        minimum: the smallest count allowed.
        maximum: the largest count allowed, if there is one.

    Raises:
        TypeError: not an integer.
        ValueError: outside the limits.
    """
    limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer {limits}, got {shortened(value)}")
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"{name} must be an integer {limits}, got {value}")
    return int(value)


def check_counts(config: Any, names: tuple[str, ...]) -> None:
    """Refuse settings that should count something and are not integers.

    Args:
        config: an engine.
        names: of its fields.

    Raises:
        TypeError: a field is not an integer.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an integer, got {shortened(value)}; give settings by name")


def check_mode(mode: Any, modes: tuple[str, ...] = BATCH_MODES) -> None:
    """Refuse an unknown way of doing a batch.

    Args:
        mode: should be one of ``modes``.
        modes: ``"map"`` does the members one after another, ``"vmap"`` side by side, ``"queue"`` in lanes, and
            ``"auto"`` as the device and the work suggest.

    Raises:
        ValueError: the mode is unknown.
    """
    if mode not in modes:
        *others, last = map(repr, modes)
        raise ValueError(f"mode must be {', '.join(others)} or {last}, got {shortened(mode)}")


def check_floating(name: str, value: Any) -> None:
    """Refuse arrays that are not floating point.

    Raises:
        TypeError: the dtype is integer, boolean, complex or not numeric.
    """
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating point, got dtype {dtype}; convert it, for example with .astype(float)"
        )


def check_finite(name: str, value: Any) -> None:
    """Refuse concrete arrays with NaN or infinite entries, and name their places; traced arrays pass.

    Raises:
        ValueError: an entry is NaN or infinite.
    """
    if isinstance(value, jax.core.Tracer):
        return
    bad = np.argwhere(~np.isfinite(np.asarray(value)))
    if len(bad):
        where = ", ".join(str(tuple(int(i) for i in row)) for row in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"{name} has {len(bad)} entries that are NaN or infinite, at {where}{more}; drop or impute those rows"
        )
