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
        assigned: pairs of a name and an attribute that it sets on the object of that name.
        filled: pairs of a name and an attribute whose object it changes in place.
    """

    names: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]
    imports: tuple[tuple[str, tuple[str, ...]], ...]
    rebound: frozenset[str]
    changed: frozenset[str]
    assigned: frozenset[tuple[str, str]]
    filled: frozenset[tuple[str, str]]


@lru_cache(maxsize=4096)
def reads(code: CodeType) -> Reads:
    """Read one function and everything defined inside it."""
    names: dict[str, set] = {}
    imports: dict[str, set] = {}
    written: dict[str, set] = {kind: set() for kind in ("rebound", "changed", "assigned", "filled")}
    ops = [op for op in dis.get_instructions(code) if op.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    for at, op in enumerate(ops):
        if op.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
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
        own = {*code.co_cellvars, *inner.co_varnames}  # what belongs to a function is no one else's
        for kind, collected in written.items():
            collected |= {w for w in getattr(found, kind) if (w if isinstance(w, str) else w[0]) not in own}
    return Reads(_sorted(names), _sorted(imports), **{kind: frozenset(w) for kind, w in written.items()})


def _note_write(written: dict[str, set], code: CodeType, ops: list, at: int) -> None:
    op = ops[at]
    outer = op.opname == "STORE_DEREF" and op.argval in code.co_freevars
    start: int | None = at
    chain: tuple[str, ...]
    if outer or op.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
        written["rebound"].add(op.argval)
        return
    if op.opname in ("STORE_ATTR", "DELETE_ATTR"):
        start, chain = _base(ops, at, 1), (op.argval,)
    elif op.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
        start = _base(ops, at, 2)
        chain = () if start is None else _chain(ops, start)
    elif op.opname in _LOADS and set(_chain(ops, at)[-1:]) & _MUTATORS:
        chain = _chain(ops, at)[:-1]
    else:
        return
    if start is None or len(chain) > 1 or not _is_outside(code, ops[start]):
        return
    name = ops[start].argval
    if op.opname in ("STORE_ATTR", "DELETE_ATTR"):
        written["assigned"].add((name, op.argval))
    elif chain:
        written["filled"].add((name, chain[0]))
    else:
        written["changed"].add(name)


def _is_outside(code: CodeType, op: dis.Instruction) -> bool:
    """Whether a name is that of a global, of an enclosing function, or of the object behind a method."""
    if op.opname.startswith("LOAD_FAST"):
        return op.argval == "".join(code.co_varnames[:1])
    return op.argval not in code.co_cellvars


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


def _base(ops: list, at: int, depth: int) -> int | None:
    """Where the object is loaded to which ``at`` stores; ``None`` where it is not a plain name.

    ``x.a = v`` loads x last (depth 1), ``x[k] = v`` x and then k (depth 2). ``x.a += v`` and ``x[k] += v`` load them
    before the COPY of what is read first, and SWAP them to the top in the end.
    """
    start = at
    if ops[at - 1].opname == "SWAP" and all(op.opname == "SWAP" for op in ops[at - depth : at]):
        copies = (
            i
            for i in range(at - 1, depth - 1, -1)
            if all(op.opname == "COPY" for op in ops[i - depth + 1 : i + 1])
        )
        start = next(copies, at + depth) - depth + 1
    found = 0
    for index in range(start - 1, -1, -1):
        op = ops[index]
        found += dis.stack_effect(op.opcode, op.arg if op.opcode >= dis.HAVE_ARGUMENT else None, jump=False)
        if found == depth:
            return index if op.opname in _LOADS else None
    return None
