"""The posteriors of many data sets: their draws, their costs, and which of them failed and why."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import advice
from probinfer.core.status import Status
from probinfer.core.types import ArrayTree

__all__ = ["ManyPosteriors", "costs_of", "status_of"]

# A status from here on leaves no draws to use; draws with a lower one are kept and flagged.
_FAILED = Status.DEGENERATE_WEIGHTS
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
        draws: leaves (S, L, ...), including those of failed data sets.
        info: the report of ``infer_fn``, leaves (S, ...); None if it returns none.
        status: (S,) the largest ``Status`` of each data set; ``NON_FINITE`` if a draw is NaN or infinite.
        work: (S,) gradients, leapfrogs, evaluations or iterations, by the first such field of ``info``; or None.
        divergences: (S,) divergent transitions, or None.
        ess: (S,) the smallest of ``info.ess``, or None.
        mode: the mode that was used: "map", "vmap" or "queue".
        num_missing: number of data sets, the last ones, that have no posterior because of Ctrl-C; they are not among
            the S.
    """

    draws: ArrayTree
    info: ArrayTree
    status: np.ndarray
    work: np.ndarray | None
    divergences: np.ndarray | None
    ess: np.ndarray | None
    mode: str
    num_missing: int = 0

    @property
    def failed(self) -> np.ndarray:
        """(S,) data sets without usable draws: a non-finite value, an indefinite matrix, or no weight left."""
        return self.status >= _FAILED

    @property
    def failures(self) -> tuple[tuple[str, int], ...]:
        """(reason, number of data sets) for every status that occurs except ``OK``, the most frequent first."""
        codes, counts = np.unique(self.status[self.status != Status.OK], return_counts=True)
        reasons = [
            (f"{Status(c).name}: {advice(int(c))}", int(n)) for c, n in zip(codes, counts, strict=True)
        ]
        return tuple(sorted(reasons, key=lambda pair: -pair[1]))

    def __repr__(self) -> str:
        """Return one line: the number of data sets, of failures, and the cost."""
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
    """Return the largest status (S,) that ``info`` reports; ``NON_FINITE`` for a data set with a non-finite draw."""
    num = len(jax.tree.leaves(draws)[0])
    bad = np.zeros(num, bool)
    for leaf in jax.tree.leaves(draws):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            bad |= ~np.isfinite(leaf).reshape(num, -1).all(axis=1)
    reported = _field(info, ("status",))
    status = np.zeros(num, int) if reported is None else reported.reshape(num, -1).max(axis=1).astype(int)
    return np.where(bad, int(Status.NON_FINITE), status)


def costs_of(info: Any) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Return work, divergences and smallest effective sample size, (S,) each; None if ``info`` does not report them."""
    work, divergences = (
        None if values is None else values.reshape(len(values), -1).sum(axis=1)
        for values in (_field(info, _WORK), _field(info, _DIVERGENCES))
    )
    sizes = _field(info, ("ess",))
    return work, divergences, None if sizes is None else sizes.reshape(len(sizes), -1).min(axis=1)


def _field(info: Any, names: tuple[str, ...]) -> np.ndarray | None:
    """Return the first of these fields or entries that exists, its leaves side by side (S, ...)."""
    for name in names:
        values = info.get(name) if isinstance(info, dict) else getattr(info, name, None)
        leaves = jax.tree.leaves(values)
        if leaves:
            return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in leaves], axis=1)
    return None
