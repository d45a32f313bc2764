"""Point estimates are verified before the best is chosen.

A search that maximizes an approximate evidence ends where the approximation is best or where it fails worst. So the
model at the end of every restart is conditioned again, once from the sites at which the search started and once from
scratch. An end is accepted if the first converged to a number that can be an evidence, and the second does not
contradict it. If evidences are bounded the second need not converge: from afar EP may miss a fixed point at which it
stays when started nearby.
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
from probinfer.gp.approximation.conditioning import SiteSolutions

__all__ = ["VerifiedEstimate", "held_warnings", "release_warnings", "verify_ends", "worsen_status"]

_TOLERANCE = 10.0  # square roots of the machine epsilon


class VerifiedEstimate(NamedTuple):
    """The best end of all restarts."""

    models: Any
    """The model there, leaves ``(1, ...)``."""
    solutions: SiteSolutions
    """Sites and evidence there, leaves ``(1, ...)``."""
    info: Any
    """The report of the search, with the statuses, values and choice after verification."""


def verify_ends(
    info: Any,
    build: Callable[[Any], Any],
    condition_models: Callable[[Any, Any], SiteSolutions],
    *,
    bounded: bool = False,
) -> VerifiedEstimate:
    """Condition at the end of every restart and choose the best that can be trusted.

    Args:
        info: the ``MAPInfo`` of R restarts.
        build: maps unconstrained positions, leaves ``(R, ...)``, to models.
        condition_models: maps models with 2 R rows, and which of the searches start from scratch, to solutions.
        bounded: whether every evidence is below a known bound, which ``condition_models`` has checked.

    Returns:
        The best verified end; if no end is verified, the best of all with its status.
    """
    # Condition at every end, from scratch and from the sites at which the search started
    models, num = build(info.positions), len(info.values)
    repeated = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), models)
    solutions = condition_models(repeated, jnp.arange(2 * num) < num)
    fresh, warm = (jax.tree.map(lambda leaf, i=i: leaf[i * num : (i + 1) * num], solutions) for i in (0, 1))

    # Choose the best
    verdicts = _verdicts(fresh, warm, bounded)
    values = np.where(np.isfinite(warm.log_evidence), np.asarray(info.values), -np.inf)
    statuses = np.maximum(verdicts, info.statuses)
    best = _best(values, verdicts == Status.OK, statuses)
    is_interrupted = int(info.status) == Status.INTERRUPTED
    status = max(int(statuses[best]), int(Status.INTERRUPTED) if is_interrupted else 0)
    model, solution = jax.tree.map(lambda leaf: leaf[best][None], (models, warm))
    return VerifiedEstimate(
        model,
        solution,
        info._replace(
            log_density=info.values[best],
            log_likelihood=None if info.log_likelihood is None else info.values[best],
            values=jnp.asarray(values, info.values.dtype),
            statuses=jnp.asarray(statuses, jnp.int32),
            best=jnp.int32(best),
            status=jnp.int32(status),
        ),
    )


def _verdicts(fresh: SiteSolutions, warm: SiteSolutions, bounded: bool) -> np.ndarray:
    """A status for each end: that of its sites, or ``POOR_APPROXIMATION`` if a search from scratch contradicts them."""
    gap = np.abs(np.asarray(fresh.log_evidence - warm.log_evidence, float))
    disagree = np.isfinite(gap) & (gap > _tolerance(warm.log_evidence))
    statuses = warm.status if bounded else np.maximum(fresh.status, warm.status)
    return np.maximum(statuses, np.where(disagree, int(Status.POOR_APPROXIMATION), int(Status.OK)))


def _best(values: np.ndarray, verified: np.ndarray, statuses: np.ndarray) -> int:
    """The highest of the verified ends, or of all if none is; among ties one whose search converged."""
    eligible = verified if verified.any() else np.ones_like(verified)
    highest = np.max(values[eligible])
    tied = eligible & (values >= highest - _tolerance(highest))
    return int(min(np.flatnonzero(tied), key=lambda i: (statuses[i] != Status.OK, -values[i])))


def _tolerance(values: Any) -> Any:
    """Largest difference of equal evidences, relative to 1 + |value|: a multiple of the root of the machine epsilon."""
    size = np.abs(np.asarray(values, float))
    size = np.where(np.isfinite(size), size, 0)
    return _TOLERANCE * float(jnp.finfo(jnp.asarray(values).dtype).eps) ** 0.5 * (1 + size)


@contextlib.contextmanager
def held_warnings() -> Iterator[list]:
    """Hold back the warnings of a search, because the verification decides whether its best end is good.

    Yields:
        The list of held warnings, for ``release_warnings``; after an error they are released.
    """
    caught: list = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    except BaseException:
        release_warnings(caught)
        raise


def release_warnings(caught: list, status: Status | int | Array = Status.NON_FINITE) -> None:
    """Issue the held warnings, at the lines at which they arose.

    Args:
        caught: from ``held_warnings``.
        status: of the verified result; if it is ``OK``, warnings about convergence are dropped.
    """
    for held in caught:
        if int(status) != Status.OK or not issubclass(held.category, ConvergenceWarning):
            warnings.warn_explicit(held.message, held.category, held.filename, held.lineno)


def worsen_status(info: Any, status: Status | int | Array) -> Any:
    """The report with a status at least as bad as ``status``."""
    return info._replace(status=jnp.maximum(jnp.asarray(info.status), int(status)).astype(jnp.int32))
