"""What a run leaves behind: its records, how far it came, and why it stopped."""

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

    A run that stopped early has fewer records than room for them: ``num_records`` counts them, rows from there on are
    NaN (zero where the dtype has none), and ``filled()`` drops those rows.

    Attributes:
        records: the stacked records.
        num_steps: steps taken that left a finite state, an integer array ().
        status: a ``Status``, an integer array (): ``OK``; ``NON_FINITE``; ``MAX_ITERATIONS`` where a stopping rule was
            given and not met; ``INTERRUPTED`` by Ctrl-C.
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
        """Rows of ``records`` that were filled, an integer array ()."""
        return self.num_steps // self.thin

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the run (outside jit)."""
        return int(self.status) == Status.INTERRUPTED

    def __iter__(self) -> Iterator[Any]:
        """Unpack into the records: ``states, infos = history`` with the default ``collect``."""
        return iter(self.records)

    def filled(self) -> Any:
        """The records without the rows that an early stop left empty (outside jit: the length is a value)."""
        count = int(self.num_records)
        return jax.tree.map(lambda leaf: leaf[:count], self.records)

    def message(self) -> str:
        """Say in words how the run ended (outside jit)."""
        status = Status(int(self.status))
        if status is Status.NON_FINITE:
            name = self.leaf_names[int(self.bad_leaf)]
            return (
                f"step {int(self.num_steps)} made {name} non-finite; the state before it was kept, with "
                f"{int(self.num_records)} records; {advice(status)}"
            )
        return f"{int(self.num_steps)} steps, {int(self.num_records)} records: {advice(status)}"

    def check(self) -> None:
        """Raise if the run did not come to its end (outside jit; for facades that have no use for a part of it).

        Raises:
            NumericalError: the status is ``NON_FINITE``; the message says which step and which part of the state.
            Interrupted: the status is ``INTERRUPTED``; a ``KeyboardInterrupt``.
        """
        if self.interrupted:
            raise Interrupted(self.message())
        if int(self.status) == Status.NON_FINITE:
            raise NumericalError(self.message(), Status.NON_FINITE)
