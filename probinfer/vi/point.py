"""The posterior mode, by L-BFGS from several starts.

A mode depends on the coordinates: the density of ``exp(z)`` and that of ``z`` differ by the Jacobian and so do their
modes. By default the density of the constrained parameters is maximized, as is usual for MAP; with ``jacobian=True``
that of the unconstrained position.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from probinfer.core.algorithms import as_partial
from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.trees import map_or_vmap
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, PRNGKey, Scalar, field, pytree
from probinfer.inference import engine, tails
from probinfer.inference.posterior import Posterior
from probinfer.numerics import optimization
from probinfer.running import interrupts
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.targets import Target

__all__ = ["MAP", "MAPInfo", "maximize", "point_posterior"]

# Differences below this many roots of the machine epsilon do not matter: 1.5e-7 nats in float64, 3e-3 in float32.
_VALUE_TOLERANCE = 10.0
_POSITION_TOLERANCE = 0.01  # absolute, or relative to the largest coordinate


class MAPInfo(NamedTuple):
    """Report of a mode search.

    Attributes:
        log_density: at the mode, in the chosen coordinates.
        values: log density at the end of every restart; minus infinity if it failed.
        statuses: of the restarts.
        num_evaluations: of the restarts.
        best: index of the restart that is returned.
        covariance: of Laplace's approximation, minus the inverse Hessian with respect to the flattened unconstrained
            position, NaN if the Hessian is not negative definite; None unless asked for.
        status: of the best restart; ``IMPROPER_DENSITY`` if another restart ended elsewhere at the same value and the
            density does not fall between them and beyond; ``INTERRUPTED`` if Ctrl-C ended the search.
        log_likelihood: at the mode, if the engine maximized nothing else (``gp.ML2``); else None.
        ends: flattened unconstrained ends of the restarts.
        positions: the same, leaves (restart, ...).
    """

    log_density: Float[Array, ""]
    values: Float[Array, " restart"]
    statuses: Int[Array, " restart"]
    num_evaluations: Int[Array, " restart"]
    best: Int[Array, ""]
    covariance: Float[Array, "d d"] | None
    status: Int[Array, ""] | Status
    log_likelihood: Float[Array, ""] | None = None
    ends: Float[Array, "restart d"] | None = None
    positions: ArrayTree = None


@pytree
class MAP:
    """The posterior mode as an engine: a posterior with a single draw.

    Args:
        num_restarts: number of starting points; the best end is returned.
        jacobian: maximize the density of the unconstrained position instead of that of the constrained values. It has
            an interior mode unless the posterior concentrates at a boundary.
        covariance: also compute Laplace's covariance (d gradients of the gradient).
        max_steps: maximum number of L-BFGS steps of a restart.
        mode: restarts one after another (``"map"``), vectorized (``"vmap"``), or as suits the device (``"auto"``).
    """

    num_restarts: int = field(static=True, default=4)
    jacobian: bool = field(static=True, default=False)
    covariance: bool = field(static=True, default=False)
    max_steps: int = field(static=True, default=1000)
    mode: str = field(static=True, default="auto")

    def __post_init__(self):
        """Check the settings."""
        if self.num_restarts < 1 or self.max_steps < 1:
            raise ValueError(
                f"expected num_restarts >= 1 and max_steps >= 1, got {self.num_restarts} and {self.max_steps}"
            )

    def objective(self, target: Target) -> Callable:
        """Return the function to maximize, a ``Partial`` of the unconstrained position.

        Args:
            target: an exact target.
        """
        jacobian = None if self.jacobian else as_partial(target.log_jacobian_fn)
        return jax.tree_util.Partial(_objective, as_partial(target.logdensity_fn), jacobian)

    def sample(
        self,
        key: PRNGKey,
        target: Target,
        *,
        progress: bool | str | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Find the mode of an exact target; ``checkpoint`` is not used, as the search is short.

        Returns:
            A posterior with one chain of one draw; its ``info`` is a :class:`MAPInfo`.

        Raises:
            TypeError: a minibatch target.
            NumericalError: no restart ended at a finite log density.
            Interrupted: Ctrl-C before any restart reached a finite log density; a ``KeyboardInterrupt``.

        Warns:
            ConvergenceWarning: the best restart did not converge, the mode is not unique and the density improper, or
                Ctrl-C ended the search.
        """
        engine.check_target(key, target, "MAP")
        fn = self.objective(target)
        posterior, position = point_posterior("MAP", key, target, fn, self, progress)
        info = posterior.info
        # A normalized prior rules out an improper density; a search that converged to one maximum does not suggest one
        converged = info.status in (Status.OK, Status.INTERRUPTED)
        if target.prior is None and (not converged or _has_another_maximum(info)):
            status, reason = tails.doubted(Status.MAX_ITERATIONS, fn, _rows_to_trees(position, info.ends))
            if reason:
                engine.warn(status, f"the mode is not unique: {reason}", "MAP")
                posterior = dataclasses.replace(posterior, info=info._replace(status=status))
        if self.covariance:
            info = posterior.info._replace(covariance=laplace_covariance(fn, position))
            posterior = dataclasses.replace(posterior, info=info)
        return posterior


