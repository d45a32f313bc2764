"""Tokens that may follow a prefix, from a table: a finite automaton over tokens, inside JAX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from probinfer.core.types import Array, Bool, Int, pytree
from probinfer.lm.models.base import Context

__all__ = ["Allowed", "allowed"]


@pytree
class Allowed:
    """A constraint that is a finite automaton over tokens, inside JAX.

    Attributes:
        table: (S, V) bool, which tokens may follow in a state; the end token belongs to V.
        transitions: (S, V) int32, the state after a token.
    """

    table: Any
    transitions: Any

    def init(self, context: Context, num: int) -> Int[Array, " n"]:
        """Return state zero for each particle."""
        return jnp.zeros(num, jnp.int32)

    def mask(
        self, state: Int[Array, " n"], tokens: Int[Array, "n t"], length: Int[Array, " n"]
    ) -> Bool[Array, "n v"]:
        """Return the rows of the table for these states."""
        return self.table[state]

    def advance(
        self, state: Int[Array, " n"], tokens: Int[Array, " n"], active: Bool[Array, " n"]
    ) -> Int[Array, " n"]:
        """Follow one token in the active rows."""
        return jnp.where(active, self.transitions[state, tokens], state)

    def gather(self, state: Int[Array, " n"], ancestors: Int[Array, " m"]) -> Int[Array, " m"]:
        """Fork the states."""
        return state[ancestors]


def allowed(table: Any, transitions: Any = None) -> Allowed:
    """Make a constraint from a table: state s allows token v if ``table[s, v]``, and goes to ``transitions[s, v]``.

    Args:
        table: (S, V), or (V,) for one state.
        transitions: (S, V) integers; None: no token changes the state.

    Raises:
        TypeError: the table is not boolean, or transitions are not integers.
        ValueError: shapes differ, or a state is out of range.
    """
    table = np.asarray(table)
    table = table[None] if table.ndim == 1 else table
    if table.dtype != bool:
        raise TypeError(
            f"a table of allowed tokens must be boolean, got {table.dtype}; write table > 0 for numbers"
        )
    if table.ndim != 2 or not table.size:
        raise ValueError(f"a table of allowed tokens must be (states, vocabulary), got shape {table.shape}")
    identity = np.broadcast_to(np.arange(len(table))[:, None], table.shape)
    transitions = identity if transitions is None else np.asarray(transitions)
    if not np.issubdtype(transitions.dtype, np.integer):
        raise TypeError(f"transitions must be integers, got {transitions.dtype}")
    if transitions.shape != table.shape:
        raise ValueError(
            f"transitions must have the shape {table.shape} of the table, got {transitions.shape}"
        )
    if transitions.min() < 0 or transitions.max() >= len(table):
        raise ValueError(
            f"states must be 0 ... {len(table) - 1}, got {transitions.min()} ... {transitions.max()}"
        )
    return Allowed(jnp.asarray(table), jnp.asarray(transitions, jnp.int32))
