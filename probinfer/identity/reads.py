"""What a function reads and writes outside itself, found in its bytecode.

Nothing is run. ``reads(code)`` walks the instructions of a function and of the functions written inside it and says
which global names it reads (with the attributes asked of them, since of a module only these matter), which names it
rebinds, and which objects it changes itself: a list it appends to, a dictionary it counts in, an attribute it sets.
What a function writes is its output, not its input.
"""

from __future__ import annotations

import dis
from functools import lru_cache
from types import CodeType
from typing import NamedTuple

__all__ = ["Reads", "reads"]

_MUTATORS = frozenset(
    (
        *("add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft"),
        *("remove", "setdefault", "sort", "update"),
    )
)
_LOADS = frozenset(
    ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FAST", "LOAD_FAST_CHECK")
)
_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})


class Reads(NamedTuple):
    """The outside names of a function.

    Attributes:
        names: global names, each with the chains of attributes that are asked of it.
        imports: modules imported inside the function, each with the names taken from it.
        rebound: global names and names of an enclosing function that it assigns.
        changed: names whose object it changes in place (an item stored, a method such as ``append`` called).
        assigned: names of the attributes that it sets, on whatever object.
        filled: names of the attributes whose object it changes in place.
    """

    names: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]
    imports: tuple[tuple[str, tuple[str, ...]], ...]
    rebound: frozenset[str]
    changed: frozenset[str]
    assigned: frozenset[str]
    filled: frozenset[str]


@lru_cache(maxsize=4096)
def reads(code: CodeType) -> Reads:
    """Read one function and everything defined inside it."""
    names: dict[str, set] = {}
    imports: dict[str, set] = {}
    written: dict[str, set] = {kind: set() for kind in ("rebound", "changed", "assigned", "filled")}
    ops = [op for op in dis.get_instructions(code) if op.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    for at, op in enumerate(ops):
        if op.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.setdefault(op.argval, set()).add(_chain(ops, at))
        elif op.opname == "IMPORT_NAME":
            imports.setdefault(op.argval, set()).update(_imported(ops, at))
        _note_write(written, code, ops, at)
    for inner in (constant for constant in code.co_consts if isinstance(constant, CodeType)):
        found = reads(inner)
        for name, chains in found.names:
            names.setdefault(name, set()).update(chains)
        for name, taken in found.imports:
            imports.setdefault(name, set()).update(taken)
        for kind, collected in written.items():  # what belongs to this function is no one else's
            collected |= getattr(found, kind) - set(code.co_cellvars)
    return Reads(_sorted(names), _sorted(imports), **{kind: frozenset(w) for kind, w in written.items()})


def _note_write(written: dict[str, set], code: CodeType, ops: list, at: int) -> None:
    op = ops[at]
    outer = op.opname == "STORE_DEREF" and op.argval in code.co_freevars
    if outer or op.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
        written["rebound"].add(op.argval)
    elif op.opname in ("STORE_ATTR", "DELETE_ATTR"):
        written["assigned"].add(op.argval)
    elif op.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
        start = _container(ops, at)
        if start is not None:
            _note_change(written, ops[start].argval, _chain(ops, start))
    elif op.opname in _LOADS:
        chain = _chain(ops, at)
        if chain and chain[-1] in _MUTATORS:
            _note_change(written, op.argval, chain[:-1])


def _note_change(written: dict[str, set], name: str, chain: tuple[str, ...]) -> None:
    """An object changed in place: that of a name, or that of the last attribute asked of it."""
    if chain:
        written["filled"].add(chain[-1])
    else:
        written["changed"].add(name)


def _sorted(found: dict[str, set]) -> tuple:
    return tuple((name, tuple(sorted(found[name]))) for name in sorted(found))


def _chain(ops: list, at: int) -> tuple[str, ...]:
    """The attributes asked one after the other of what instruction ``at`` loads."""
    chain = []
    for op in ops[at + 1 :]:
        if op.opname not in _ATTRIBUTES:
            break
        chain.append(op.argval)
    return tuple(chain)


def _imported(ops: list, at: int) -> list[str]:
    names = []
    for op in ops[at + 1 :]:
        if op.opname == "IMPORT_FROM":
            names.append(op.argval)
        elif not op.opname.startswith("STORE") and op.opname != "POP_TOP":
            break
    return names


def _container(ops: list, at: int) -> int | None:
    """Where the object of which ``at`` stores an item is loaded; ``None`` where it is not a plain name.

    ``x[k] = v`` loads x, then k; ``x[k] += v`` loads them before the two COPY of the item that it reads first.
    """
    start = at
    if ops[at - 1].opname == "SWAP" and ops[at - 2].opname == "SWAP":
        copies = (i for i in range(at - 1, 1, -1) if ops[i].opname == ops[i - 1].opname == "COPY")
        start = next(copies, at + 1) - 1
    wanted = 0
    for index in range(start - 1, -1, -1):
        op = ops[index]
        wanted += dis.stack_effect(op.opcode, op.arg if op.opcode >= dis.HAVE_ARGUMENT else None, jump=False)
        if wanted == 2:
            return index if op.opname in _LOADS else None
    return None