def point_posterior(
    name: str, key: PRNGKey, target: Target, fn: Callable, settings: Any, progress: bool | str | None
) -> tuple[Posterior, ArrayTree]:
    """Maximize a function of the unconstrained position and return the best point as a posterior.

    Args:
        name: of the engine, for messages.
        key: random key, for the starting points.
        target: the target, already checked.
        fn: the function to maximize, a ``Partial``.
        settings: anything with ``num_restarts``, ``max_steps`` and ``mode``.
        progress: whether to show a line; ``None``: if on a terminal.

    Returns:
        A posterior with one chain of one draw, and the unconstrained position.

    Raises:
        NumericalError: no restart ended at a finite value.
        Interrupted: Ctrl-C before any restart reached a finite value.
    """
    with bars.task(name, None, progress):
        # Compiling a check of the starts costs more than a failed restart: check only if all of them failed.
        ascend = functools.partial(maximize, fn, max_steps=settings.max_steps, mode=settings.mode)
        position, info = ascend(target.candidates(key, settings.num_restarts))
        if int(info.status) == Status.INTERRUPTED and not np.isfinite(info.log_density):
            raise interrupts.Interrupted(f"{name}: no restart had reached a finite log density")
        if int(info.status) == Status.NON_FINITE:
            position, info = ascend(target.init(key, settings.num_restarts))
        if int(info.status) == Status.NON_FINITE:
            raise NumericalError(
                f"{name}: no restart ended at a finite log density; {advice(Status.NON_FINITE)}",
                Status.NON_FINITE,
            )
    if int(info.status) == Status.INTERRUPTED:
        num_ended = int(np.sum(np.asarray(info.statuses) != Status.INTERRUPTED))
        description = f"{num_ended} of {settings.num_restarts} restarts had ended"
    else:
        description = f"the best of {settings.num_restarts} restarts did not converge"
    engine.warn(info.status, description, name)
    draws = jax.tree.map(lambda x: x[None, None], position)
    return engine.finish(target, draws, position, info), position


def _has_another_maximum(info: MAPInfo) -> bool:
    """Return whether a restart ended at the value of the best one, but at another position."""
    values, ends = np.asarray(info.values), np.asarray(info.ends)
    best = int(info.best)
    equal = values >= values[best] - _VALUE_TOLERANCE * float(np.finfo(ends.dtype).eps) ** 0.5
    tolerance = _POSITION_TOLERANCE * (1 + np.max(np.abs(ends[best])))
    distant = np.max(np.abs(ends - ends[best]), axis=1) > tolerance
    return bool(np.any(equal & distant))


def _rows_to_trees(position: ArrayTree, rows: Array) -> ArrayTree:
    return jax.vmap(ravel_pytree(position)[1])(rows)


def _objective(logdensity_fn: Callable, jacobian_fn: Callable | None, position: ArrayTree) -> Scalar:
    """Return log p(values) = log p(position) - log |det d values / d position|."""
    value = logdensity_fn(position)
    return value if jacobian_fn is None else value - jacobian_fn(position)


