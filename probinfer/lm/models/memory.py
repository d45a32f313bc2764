"""Whether the caches of a run fit into memory, checked before they are allocated."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

__all__ = ["Load", "available_bytes", "check_memory", "predicted_bytes", "require"]


class Load(NamedTuple):
    """What a run holds in memory at once.

    Attributes:
        num_rows: number of texts at work at once, of each prompt.
        prompt_size: room of the prompt, in tokens.
        max_tokens: room of each text, in tokens.
        batch: number of prompts that run side by side.
        num_prompts: number of prompts that have been read, for this batch and the next ones.
        chains: number of chains of particle Gibbs side by side; 0 for other methods.
    """

    num_rows: int
    prompt_size: int
    max_tokens: int
    batch: int = 1
    num_prompts: int = 1
    chains: int = 0

    @property
    def copies(self) -> int:
        """Number of copies of each private cache at once, as measured in compiled programs.

        A fork copies them; prompts or chains side by side select between old and new ones; particle Gibbs reads its
        reference into others.
        """
        side_by_side = self.batch * max(self.chains, 1) > 1
        return (9 if side_by_side else 3) if self.chains else (3 if side_by_side else 2)

    def parts(self, network: Any, reward: Any = None) -> dict[str, int]:
        """Return the bytes of each part beside the weights; logits and distributions as four float32 arrays (N, V).

        Args:
            network: the language model.
            reward: a potential or a score; None: nothing that has a cache.
        """
        rows = self.batch * self.num_rows
        # prompts side by side are stacked, which copies them
        num_prompts = self.num_prompts + (self.batch if self.batch > 1 else 0)
        parts = {
            "the caches of the texts": self.copies * network.cache_bytes(rows, self.max_tokens),
            "the prompts": num_prompts * network.prompt_bytes(self.prompt_size),
            "the logits": 16 * rows * network.vocab_size,
        }
        if reward is not None:
            caches = self.copies * reward.cache_bytes(rows, self.max_tokens)
            prompts = self.batch * max(self.chains, 1) * reward.prompt_bytes(self.prompt_size)
            parts["the caches of the reward"] = caches + prompts
        return parts


def predicted_bytes(
    network: Any, num_rows: int, prompt_size: int, max_tokens: int, reward: Any = None, **counts: int
) -> int:
    """Return the bytes that a run needs beside the weights.

    Args:
        network: the language model.
        num_rows: number of texts at work at once, of each prompt.
        prompt_size: room of the prompt, in tokens.
        max_tokens: room of each text, in tokens.
        reward: a potential or a score that may have caches of its own.
        **counts: ``batch``, ``num_prompts`` and ``chains`` of ``Load``.
    """
    return sum(Load(num_rows, prompt_size, max_tokens, **counts).parts(network, reward).values())


def available_bytes() -> int | None:
    """Return the bytes that are free on the default device, or None if neither device nor system reports them."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _free_memory()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def _free_memory() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        names = getattr(os, "sysconf_names", {})
        supported = "SC_AVPHYS_PAGES" in names and "SC_PAGE_SIZE" in names
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if supported else None


def check_memory(
    network: Any, num_rows: int, prompt_size: int, max_tokens: int, reward: Any = None, **counts: int
) -> None:
    """Refuse a run whose caches cannot fit.

    Args:
        network: as for ``predicted_bytes``, like all others.
        num_rows: see there.
        prompt_size: see there.
        max_tokens: see there.
        reward: see there.
        **counts: see there.

    Raises:
        MemoryError: more is needed than is free; the message names the largest part, and what would fit.
    """
    load, available = Load(num_rows, prompt_size, max_tokens, **counts), available_bytes()
    parts = load.parts(network, reward)
    needed = sum(parts.values())
    if available is None or needed <= available:
        return

    def fits(changed: Load) -> bool:
        return sum(changed.parts(network, reward).values()) <= available

    largest = max(parts, key=lambda name: parts[name])
    side_by_side = f", {load.batch} prompts side by side," if load.batch > 1 else ""
    what = f"the caches of {num_rows} texts of up to {max_tokens} tokens{side_by_side}"
    cause = f"the largest part is {largest}, {_gib(parts[largest])}; "
    require(needed, what, f"{cause}{_what_fits(load, fits)}{_ADVICE[largest]}", available)


_ADVICE = {
    "the caches of the texts": "; or load the model in bfloat16",
    "the prompts": "; or give fewer or shorter prompts at a time",
    "the logits": "",
    "the caches of the reward": "; or load the models in bfloat16, or take a smaller reward model",
}


def _what_fits(load: Load, fits: Callable[[Load], bool]) -> str:
    """Say which settings would be enough if lowered, and to what value."""
    batch = _largest_that_fits(load.batch, lambda value: fits(load._replace(batch=value)))
    rows = _largest_that_fits(load.num_rows, lambda value: fits(load._replace(num_rows=value)))
    tokens = _largest_that_fits(load.max_tokens, lambda value: fits(load._replace(max_tokens=value)))
    options = [f"lower batch to {batch}"] if batch else []
    options += [f"lower num_particles (n of a search): {rows} texts at once would fit"] if rows else []
    options += [f"lower max_tokens to {tokens}"] if tokens else []
    if options:
        return ", or ".join(options)
    and_batch = ", batch" if load.batch > 1 else ""
    return (
        f"no setting alone is enough: lower max_tokens{and_batch} and num_particles (n of a search) together"
    )


def _largest_that_fits(current: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number below ``current`` that fits, 0 if none does; by bisection."""
    low, high = 0, current
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def require(needed: int, what: str, advice: str, available: int | None = None) -> None:
    """Refuse an allocation that does not fit.

    Args:
        needed: bytes that are needed.
        what: what needs them.
        advice: what to do if they do not fit.
        available: bytes that are free; ``None``: ask the device.

    Raises:
        MemoryError: more is needed than is free.
    """
    available = available_bytes() if available is None else available
    if available is not None and needed > available:
        raise MemoryError(f"{what} need {_gib(needed)} and {_gib(available)} are free: {advice}")


def _gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"
