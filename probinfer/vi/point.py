"""The posterior mode, by L-BFGS from several starts.

A mode depends on the coordinates: the density of ``exp(z)`` and that of ``z`` differ by the Jacobian and so do their
modes. By default the density of the constrained parameters is maximised, the one people mean by MAP; with
``jacobian=True`` that of the unconstrained position.
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
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, PRNGKey, Scalar, field, pytree
from probinfer.inference import engine, tails
from probinfer.inference.posterior import Posterior
from probinfer.numerics import optimization
from probinfer.running import interrupts
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.targets import Target

__all__ = ["MAP", "MAPInfo", "maximize", "point_posterior"]

# A gain of so many roots of the machine epsilon does not matter: 1.5e-7 nats in float64, 3e-3 in float32.
_NATS = 10.0
_APART = 0.01  # of a unit, or of the position


class MAPInfo(NamedTuple):
    """Report of a mode search.

    ``log_density`` is that of the mode in the chosen coordinates, ``log_likelihood`` that of the mode where the engine
    maximised nothing else (``gp.ML2``), else None; ``values``, ``statuses`` and ``num_evaluations``
    have one entry a restart (the value of a failed one is minus infinity), ``best`` is the index of the one kept,
    ``positions`` has the unconstrained end of every restart.
    ``covariance`` (d, d), if asked for, is that of Laplace's approximation: minus the inverse Hessian with respect to
    the unconstrained position, flattened, NaN where the Hessian is not negative definite. ``ends`` (restart, d) are
    where the restarts ended, flattened. ``status`` is that of the best restart; ``IMPROPER_DENSITY`` where another
    ended elsewhere at the same value and the density does not fall between them and beyond; ``INTERRUPTED`` where
    Ctrl-C ended the search.
    """

    log_density: Any
    values: Any
    statuses: Any
    num_evaluations: Any
    best: Any
    covariance: Any
    status: Any
    log_likelihood: Any = None
    ends: Any = None
    positions: Any = None


@pytree
class MAP:
    """The posterior mode as an engine: a posterior with a single draw.

    Args:
        num_restarts: starting points; the best end is kept.
        jacobian: maximise the density of the unconstrained position instead of that of the constrained values. The
            former has a mode inside wherever the posterior does not pile up at a boundary.
        covariance: also compute Laplace's covariance (d gradients of the gradient).
        max_steps: the most L-BFGS steps of a restart.
        mode: restarts one after another (``"map"``), vectorised (``"vmap"``), or as the device asks (``"auto"``).
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
        """What is maximised: a ``Partial`` of the unconstrained position.

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
        """Find the mode.

        Args:
            key: random key, for the starting points.
            target: an exact target.
            progress: a line while it works; ``None`` means on a terminal.
            checkpoint: not used: the search is short.

        Returns:
            A posterior with one chain of one draw; its ``info`` is a :class:`MAPInfo`.

        Raises:
            TypeError: not a key, not a target, or a minibatch target.
            NumericalError: no restart ended at a finite log density.
            Interrupted: Ctrl-C before there was one; a ``KeyboardInterrupt``.

        Warns:
            ConvergenceWarning: the best restart did not converge, the mode is not unique and the density improper, or
                Ctrl-C ended the search.
        """
        engine.check(key, target, "MAP")
        fn = self.objective(target)
        posterior, position = point_posterior("MAP", key, target, fn, self, progress)
        info = posterior.info
        sound = info.status in (Status.OK, Status.INTERRUPTED)
        if target.prior is None and (not sound or _is_elsewhere(info)):
            status, found = tails.doubted(Status.MAX_ITERATIONS, fn, _rows_to_trees(position, info.ends))
            if found:
                engine.warn(status, f"the mode is not unique: {found}", "MAP")
                posterior = dataclasses.replace(posterior, info=info._replace(status=status))
        if self.covariance:
            info = posterior.info._replace(covariance=laplace_covariance(fn, position))
            posterior = dataclasses.replace(posterior, info=info)
        return posterior


def point_posterior(
    name: str, key: PRNGKey, target: Target, fn: Callable, settings: Any, progress: bool | str | None
) -> tuple[Posterior, ArrayTree]:
    """Maximise a function of the unconstrained position and hand the best point back as a posterior.

    Args:
        name: of the engine, for messages.
        key: random key, for the starting points.
        target: the target, checked before.
        fn: what is maximised, a ``Partial``.
        settings: anything with ``num_restarts``, ``max_steps`` and ``mode``.
        progress: a line while it works; ``None`` means on a terminal.

    Returns:
        A posterior with one chain of one draw, and the unconstrained position.

    Raises:
        NumericalError: no restart ended at a finite value.
        Interrupted: Ctrl-C before there was one.
    """
    with bars.task(name, None, progress):
        # Compiling a check of the starts costs more than a restart that fails: check only if all of them did.
        climb = functools.partial(maximize, fn, max_steps=settings.max_steps, mode=settings.mode)
        position, info = climb(target.candidates(key, settings.num_restarts))
        if int(info.status) == Status.INTERRUPTED and not np.isfinite(info.log_density):
            raise interrupts.Interrupted(f"{name}: no restart had come to a finite log density")
        if int(info.status) == Status.NON_FINITE:
            position, info = climb(target.init(key, settings.num_restarts))
        if int(info.status) == Status.NON_FINITE:
            raise NumericalError(
                f"{name}: no restart ended at a finite log density; {advice(Status.NON_FINITE)}",
                Status.NON_FINITE,
            )
    ended = int(np.sum(np.asarray(info.statuses) != Status.INTERRUPTED))
    said = f"the best of {settings.num_restarts} restarts did not converge"
    said = (
        said
        if int(info.status) != Status.INTERRUPTED
        else f"{ended} of {settings.num_restarts} restarts had ended"
    )
    engine.warn(info.status, said, name)
    draws = jax.tree.map(lambda x: x[None, None], position)
    return engine.finish(target, draws, position, info), position


def _is_elsewhere(info: MAPInfo) -> bool:
    """Whether a restart ended at the value of the best one, but not where it did."""
    values, ends = np.asarray(info.values), np.asarray(info.ends)
    best = int(info.best)
    as_good = values >= values[best] - _NATS * float(np.finfo(ends.dtype).eps) ** 0.5
    apart = np.max(np.abs(ends - ends[best]), axis=1) > _APART * (1 + np.max(np.abs(ends[best])))
    return bool(np.any(as_good & apart))


def _rows_to_trees(position: ArrayTree, rows: Array) -> ArrayTree:
    return jax.vmap(ravel_pytree(position)[1])(rows)


def _objective(logdensity_fn: Callable, jacobian_fn: Callable | None, position: ArrayTree) -> Scalar:
    """Log p(values) = log p(position) - log |det d values / d position|."""
    value = logdensity_fn(position)
    return value if jacobian_fn is None else value - jacobian_fn(position)


def maximize(
    fn: Callable, starts: ArrayTree, *, max_steps: int = 1000, mode: str = "auto"
) -> tuple[ArrayTree, MAPInfo]:
    """Return the best of the maxima found from several starts.

    Args:
        fn: differentiable scalar function of one position.
        starts: positions with a leading axis.
        max_steps: the most L-BFGS steps of a start.
        mode: ``"auto"``, ``"map"`` or ``"vmap"`` over the starts.

    Returns:
        The position and the report, both without failing on non-finite values: the status says so. After Ctrl-C it is
        the best that was found so far.
    """
    fn, limit = as_partial(fn), jnp.asarray(max_steps, jnp.int32)
    climbs = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(_begin, starts))
    pace, spent = interrupts.Pace(4), 0
    with interrupts.deferred() as stop:
        while True:
            with pace.measured(pace.size):
                piece = _climb(fn, starts, climbs, np.int32(spent), np.int32(pace.size), limit, mode)
                climbs, going, position, info = interrupts.wait(piece)
            spent += pace.size
            if not np.any(going) or stop.requested:
                return position, info if not stop.requested else _interrupted(info, np.asarray(going))


def _interrupted(info: MAPInfo, going: np.ndarray) -> MAPInfo:
    """The report of a search that Ctrl-C ended; restarts that had ended keep their status."""
    statuses = jnp.where(going, jnp.int32(Status.INTERRUPTED), info.statuses)
    return info._replace(statuses=statuses, status=jnp.maximum(info.status, jnp.int32(Status.INTERRUPTED)))


def _begin(starts: ArrayTree) -> optimization.LBFGSState:
    # One vector instead of a tree: a third of the operations to compile.
    vectors = jax.vmap(lambda start: ravel_pytree(start)[0])(starts)
    return jax.vmap(optimization.begin)(vectors)


@functools.partial(jax.jit, static_argnames="mode")
def _climb(
    fn: Callable,
    starts: ArrayTree,
    climbs: Any,
    spent: Int[Array, ""],
    more: Int[Array, ""],
    max_steps: Int[Array, ""],
    mode: str,
) -> tuple[Any, Bool[Array, " restart"], ArrayTree, MAPInfo]:
    """Climb on, from the starts where nothing was spent, for so many more evaluations of every restart.

    Returns the climbs, which of them are not at their end, and position and report of the best.
    """
    _, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], starts))
    loss = jax.tree_util.Partial(lambda fn, vector: -fn(unravel(vector)), fn)
    climbs = jax.tree.map(functools.partial(jnp.where, spent == 0), _begin(starts), climbs)
    decrease = _NATS * float(jnp.finfo(climbs.position.dtype).eps) ** 0.5
    descend = functools.partial(
        optimization.descend, loss, max_steps=max_steps, num_evaluations=spent + more, decrease=decrease
    )
    climbs, going = engine.over(descend, mode, climbs)
    results = jax.vmap(optimization.result)(climbs)
    values = jnp.where(jnp.isfinite(results.value), -results.value, -jnp.inf)
    best = _best(values, results.status, decrease)
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
    return climbs, going, unravel(results.position[best]), info


def _best(values: Array, statuses: Array, gain: float) -> Array:
    """The index of the highest value; of those that differ by no gain that matters, of one whose search converged."""
    highest = jnp.max(values)
    tied = values >= highest - gain * (1 + jnp.abs(highest))
    converged = tied & (statuses == Status.OK)
    return jnp.argmax(jnp.where(jnp.where(converged.any(), converged, tied), values, -jnp.inf))


@jax.jit
def laplace_covariance(fn: Callable, position: ArrayTree) -> Float[Array, "d d"]:
    """Return minus the inverse Hessian at a maximum; NaN where it is not negative definite.

    Args:
        fn: a ``Partial``, twice differentiable.
        position: the maximum.
    """
    flat, unravel = ravel_pytree(position)
    gradient = jax.grad(lambda x: -fn(unravel(x)))
    rows = jax.lax.map(lambda v: jax.jvp(gradient, (flat,), (v,))[1], jnp.eye(flat.size, dtype=flat.dtype))
    chol = jnp.linalg.cholesky((rows + rows.T) / 2)
    return jax.scipy.linalg.cho_solve((chol, True), jnp.eye(flat.size, dtype=flat.dtype))
