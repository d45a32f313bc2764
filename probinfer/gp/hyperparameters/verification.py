"""Point estimates are verified before the best is chosen.

A search that climbs an approximate evidence ends where the approximation is best or where it fails worst. So the end of
every restart is conditioned anew, from where the search started and from scratch: an end counts where the first
converged, the number is one that an evidence can be, and the second does not contradict it. Where evidences have a
bound the second need not converge: from afar EP may miss a fixed point that it holds to nearby.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import ConvergenceWarning
from probinfer.core.status import Status
from probinfer.core.types import Array
from probinfer.gp.approximation.conditioning import Settled

__all__ = ["Verified", "held_warnings", "release", "verified", "worse"]

_ROOTS = 10.0


class Verified(NamedTuple):
    """The best end of all restarts."""

    models: Any
    """The model there, leaves ``(1, ...)``."""
    settled: Settled
    """What inference found there, leaves ``(1, ...)``."""
    info: Any
    """The report of the search with the statuses, values and the choice after verification."""


def verified(
    info: Any, build: Callable[[Any], Any], settle_at: Callable[[Any, Any], Settled], *, bounded: bool = False
) -> Verified:
    """Condition at the end of every restart and choose the best that can be trusted.

    Args:
        info: the ``MAPInfo`` of R restarts.
        build: unconstrained positions, leaves ``(R, ...)``, to models.
        settle_at: what inference finds at models with 2 R rows, and which of the searches are to start from scratch.
        bounded: whether every evidence is known to be below a bound, which ``settle_at`` has looked at.

    Returns:
        The best verified end, or where there is none the best of the rest with its status.
    """
    models, num = build(info.positions), len(info.values)
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), models)
    both = settle_at(twice, jnp.arange(2 * num) < num)
    fresh, warm = (jax.tree.map(lambda leaf, i=i: leaf[i * num : (i + 1) * num], both) for i in (0, 1))
    verdicts = _verdicts(fresh, warm, bounded)
    values = np.where(np.isfinite(warm.log_evidence), np.asarray(info.values), -np.inf)
    statuses = np.maximum(verdicts, info.statuses)
    best = _best(values, verdicts == Status.OK, statuses)
    interrupted = int(info.status) == Status.INTERRUPTED
    status = max(int(statuses[best]), int(Status.INTERRUPTED) if interrupted else 0)
    model, settled = jax.tree.map(lambda leaf: leaf[best][None], (models, warm))
    return Verified(
        model,
        settled,
        info._replace(
            log_density=info.values[best],
            log_likelihood=None if info.log_likelihood is None else info.values[best],
            values=jnp.asarray(values, info.values.dtype),
            statuses=jnp.asarray(statuses, jnp.int32),
            best=jnp.int32(best),
            status=jnp.int32(status),
        ),
    )


def _verdicts(fresh: Settled, warm: Settled, bounded: bool) -> np.ndarray:
    """A status for each end: that of the conditioning, and what the one from scratch has against it."""
    gap = np.abs(np.asarray(fresh.log_evidence - warm.log_evidence, float))
    apart = np.isfinite(gap) & (gap > _tolerance(warm.log_evidence))
    worst = warm.status if bounded else np.maximum(fresh.status, warm.status)
    return np.maximum(worst, np.where(apart, int(Status.POOR_APPROXIMATION), int(Status.OK)))


def _best(values: np.ndarray, verified: np.ndarray, statuses: np.ndarray) -> int:
    """The highest of the verified ends, or of all where none is; of those that tie, one whose search converged."""
    among = verified if verified.any() else np.ones_like(verified)
    highest = np.max(values[among])
    tied = among & (values >= highest - _tolerance(highest))
    return int(min(np.flatnonzero(tied), key=lambda i: (statuses[i] != Status.OK, -values[i])))


def _tolerance(values: Any) -> Any:
    """Differences of evidences that do not matter: 10 roots of the machine epsilon."""
    size = np.abs(np.asarray(values, float))
    size = np.where(np.isfinite(size), size, 0)
    return _ROOTS * float(jnp.finfo(jnp.asarray(values).dtype).eps) ** 0.5 * (1 + size)


@contextlib.contextmanager
def held_warnings() -> Iterator[list]:
    """Keep the warnings of a search back: what it says of its best end is settled by the verification.

    Yields:
        Where they are kept, for ``release``; after an error they are released.
    """
    caught: list = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    except BaseException:
        release(caught)
        raise


def release(caught: list, status: Status | int | Array = Status.NON_FINITE) -> None:
    """Warn of what was kept back, at the lines that it was about.

    Args:
        caught: of ``held_warnings``.
        status: of the verified result; what is ``OK`` has converged.
    """
    for one in caught:
        if int(status) != Status.OK or not issubclass(one.category, ConvergenceWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def worse(info: Any, status: Status | int | Array) -> Any:
    """The report with a status that is at least as bad as another one."""
    return info._replace(status=jnp.maximum(jnp.asarray(info.status), int(status)).astype(jnp.int32))
