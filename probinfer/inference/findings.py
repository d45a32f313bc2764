"""What an engine found wrong with its run: a status, a clause, and advice in its own settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from probinfer.core.errors import advice
from probinfer.core.status import Status

__all__ = ["Finding", "combined", "undefined"]

_UNDEFINED_SHARE = 0.01


class Finding(NamedTuple):
    """A status, what was found, and what to do; without advice that of the status."""

    status: Status
    details: str
    advised: str = ""


def combined(findings: Iterable[Finding | None]) -> Finding:
    """Return the worst status, all clauses, and the advice for each; OK and empty texts of nothing.

    Args:
        findings: in the order in which they are said; None: nothing was found.
    """
    found = [finding for finding in findings if finding is not None]
    if not found:
        return Finding(Status.OK, "")
    advised = dict.fromkeys(finding.advised or advice(finding.status) for finding in found)
    return Finding(
        max(finding.status for finding in found),
        ", ".join(finding.details for finding in found),
        "; ".join(advised),
    )


def undefined(count: Any, total: Any, what: str) -> Finding | None:
    """Judge how many values were not a number and were counted as impossible.

    Args:
        count: of them.
        total: of all.
        what: they are, for example "draws of the prior".
    """
    if not int(count) or int(count) < _UNDEFINED_SHARE * float(total):
        return None
    return Finding(
        Status.NON_FINITE,
        f"{int(count)} of {int(total)} {what} have an undefined (NaN) log likelihood and count as impossible, in the "
        "evidence too",
        "find where the likelihood is NaN (an overflow, a logarithm of a negative number), or leave that region out of "
        "the prior",
    )
