"""The posteriors of many data sets, with what they cost and which of them failed and why."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import advice
from probinfer.core.status import Status

__all__ = ["ManyPosteriors", "accounts", "status_of"]

_FAILED = (
    Status.DEGENERATE_WEIGHTS
)  # from here on there are no draws to use; below, they are kept and flagged
_WORK = (
    "num_gradients",
    "num_leapfrogs",
    "num_integration_steps",
    "num_evaluations",
    "num_iterations",
    "num_steps",
)
_DIVERGENCES = ("num_divergences", "diverging", "is_divergent", "divergences")


class ManyPosteriors(NamedTuple):
    """The posteriors of S data sets, in their order, as arrays of the host.

    Attributes:
        draws: leaves (S, L, ...), those of failed data sets as they came.
        info: what ``infer_fn`` said beside them, leaves (S, ...); None if nothing.
        status: (S,) the worst ``Status`` of each data set; ``NON_FINITE`` where a draw is NaN or infinite.
        work: (S,) gradients, leapfrogs, evaluations or iterations, by the first such field of ``info``; or None.
        divergences: (S,) divergent transitions, or None.
        ess: (S,) the smallest of ``info.ess``, or None.
        mode: "map", "vmap" or "queue", whichever was used.
        num_missing: data sets, the last ones, that Ctrl-C left without a posterior; they are not among the S.
    """

    draws: Any
    info: Any
    status: np.ndarray
    work: np.ndarray | None
    divergences: np.ndarray | None
    ess: np.ndarray | None
    mode: str
    num_missing: int = 0

    @property
    def failed(self) -> np.ndarray:
        """(S,) data sets without usable draws: non-finite, no positive definite matrix, or no weight left."""
        return self.status >= _FAILED

    @property
    def failures(self) -> tuple[tuple[str, int], ...]:
        """(reason, number of data sets) for every status that occurs but ``OK``, the most frequent first."""
        codes, counts = np.unique(self.status[self.status != Status.OK], return_counts=True)
        found = [(f"{Status(c).name}: {advice(int(c))}", int(n)) for c, n in zip(codes, counts, strict=True)]
        return tuple(sorted(found, key=lambda pair: -pair[1]))

    def __repr__(self) -> str:
        """One line: how many, how many failed, what it cost."""
        parts = [f"{len(self.status)} data sets by {self.mode}", f"{int(self.failed.sum())} failed"]
        if self.num_missing:
            parts.append(f"{self.num_missing} more not begun: interrupted")
        if self.work is not None:
            parts.append(f"work {np.median(self.work):g} each (most {np.max(self.work):g})")
        if self.divergences is not None:
            parts.append(f"{int(self.divergences.sum())} divergences")
        if self.ess is not None:
            parts.append(f"ess {np.nanmedian(self.ess):.0f} each (least {np.nanmin(self.ess):.0f})")
        return f"ManyPosteriors({', '.join(parts)})"


def status_of(draws: Any, info: Any) -> np.ndarray:
    """Return the worst status (S,) that ``info`` has, ``NON_FINITE`` where a draw is."""
    num = len(jax.tree.leaves(draws)[0])
    bad = np.zeros(num, bool)
    for leaf in jax.tree.leaves(draws):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            bad |= ~np.isfinite(leaf).reshape(num, -1).all(axis=1)
    said = _field(info, ("status",))
    worst = np.zeros(num, int) if said is None else said.reshape(num, -1).max(axis=1).astype(int)
    return np.where(bad, int(Status.NON_FINITE), worst)


def accounts(info: Any) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Return work, divergences and smallest effective sample size, (S,) each, or None where ``info`` has them not."""
    work, divergences = (
        None if found is None else found.reshape(len(found), -1).sum(axis=1)
        for found in (_field(info, _WORK), _field(info, _DIVERGENCES))
    )
    sizes = _field(info, ("ess",))
    return work, divergences, None if sizes is None else sizes.reshape(len(sizes), -1).min(axis=1)


def _field(info: Any, names: tuple[str, ...]) -> np.ndarray | None:
    """The first of these fields or entries that is there, its leaves side by side: (S, ...)."""
    for name in names:
        found = info.get(name) if isinstance(info, dict) else getattr(info, name, None)
        leaves = jax.tree.leaves(found)
        if leaves:
            return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in leaves], axis=1)
    return None
