"""Parameters that a log density wants positive and that nobody said are: a hint for runs that failed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.targets import transforms
from probinfer.targets.base import Target

__all__ = ["advice_on_constraints", "undefined_below"]

_TRIED = (0.5, 2.0)  # sizes of the entries, so that one odd value decides nothing


def undefined_below(target: Target) -> tuple[str, ...]:
    """Names of the parts of the position for which the log density is finite above zero and NaN below.

    A part with a constraint is defined everywhere, as positions are unconstrained.
    """
    if target.stochastic:
        return ()
    shapes = jax.eval_shape(lambda key: target.candidates(key, 1), jax.random.key(0))
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes)
    leaves, structure = jax.tree.flatten(one)
    names = transforms.leaf_names(one)

    def at(size: float, negative: int | None) -> float:
        values = [
            jnp.full(leaf.shape, -size if i == negative else size, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        return float(_evaluate(target.logdensity_fn, jax.tree.unflatten(structure, values)))

    if not all(np.isfinite(at(size, None)) for size in _TRIED):
        return ()
    return tuple(name for i, name in enumerate(names) if all(np.isnan(at(size, i)) for size in _TRIED))


@jax.jit
def _evaluate(fn: Any, position: Any) -> Any:
    return fn(position)


def advice_on_constraints(target: Any) -> str:
    """What to do about parameters that should have been constrained, in words; empty if there are none."""
    names = undefined_below(target) if isinstance(target, Target) else ()
    if not names:
        return ""
    shown = ", ".join(f"'{name}'" for name in names)
    given = ", ".join(f"'{name}': constraints.positive" for name in names)
    return (
        f"the log density is NaN where {shown} is negative: give constraints={{{given}}} to targets.from_logdensity "
        "(constraints of numpyro.distributions), and it is sampled on its logarithm"
    )
