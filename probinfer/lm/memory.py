"""Whether the caches fit, asked before they are allocated."""

from __future__ import annotations

import os
from typing import Any

import jax

__all__ = ["available_bytes", "check_memory", "predicted_bytes", "require"]


def predicted_bytes(network: Any, num_rows: int, prompt_size: int, max_tokens: int) -> int:
    """Bytes that a run needs beside the weights.

    The private caches are counted twice, as a fork copies them; logits, law and draws as four arrays (N, V).

    Args:
        network: the language model.
        num_rows: texts at work at once.
        prompt_size: room of the prompt, in tokens.
        max_tokens: room of each text.
    """
    cache = 2 * network.cache_bytes(num_rows, max_tokens)
    return cache + network.prompt_bytes(prompt_size) + 16 * num_rows * network.vocab_size


def available_bytes() -> int | None:
    """Bytes that the default device could still give, or None where nobody says."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _free_memory()
    found = device.memory_stats() or {}
    if "bytes_limit" not in found:
        return None
    return found["bytes_limit"] - found.get("bytes_in_use", 0)


def _free_memory() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        names = getattr(os, "sysconf_names", {})
        known = "SC_AVPHYS_PAGES" in names and "SC_PAGE_SIZE" in names
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None


def check_memory(network: Any, num_rows: int, prompt_size: int, max_tokens: int) -> None:
    """Refuse a run whose caches cannot fit.

    Raises:
        MemoryError: with what is needed, what there is, and what would fit.
    """
    needed, there = predicted_bytes(network, num_rows, prompt_size, max_tokens), available_bytes()
    if there is None or needed <= there:
        return
    fixed = network.prompt_bytes(prompt_size)
    rows = int((there - fixed) / max((needed - fixed) / num_rows, 1))
    fits = f"{rows} texts at once would fit" if rows > 0 else "even one text would not fit"
    what = f"the caches of {num_rows} texts of up to {max_tokens} tokens"
    require(needed, what, f"{fits}; or lower max_tokens, or load the model in bfloat16", there)


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
    left = available_bytes() if left is None else left
    if left is not None and needed > left:
        raise MemoryError(f"{what} need {_gib(needed)} and {_gib(left)} are free: {advice}")


def _gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"
