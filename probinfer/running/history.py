"""The history of a run: its records, the number of steps taken, and why it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import field, pytree
from probinfer.running.interrupts import Interrupted

__all__ = ["History"]


@pytree
class History:
    """The records of a run and its outcome.

    ``history.records`` is what ``collect(state, info)`` returned after every ``thin``-th step, stacked: leaves have a
    leading axis of length ``num_steps // thin`` of the call. A history unpacks into its records, so that with the
    default ``collect`` one writes ``states, infos = history``.

    A run that stopped early has fewer records than its buffers have rows: ``num_records`` counts the records, later
    rows are NaN (zero if the dtype has no NaN), and ``filled()`` drops those rows.

    Attributes:
        records: the stacked records.
        num_steps: steps taken that left a finite state, an integer array ().
        status: a ``Status``, an integer array (): ``OK``; ``NON_FINITE``; ``MAX_ITERATIONS`` if a stopping rule was
            given and not met; ``INTERRUPTED`` after Ctrl-C.
        bad_leaf: index into ``leaf_names`` of the leaf that became non-finite, -1 if none did.
        leaf_names: names of the leaves of the state.
        thin: steps per record.
    """

    records: Any
    num_steps: Any
    status: Any
    bad_leaf: Any
    leaf_names: tuple[str, ...] = field(static=True)
    thin: int = field(static=True)

    @property
    def num_records(self) -> Any:
        """Number of records that were made, an integer array ()."""
        return self.num_steps // self.thin

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the run (outside jit)."""
        return int(self.status) == Status.INTERRUPTED

    def __iter__(self) -> Iterator[Any]:
        """Unpack into the records: ``states, infos = history`` with the default ``collect``."""
        return iter(self.records)

    def filled(self) -> Any:
        """Return the records without the empty rows of an early stop (outside jit, as the length is a value)."""
        count = int(self.num_records)
        return jax.tree.map(lambda leaf: leaf[:count], self.records)

    def message(self) -> str:
        """Describe how the run ended (outside jit)."""
        status = Status(int(self.status))
        if status is Status.NON_FINITE:
            name = self.leaf_names[int(self.bad_leaf)]
            return (
                f"step {int(self.num_steps)} made {name} non-finite; the state before it was kept, with "
                f"{int(self.num_records)} records; {advice(status)}"
            )
        return f"{int(self.num_steps)} steps, {int(self.num_records)} records: {advice(status)}"

    def check(self) -> None:
        """Raise an error if the run was not completed (outside jit; for facades that cannot use a part of it).

        Raises:
            NumericalError: the status is ``NON_FINITE``; the message says which step and which part of the state.
            Interrupted: the status is ``INTERRUPTED``; a ``KeyboardInterrupt``.
        """
        if self.interrupted:
            raise Interrupted(self.message())
        if int(self.status) == Status.NON_FINITE:
            raise NumericalError(self.message(), Status.NON_FINITE)
