"""Schemes by name, and schemes that resample when a trigger fires."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.algorithms import as_partial
from probinfer.core.binding import frozen
from probinfer.core.types import Array, field, pytree
from probinfer.resampling.base import ConditionalScheme, Scheme, check
from probinfer.resampling.pairwise import ssp
from probinfer.resampling.points import multinomial, residual, stratified, systematic
from probinfer.resampling.reference import (
    conditional_multinomial,
    conditional_ssp,
    conditional_stratified,
    conditional_systematic,
)
from probinfer.resampling.survival import conditional_killing, killing
from probinfer.resampling.thinning import optimal
from probinfer.resampling.triggers import ess_below

__all__ = ["CONDITIONAL", "SCHEMES", "Adaptive", "adaptive", "conditional", "get"]

SCHEMES: dict[str, Scheme] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
    "killing": killing,
    "ssp": ssp,
    "optimal": optimal,
}

CONDITIONAL: dict[str, ConditionalScheme] = {
    "multinomial": conditional_multinomial,
    "stratified": conditional_stratified,
    "systematic": conditional_systematic,
    "killing": conditional_killing,
    "ssp": conditional_ssp,
}


def get(scheme: Any) -> Scheme:
    """Return the scheme with a name; a function is returned unchanged.

    Args:
        scheme: a name in ``SCHEMES``, or a function ``(key, log_weights, num) -> (ancestors, log_weights)``.

    Raises:
        ValueError: no scheme has that name.
        TypeError: neither a name nor a function.
    """
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            raise ValueError(f"no resampling scheme is called {scheme!r}; choose from {', '.join(SCHEMES)}")
        return SCHEMES[scheme]
    if not callable(scheme):
        raise TypeError(f"expected the name of a scheme or a function, got {type(scheme).__name__}")
    return scheme


def conditional(scheme: Any) -> ConditionalScheme:
    """Return the conditional form of a scheme, in which slot 0 descends from draw 0.

    Args:
        scheme: a name in ``CONDITIONAL``, or a scheme with such a name; a conditional scheme is returned unchanged.

    Raises:
        ValueError: the scheme has no conditional form.
        TypeError: neither a name nor a function.
    """
    resolved = get(scheme)
    if resolved in CONDITIONAL.values():
        return resolved
    for name, conditional_scheme in CONDITIONAL.items():
        if SCHEMES[name] is resolved:
            return conditional_scheme
    raise ValueError(
        f"no conditional form of {scheme!r} is known: the distribution of the other ancestors given the reference, "
        f"which particle Gibbs needs to leave its target invariant. Choose from {', '.join(CONDITIONAL)}"
    )


@pytree
class Adaptive:
    """A scheme that resamples only when its trigger fires.

    Attributes:
        scheme: a name or a function; static.
        trigger: ``(log_weights, t) -> bool``, a pytree.
    """

    scheme: str | Scheme = field(static=True)
    trigger: Callable[[Array, Any], Array]

    def __call__(self, key: Array, log_weights: Array, num: int, t: Any) -> tuple[Array, Array, Array]:
        """Resample if the trigger fires, otherwise leave the weighted sample unchanged.

        Args:
            key: random key.
            log_weights: unnormalized log weights (n,).
            num: number of draws to choose: n.
            t: index of the step, for the trigger.

        Returns:
            The ancestors (n,), the log weights (n,), and whether the trigger fired. Otherwise the ancestors are
            0 ... n - 1 and the log weights are unchanged.

        Raises:
            TypeError: the log weights are not floating point.
            ValueError: they are not a vector, there are none, or ``num`` is not their number.
        """
        check(log_weights, num)
        if num != log_weights.shape[0]:
            raise ValueError(
                f"without resampling every draw keeps its slot: num must be {log_weights.shape[0]}, got num={num}; "
                "call the scheme itself to change the number"
            )
        fires = jnp.asarray(self.trigger(log_weights, t), bool)
        scheme = get(self.scheme)
        zero = _varying_zero(key, log_weights)

        def resampled() -> tuple[Array, Array]:
            ancestors, new_log_weights = scheme(key, log_weights, num)
            return ancestors + zero, new_log_weights + zero.astype(new_log_weights.dtype)

        def unchanged() -> tuple[Array, Array]:
            return jnp.arange(num, dtype=jnp.int32) + zero, log_weights + zero.astype(log_weights.dtype)

        return *jax.lax.cond(fires, resampled, unchanged), fires

    def conditional(self) -> Adaptive:
        """Return the adaptive scheme with the conditional form of its scheme.

        Raises:
            ValueError: the scheme has no conditional form.
        """
        return adaptive(conditional(self.scheme), self.trigger)


def _varying_zero(key: Array, log_weights: Array) -> Array:
    """Return a zero that varies over the axes of a ``shard_map`` as key and weights do.

    Both branches of the ``cond`` add it, since their outputs must vary over the same axes.
    """
    empty = jnp.ravel(jax.random.key_data(key))[:0].astype(jnp.int32), log_weights[:0].astype(jnp.int32)
    return jnp.sum(empty[0], dtype=jnp.int32) + jnp.sum(empty[1], dtype=jnp.int32)


def adaptive(scheme: Any = "systematic", trigger: Any = None) -> Adaptive:
    """Return a scheme that resamples only when a trigger fires.

    Args:
        scheme: a name in ``SCHEMES`` or a function.
        trigger: one of ``ess_below``, ``entropic_below``, ``always``, ``every``, or any pytree
            ``(log_weights, t) -> bool``; None: an effective sample size below n / 2.

    Raises:
        ValueError: no scheme has that name.
        TypeError: ``scheme`` is neither a name nor a function, or the trigger is not callable.
    """
    get(scheme)
    scheme = scheme if isinstance(scheme, str) else frozen(scheme)
    trigger = ess_below() if trigger is None else trigger
    if not callable(trigger):
        raise TypeError(
            f"a trigger is a function (log_weights, t) -> bool such as ess_below(0.5), got {type(trigger).__name__}"
        )
    trigger = as_partial(trigger) if jax.tree_util.all_leaves([trigger]) else trigger
    return Adaptive(scheme=scheme, trigger=trigger)
