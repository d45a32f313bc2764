"""Whether the caches fit, asked before they are allocated."""

from __future__ import annotations

import os
from typing import Any

import jax

__all__ = ["available", "available_bytes", "check_memory", "check_particles", "predicted_bytes", "require"]


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
    advice = f"{rows} texts at once would fit" if rows > 0 else "even one text would not fit"
    raise MemoryError(
        f"{num_rows} texts of up to {max_tokens} tokens need {needed / 2**30:.1f} GiB for their caches, and "
        f"{there / 2**30:.1f} GiB are free: {advice}; or lower max_tokens, or load the model in bfloat16"
    )


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


available = available_bytes


def _gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"