def maximize(
    fn: Callable, starts: ArrayTree, *, max_steps: int = 1000, mode: str = "auto"
) -> tuple[ArrayTree, MAPInfo]:
    """Maximize a function from several starts and return the best maximum.

    Args:
        fn: differentiable scalar function of one position.
        starts: positions with a leading axis.
        max_steps: maximum number of L-BFGS steps per start.
        mode: ``"auto"``, ``"map"`` or ``"vmap"`` over the starts.

    Returns:
        The position and the report. Non-finite values raise no error; the status reports them. After Ctrl-C it is the
        best position so far.
    """
    fn, step_limit = as_partial(fn), jnp.asarray(max_steps, jnp.int32)
    # Zeros in place of the initial states, which ``_ascend`` makes inside jit: nothing else is compiled
    shapes = jax.eval_shape(_init_searches, starts)
    searches = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    pace, num_done = interrupts.Pace(4), 0
    with interrupts.deferred() as stop:
        while True:
            with pace.measured(pace.size):
                piece = _ascend(
                    fn, starts, searches, np.int32(num_done), np.int32(pace.size), step_limit, mode
                )
                searches, unfinished, position, info = interrupts.wait(piece)
            num_done += pace.size
            if stop.requested:
                return position, _interrupted(info, np.asarray(unfinished))
            if not np.any(unfinished):
                return position, info


def _interrupted(info: MAPInfo, unfinished: np.ndarray) -> MAPInfo:
    """Return the report of a search that Ctrl-C ended; finished restarts keep their status."""
    statuses = jnp.where(unfinished, jnp.int32(Status.INTERRUPTED), info.statuses)
    return info._replace(statuses=statuses, status=jnp.maximum(info.status, jnp.int32(Status.INTERRUPTED)))


def _init_searches(starts: ArrayTree) -> optimization.LBFGSState:
    # One vector instead of a tree: a third of the operations to compile.
    vectors = jax.vmap(lambda start: ravel_pytree(start)[0])(starts)
    return jax.vmap(optimization.start_search)(vectors)


@functools.partial(jax.jit, static_argnames="mode")
def _ascend(
    fn: Callable,
    starts: ArrayTree,
    searches: optimization.LBFGSState,
    num_done: Int[Array, ""],
    num_evaluations: Int[Array, ""],
    max_steps: Int[Array, ""],
    mode: str,
) -> tuple[optimization.LBFGSState, Bool[Array, " restart"], ArrayTree, MAPInfo]:
    """Continue all searches for some evaluations each, or start them if none are done.

    Returns the searches, which of them are unfinished, and position and report of the best.
    """
    # Continue
    _, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], starts))
    loss = jax.tree_util.Partial(lambda fn, vector: -fn(unravel(vector)), fn)
    searches = jax.tree.map(functools.partial(jnp.where, num_done == 0), _init_searches(starts), searches)
    tolerance = _VALUE_TOLERANCE * float(jnp.finfo(searches.position.dtype).eps) ** 0.5
    descend = functools.partial(
        optimization.continue_search,
        loss,
        max_steps=max_steps,
        num_evaluations=num_done + num_evaluations,
        decrease=tolerance,
    )
    searches, unfinished = map_or_vmap(descend, mode, searches)
    # Report
    results = jax.vmap(optimization.search_result)(searches)
    values = jnp.where(jnp.isfinite(results.value), -results.value, -jnp.inf)
    best = _best_restart(values, results.status, tolerance)
    info = MAPInfo(
        log_density=values[best],
        values=values,
        statuses=results.status,
        num_evaluations=results.num_evaluations,
        best=best.astype(jnp.int32),
        covariance=None,
        status=results.status[best],
        ends=results.position,
        positions=jax.vmap(unravel)(results.position),
    )
    return searches, unfinished, unravel(results.position[best]), info


def _best_restart(values: Array, statuses: Array, tolerance: float) -> Int[Array, ""]:
    """Return the index of the highest value; among values within the tolerance, prefer a search that converged."""
    highest = jnp.max(values)
    tied = values >= highest - tolerance * (1 + jnp.abs(highest))
    converged = tied & (statuses == Status.OK)
    return jnp.argmax(jnp.where(jnp.where(converged.any(), converged, tied), values, -jnp.inf))


@jax.jit
def laplace_covariance(fn: Callable, position: ArrayTree) -> Float[Array, "d d"]:
    """Return minus the inverse Hessian at a maximum; NaN if the Hessian is not negative definite.

    Args:
        fn: a ``Partial``, twice differentiable.
        position: the maximum.
    """
    flat, unravel = ravel_pytree(position)
    gradient = jax.grad(lambda x: -fn(unravel(x)))
    rows = jax.lax.map(lambda v: jax.jvp(gradient, (flat,), (v,))[1], jnp.eye(flat.size, dtype=flat.dtype))
    chol = jnp.linalg.cholesky((rows + rows.T) / 2)
    return jax.scipy.linalg.cho_solve((chol, True), jnp.eye(flat.size, dtype=flat.dtype))
