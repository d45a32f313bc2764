"""Whether the caches fit, asked before they are allocated."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

__all__ = ["Load", "available_bytes", "check_memory", "predicted_bytes", "require"]


class Load(NamedTuple):
    """What a run holds at once.

    Attributes:
        num_rows: texts at work at once, of each prompt.
        prompt_size: room of the prompt, in tokens.
        max_tokens: room of each text.
        batch: prompts that run side by side.
        num_prompts: prompts that were read for this run and the next ones.
        chains: of particle Gibbs, side by side; 0: no method of that kind.
    """

    num_rows: int
    prompt_size: int
    max_tokens: int
    batch: int = 1
    num_prompts: int = 1
    chains: int = 0

    @property
    def copies(self) -> int:
        """How many of each private cache, as measured of compiled programs.

        A fork copies them; prompts or chains side by side select between old and new ones; particle Gibbs reads its
        reference into others.
        """
        together = self.batch * max(self.chains, 1) > 1
        return (9 if together else 3) if self.chains else (3 if together else 2)

    def parts(self, network: Any, reward: Any = None) -> dict[str, int]:
        """Bytes of each part beside the weights; logits, law and draws as four arrays (N, V).

        Args:
            network: the language model.
            reward: a potential or a score; None: nothing that has a cache.
        """
        rows = self.batch * self.num_rows
        read = self.num_prompts + (self.batch if self.batch > 1 else 0)  # side by side they are stacked
        parts = {
            "the caches of the texts": self.copies * network.cache_bytes(rows, self.max_tokens),
            "the prompts": read * network.prompt_bytes(self.prompt_size),
            "the logits": 16 * rows * network.vocab_size,
        }
        if reward is not None:
            own = self.copies * reward.cache_bytes(rows, self.max_tokens)
            read = self.batch * max(self.chains, 1)
            parts["the caches of the reward"] = own + read * reward.prompt_bytes(self.prompt_size)
        return parts


def predicted_bytes(
    network: Any, num_rows: int, prompt_size: int, max_tokens: int, reward: Any = None, **more: int
) -> int:
    """Bytes that a run needs beside the weights.

    Args:
        network: the language model.
        num_rows: texts at work at once, of each prompt.
        prompt_size: room of the prompt, in tokens.
        max_tokens: room of each text.
        reward: a potential or a score that may keep caches of its own.
        **more: ``batch``, ``num_prompts`` and ``chains`` of ``Load``.
    """
    return sum(Load(num_rows, prompt_size, max_tokens, **more).parts(network, reward).values())


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


def check_memory(
    network: Any, num_rows: int, prompt_size: int, max_tokens: int, reward: Any = None, **more: int
) -> None:
    """Refuse a run whose caches cannot fit.

    Args:
        network: as for ``predicted_bytes``, as all others.
        num_rows: see there.
        prompt_size: see there.
        max_tokens: see there.
        reward: see there.
        **more: see there.

    Raises:
        MemoryError: with what is needed, what there is, which part is the largest, and what would fit.
    """
    load, there = Load(num_rows, prompt_size, max_tokens, **more), available_bytes()
    parts = load.parts(network, reward)
    needed = sum(parts.values())
    if there is None or needed <= there:
        return

    def fits(changed: Load) -> bool:
        return sum(changed.parts(network, reward).values()) <= there

    largest = max(parts, key=lambda name: parts[name])
    side = f", {load.batch} prompts side by side," if load.batch > 1 else ""
    what = f"the caches of {num_rows} texts of up to {max_tokens} tokens{side}"
    most = f"the largest part is {largest}, {_gib(parts[largest])}; "
    require(needed, what, f"{most}{_what_fits(load, fits)}{_ADVICE[largest]}", there)


_ADVICE = {
    "the caches of the texts": "; or load the model in bfloat16",
    "the prompts": "; or give fewer or shorter prompts at a time",
    "the logits": "",
    "the caches of the reward": "; or load the models in bfloat16, or take a smaller reward model",
}


def _what_fits(load: Load, fits: Callable[[Load], bool]) -> str:
    """Which one of the numbers would be enough, and how small."""
    batch = _most(load.batch, lambda value: fits(load._replace(batch=value)))
    rows = _most(load.num_rows, lambda value: fits(load._replace(num_rows=value)))
    tokens = _most(load.max_tokens, lambda value: fits(load._replace(max_tokens=value)))
    ways = [f"lower batch to {batch}"] if batch else []
    ways += [f"lower num_particles (n of a search): {rows} texts at once would fit"] if rows else []
    ways += [f"lower max_tokens to {tokens}"] if tokens else []
    if ways:
        return ", or ".join(ways)
    several = ", batch" if load.batch > 1 else ""
    return (
        f"none of them alone is enough: lower max_tokens{several} and num_particles (n of a search) together"
    )


def _most(top: int, fits: Callable[[int], bool]) -> int:
    """The largest number below ``top`` that fits, 0 if none does."""
    low, high = 0, top
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


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
