"""The target: functions of an unconstrained position, bound to their data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from probinfer.core.binding import Bound, StochasticLogDensity
from probinfer.core.errors import NumericalError
from probinfer.core.status import Status
from probinfer.core.types import ArrayTree, LogDensityFn, PRNGKey, field, pytree
from probinfer.targets.starts import MAX_TRIES, draw_candidates, explain_failure, starting_positions

__all__ = ["Prior", "Target"]


class Prior(NamedTuple):
    """A normalized prior on unconstrained space.

    Attributes:
        sample: ``sample(key) -> position``.
        logdensity_fn: ``logdensity_fn(position) -> ()``, normalized, the log Jacobian included.
    """

    sample: Callable[[PRNGKey], ArrayTree]
    logdensity_fn: LogDensityFn


@pytree
class Target:
    """A posterior on unconstrained space. Positions are unconstrained, values are constrained.

    Attributes:
        logdensity_fn: unnormalized log density of the position, log Jacobian included; for minibatches a
            ``StochasticLogDensity`` of a key and the position.
        constrain_fn: position to values, deterministic sites included.
        unconstrain_fn: values to position.
        draw_fn: ``draw_fn(key, attempt) -> position``: a candidate for a starting point.
        terms_fn: position to a dictionary of the named summands of the log density, for messages.
        log_jacobian_fn: ``log |det d values / d position|``.
        prior: the normalized prior, or ``None`` where it is not known or improper.
        log_likelihood_fn: log likelihood of the position, or ``None`` where it is not known.
        start: a position to try first, as the first one that ``init`` returns; ``None``: all are drawn.
        names: one dotted name per leaf of the values that ``constrain`` returns.
    """

    logdensity_fn: Bound
    constrain_fn: Bound
    unconstrain_fn: Bound
    draw_fn: Bound
    terms_fn: Bound
    log_jacobian_fn: Bound
    prior: Prior | None = None
    log_likelihood_fn: Bound | None = None
    start: ArrayTree | None = None
    names: tuple[str, ...] = field(static=True, default=())

    def __repr__(self) -> str:
        """One line: what is inferred, and what is known of it."""
        names = ", ".join(self.names[:8]) + (
            f", ... ({len(self.names)} in all)" if len(self.names) > 8 else ""
        )
        known = ["estimated log density" if self.stochastic else "log density"]
        known += ["prior"] * (self.prior is not None) + ["likelihood"] * (self.log_likelihood_fn is not None)
        return f"Target({names}: {', '.join(known)})"

    @property
    def stochastic(self) -> bool:
        """Whether the log density is a minibatch estimate, which exact engines refuse."""
        return isinstance(self.logdensity_fn, StochasticLogDensity)

    def constrain(self, position: ArrayTree) -> ArrayTree:
        """Map one unconstrained position to the constrained values, deterministic sites included."""
        return self.constrain_fn(position)

    def unconstrain(self, values: ArrayTree) -> ArrayTree:
        """Map constrained values to the unconstrained position.

        Raises:
            TypeError: a value is not floating point.
            ValueError: the structure differs, or (outside jit) a value is outside its support; the leaf is named.
        """
        return self.unconstrain_fn(values)

    def candidates(self, key: PRNGKey, num: int) -> ArrayTree:
        """Draw starting positions without looking at the log density there: cheap, for engines that can fail.

        Args:
            key: a random key.
            num: how many positions.

        Returns:
            Unconstrained positions with leading axis ``num``, the first one ``start`` where there is one.

        Raises:
            ValueError: ``num`` is not positive.
        """
        if num < 1:
            raise ValueError(f"num must be at least 1, got {num}")
        return draw_candidates(key, self.draw_fn, self.start, num=num)

    def init(self, key: PRNGKey, num: int) -> ArrayTree:
        """Draw starting positions with a finite log density and gradient, each tried up to 100 times.

        Args:
            key: a random key.
            num: how many positions.

        Returns:
            Unconstrained positions with leading axis ``num``. Under jit nothing is raised, and a position that
            never became valid is returned as it was last drawn.

        Raises:
            ValueError: ``num`` is not positive.
            NumericalError: no valid position was found; the message names the sites (outside jit only).
        """
        if num < 1:
            raise ValueError(f"num must be at least 1, got {num}")
        positions, valid = starting_positions(key, self.logdensity_fn, self.draw_fn, self.start, num=num)
        if not isinstance(valid, jax.core.Tracer) and not valid.all():
            self._raise_no_start(key, positions, int(jnp.argmin(valid)), num)
        return positions

    def _raise_no_start(self, key: PRNGKey, positions: ArrayTree, index: int, num: int) -> None:
        last = jax.tree.map(lambda leaf: leaf[index], positions)
        what = explain_failure(key, self.logdensity_fn, self.terms_fn, last)
        raise NumericalError(
            f"no start with a finite log density and gradient in {MAX_TRIES} tries (start {index + 1} of {num}); not "
            f"finite at the last one: {what}. Check the data for NaN, priors that leave the domain of the likelihood, "
            "and the scale of the parameters, or give better starting values",
            Status.NON_FINITE,
        )
