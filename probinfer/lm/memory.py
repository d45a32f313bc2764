"""Memory is predicted before it is taken: bytes of weights and caches against what the device has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

__all__ = ["available", "check_particles", "require"]


def available() -> int | None:
    """Bytes that the default device has left; ``None`` where it does not say."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    if device.platform != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def require(needed: int, what: str, advice: str, left: int | None = None) -> None:
    """Refuse what does not fit.

    Args:
        needed: bytes.
        what: takes them.
        advice: what to do about it.
        left: bytes there are; ``None``: ask the device.

    Raises:
        MemoryError: more is needed than there is.
    """
    left = available() if left is None else left
    if left is not None and needed > left:
        raise MemoryError(f"{what} needs {_gib(needed)} and {_gib(left)} are free: {advice}")


def check_particles(
    model: Any, num: int, max_len: int, prompt_len: int, prompts: int = 1, left: int | None = None
) -> int:
    """Refuse more particles than fit: prompts, caches, and as much again for a fork that copies.

    Args:
        model: a language model.
        num: particles of each prompt.
        max_len: tokens of each particle.
        prompt_len: tokens of a prompt, padding included.
        prompts: of them at once.
        left: bytes there are; ``None``: ask the device.

    Returns:
        The bytes predicted.

    Raises:
        MemoryError: they do not fit.
    """
    logits = num * model.vocab_size * 4 * 3  # logits, probabilities and their sums
    needed = prompts * (model.prompt_bytes(prompt_len) + 2 * model.cache_bytes(num, max_len) + logits)
    what = f"{num} particles of {max_len} tokens after {prompts} prompt(s) of {prompt_len}"
    require(
        needed,
        what,
        "take fewer particles, a smaller max_tokens, fewer prompts at once or bfloat16 weights",
        left,
    )
    return needed


def _gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"
