"""Fitting a Gaussian: optimise on a fixed sample, check on a fresh one, enlarge, repeat."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, PRNGKey, field, pytree
from probinfer.mcmc.adaptation import metric as metrics
from probinfer.mcmc.adaptation import starts
from probinfer.numerics import optimization
from probinfer.running import interrupts
from probinfer.running import progress as bars
from probinfer.vi import gaussian
from probinfer.vi.report import VIInfo

__all__ = ["Problem", "first_frame", "fit", "power_of_two"]

_FRESH = 1000
_TOLERANCE, _MAX_STEPS = 1e-6, 1000
_NATS = 0.01
_MATCHES = 4
_SHRINKS = 20  # fourfold each


@pytree
class Problem:
    """The target, one position for its structure, and how many points are evaluated together."""

    logdensity_fn: Any
    like: Any
    block: int = field(static=True)


@functools.partial(jax.jit, static_argnames="full")
def first_frame(
    logdensity_fn, starting: ArrayTree, sample, full: bool
) -> tuple[gaussian.Frame, ArrayTree, Array]:
    """Climb to the typical set; the steps of the climb give a first scale, gradients at the sample a better one.

    Args:
        logdensity_fn: log density of a position.
        starting: one position, with a leading axis of length 1.
        sample: standard-normal points (batch, d), used for a full scale.
        full: whether the scale is a lower triangle.

    Returns:
        The frame, the end of the climb and the gradients spent.
    """
    positions, moved, bent, spent = starts.climb(logdensity_fn, starting)
    position = jax.tree.map(lambda x: x[0], positions)
    centre = ravel_pytree(position)[0]
    if not full:
        metric = metrics.from_secants(moved, bent, jnp.array([True, False, False]), 1)
        return gaussian.Frame(centre, metric.sigma), position, spent
    metric = metrics.from_secants(moved, bent, jnp.array([True, True, True]), centre.shape[0])
    frame = gaussian.Frame(centre, _triangular(metric))

    def advance(frame, _):
        value, better = _match(logdensity_fn, ravel_pytree(position)[1], frame, sample)
        return better, (jnp.where(jnp.isfinite(value), value, -jnp.inf), frame)

    _, (values, frames) = jax.lax.scan(advance, frame, length=_MATCHES)
    best = jax.tree.map(lambda x: x[jnp.argmax(values)], frames)
    return best, position, spent + _MATCHES * len(sample)


def _match(logdensity_fn, unravel, frame: gaussian.Frame, sample) -> tuple[jax.Array, gaussian.Frame]:
    """Return the bound of a frame and the Gaussian whose score fits the gradients at its draws.

    For a Gaussian target the fit is exact from any frame.

    References:
        Cai et al. (2024), "Batch and match", for the idea of matching scores on a batch.
    """
    draws = frame.centre + sample @ frame.scale.T
    values, gradients = jax.lax.map(
        lambda x: jax.value_and_grad(lambda y: logdensity_fn(unravel(y)))(x), draws
    )
    bound = jnp.mean(values) + jnp.sum(jnp.log(jnp.diag(frame.scale)))
    metric = metrics.fisher_score_low_rank(draws, gradients, draws.shape[1], cutoff=1.0)
    scale = _triangular(metric)
    fitted = gaussian.Frame(jnp.mean(draws, axis=0) + scale @ (scale.T @ jnp.mean(gradients, axis=0)), scale)
    usable = jnp.all(jnp.isfinite(fitted.centre)) & jnp.all(jnp.isfinite(scale))
    return bound, jax.tree.map(lambda new, old: jnp.where(usable, new, old), fitted, frame)


def _triangular(metric) -> jax.Array:
    """Return S lower triangular, its diagonal positive, with S S^T = L L^T: L^T = Q R, S = R^T up to signs."""
    dimension = metric.sigma.shape[0]
    identity = jnp.eye(dimension, dtype=metric.sigma.dtype)
    root = metric.sigma[:, None] * (identity + (metric.U * (jnp.sqrt(metric.lam) - 1)) @ metric.U.T)
    triangle = jnp.linalg.qr(root.T)[1].T
    return triangle * jnp.sign(jnp.diag(triangle))


def fit(
    problem: Problem,
    frame: gaussian.Frame,
    max_samples: int,
    seed: int,
    key_fresh: PRNGKey,
    bar: bars.Task,
    stop: interrupts.Interruption,
) -> tuple[gaussian.Frame, VIInfo]:
    """Double the fixed sample until the fit to it holds on fresh draws; ``khat`` and ``identity`` are left open.

    After Ctrl-C it is the Gaussian where the search was.

    Args:
        problem: the target.
        frame: where to begin.
        max_samples: the largest fixed sample.
        seed: of the fixed samples.
        key_fresh: random key of the fresh draws.
        bar: told of every round.
        stop: whether Ctrl-C was pressed.

    Returns:
        The fitted Gaussian at rest, and the report.

    Raises:
        NumericalError: no scale gives a finite log density at all points of the sample.
    """
    dimension = frame.centre.shape[0]
    smallest = max(16, 4 * dimension if frame.scale.ndim == 2 else 0)
    num = power_of_two(smallest)
    room = max(power_of_two(max_samples), 2 * num)
    num_gradients = round_number = 0
    while True:
        sample = jnp.asarray(gaussian.base_sample(seed, dimension, num, room), frame.centre.dtype)
        frame, result = _optimize_from(problem, frame, sample, num, stop)
        num_gradients += num * int(result.num_evaluations)
        elbo, error = interrupts.wait(
            _check_fresh(problem, frame, jax.random.fold_in(key_fresh, round_number))
        )
        gap = -result.value - elbo
        round_number += 1
        bar.update(round_number, f"{num} points, bound {float(elbo):.2f}, gap {float(gap):.2g}")
        closed = bool(gap <= jnp.maximum(2 * error, _NATS * dimension))
        if closed or num >= room or stop.requested:
            break
        num *= 2
    return frame, VIInfo(
        elbo=elbo,
        elbo_standard_error=error,
        gap=gap,
        khat=jnp.full_like(elbo, jnp.nan),
        identity=jnp.full_like(elbo, jnp.nan),
        loc=frame.centre,
        scale=frame.scale,
        num_samples=jnp.asarray(num, jnp.int32),
        num_gradients=jnp.asarray(num_gradients, jnp.int32),
        status=result.status if closed else jnp.asarray(int(Status.MAX_ITERATIONS), jnp.int32),
    )


def power_of_two(num: int) -> int:
    """Return the least one that is not smaller: Sobol points are balanced there."""
    return 1 << (num - 1).bit_length()


def _optimize_from(
    problem: Problem, frame: gaussian.Frame, sample: jax.Array, num: int, stop: interrupts.Interruption
) -> tuple[gaussian.Frame, optimization.OptimizeResult]:
    """Optimise; where a point of the sample falls where the density is not finite, start with a smaller scale.

    Raises:
        NumericalError: no scale helps.
    """
    for _ in range(_SHRINKS):
        fitted, result = _optimize(problem, frame, sample, num, stop)
        if int(result.status) != Status.NON_FINITE:
            return fitted, result
        frame = frame._replace(scale=frame.scale / 4)
    raise NumericalError(
        f"the log density is not finite around the starting point; {advice(Status.NON_FINITE)}",
        Status.NON_FINITE,
    )


def _optimize(
    problem: Problem, frame: gaussian.Frame, sample: jax.Array, num: int, stop: interrupts.Interruption
) -> tuple[gaussian.Frame, optimization.OptimizeResult]:
    """Optimise in pieces, until it is done or Ctrl-C was pressed."""
    search = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(_begin, frame))
    pace, spent = interrupts.Pace(8), 0
    while True:
        with pace.measured(pace.size):
            piece = _descend(
                problem, frame, sample, np.int32(num), search, np.int32(spent), np.int32(pace.size)
            )
            search, going, fitted, result = interrupts.wait(piece)
        spent += pace.size
        if not going or stop.requested:
            return fitted, result


def _begin(frame: gaussian.Frame) -> optimization.LBFGSState:
    return optimization.begin(gaussian.still(frame))


@jax.jit
def _descend(
    problem: Problem, frame: gaussian.Frame, sample: Array, num: Array, search: Any, spent: Array, more: Array
) -> tuple[Any, Array, gaussian.Frame, optimization.OptimizeResult]:
    """Go on for so many evaluations, from the start where nothing was spent; with whether there is more to do."""
    loss = jax.tree_util.Partial(_negative_bound, problem, frame, sample, num)
    search = jax.tree.map(functools.partial(jnp.where, spent == 0), _begin(frame), search)
    search, going = optimization.descend(
        loss, search, max_steps=_MAX_STEPS, num_evaluations=spent + more, tolerance=_TOLERANCE
    )
    result = optimization.result(search)
    return search, going, gaussian.recentre(frame, result.position), result


def _negative_bound(problem: Problem, frame, sample, num, moves) -> jax.Array:
    return gaussian.negative_bound(
        frame, problem.logdensity_fn, problem.like, sample, num, moves, block=problem.block
    )


def _log_density(problem: Problem, draws: Array) -> Array:
    unravel = ravel_pytree(problem.like)[1]

    def evaluate(x):
        return problem.logdensity_fn(unravel(x))

    return jax.lax.map(evaluate, draws) if problem.block == 1 else jax.vmap(evaluate)(draws)


@jax.jit
def _check_fresh(problem: Problem, frame: gaussian.Frame, key: PRNGKey) -> tuple[Array, Array]:
    """The evidence bound on fresh draws, and its standard error."""
    draws = gaussian.draw(frame, key, _FRESH)
    ratios = _log_density(problem, draws) - gaussian.log_density(frame, draws)
    return jnp.mean(ratios), jnp.std(ratios) / float(np.sqrt(_FRESH))
