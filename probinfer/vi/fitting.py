"""Fitting a Gaussian: optimize on a fixed sample, check on fresh draws, double the sample, repeat."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.trees import select
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int, PRNGKey, Scalar, field, pytree
from probinfer.mcmc.adaptation import metric as metrics
from probinfer.mcmc.adaptation import starts
from probinfer.numerics import optimization
from probinfer.running import interrupts
from probinfer.running import progress as bars
from probinfer.vi import gaussian
from probinfer.vi.gaussian import VariationalGaussian
from probinfer.vi.report import VIInfo

__all__ = ["VIProblem", "fit", "initial_gaussian", "power_of_two"]

_NUM_FRESH = 1000  # draws that check a fit
_TOLERANCE, _MAX_STEPS = 1e-6, 1000  # of L-BFGS
_MAX_GAP = 0.01  # nats per dimension
_NUM_MATCHES = 4  # score matching steps
_MAX_SHRINKS = 20  # fourfold each


@pytree
class VIProblem:
    """The target, one position for its structure, and how many points are evaluated together."""

    logdensity_fn: Any
    template: Any
    block: int = field(static=True)


@functools.partial(jax.jit, static_argnames="full")
def initial_gaussian(
    logdensity_fn, initial_positions: ArrayTree, sample, full: bool
) -> tuple[VariationalGaussian, ArrayTree, Int[Array, ""]]:
    """Ascend to the typical set; secant pairs of the ascent give a first scale, gradients at the sample a better one.

    Args:
        logdensity_fn: log density of a position.
        initial_positions: one position, with a leading axis of length 1.
        sample: standard-normal points (batch, d), used for a full scale.
        full: whether the scale is a lower triangle.

    Returns:
        The Gaussian, the end of the ascent and the number of gradients.
    """
    # Ascend
    ascent = starts.ascend(logdensity_fn, initial_positions)
    secants = ascent.position_differences, ascent.gradient_differences
    position = jax.tree.map(lambda x: x[0], ascent.positions)
    loc, unravel = ravel_pytree(position)
    if not full:
        metric = metrics.from_secants(*secants, jnp.array([True, False, False]), 1)
        return VariationalGaussian(loc, metric.sigma), position, ascent.num_gradients
    # Match scores; of the Gaussians on the way, take the one with the best bound
    metric = metrics.from_secants(*secants, jnp.array([True, True, True]), loc.shape[0])
    q = VariationalGaussian(loc, _triangular(metric))

    def advance(q, _):
        bound, matched = _match_scores(logdensity_fn, unravel, q, sample)
        return matched, (jnp.where(jnp.isfinite(bound), bound, -jnp.inf), q)

    _, (bounds, gaussians) = jax.lax.scan(advance, q, length=_NUM_MATCHES)
    best = jax.tree.map(lambda x: x[jnp.argmax(bounds)], gaussians)
    return best, position, ascent.num_gradients + _NUM_MATCHES * len(sample)


def _match_scores(
    logdensity_fn, unravel, q: VariationalGaussian, sample
) -> tuple[Scalar, VariationalGaussian]:
    """Return the bound of a Gaussian, and the Gaussian whose score fits the gradients at its draws.

    For a Gaussian target the fit is exact, whatever Gaussian it starts from.

    References:
        Cai et al. (2024), "Batch and match", for the idea of matching scores on a batch.
    """
    draws = q.loc + sample @ q.scale.T
    values, gradients = jax.lax.map(
        lambda x: jax.value_and_grad(lambda y: logdensity_fn(unravel(y)))(x), draws
    )
    bound = jnp.mean(values) + jnp.sum(jnp.log(jnp.diag(q.scale)))
    metric = metrics.fisher_score_low_rank(draws, gradients, draws.shape[1], cutoff=1.0)
    scale = _triangular(metric)
    loc = jnp.mean(draws, axis=0) + scale @ (scale.T @ jnp.mean(gradients, axis=0))
    usable = jnp.all(jnp.isfinite(loc)) & jnp.all(jnp.isfinite(scale))
    return bound, select(usable, VariationalGaussian(loc, scale), q)


def _triangular(metric) -> Float[Array, "d d"]:
    """Return S, lower triangular with a positive diagonal and S S^T = L L^T: L^T = Q R, S = R^T up to signs."""
    dimension = metric.sigma.shape[0]
    identity = jnp.eye(dimension, dtype=metric.sigma.dtype)
    root = metric.sigma[:, None] * (identity + (metric.U * (jnp.sqrt(metric.lam) - 1)) @ metric.U.T)
    triangle = jnp.linalg.qr(root.T)[1].T
    return triangle * jnp.sign(jnp.diag(triangle))


def fit(
    problem: VIProblem,
    q: VariationalGaussian,
    max_samples: int,
    seed: int,
    key_fresh: PRNGKey,
    bar: bars.Task,
    stop: interrupts.Interruption,
) -> tuple[VariationalGaussian, VIInfo]:
    """Double the fixed sample until the fit to it holds on fresh draws.

    After Ctrl-C the Gaussian is the last iterate of the search.

    Args:
        problem: the target.
        q: the initial Gaussian.
        max_samples: the largest fixed sample.
        seed: of the fixed samples.
        key_fresh: random key of the fresh draws.
        bar: updated after every round.
        stop: whether Ctrl-C was pressed.

    Returns:
        The fitted Gaussian, and the report; its ``khat`` and ``identity`` are NaN, to be filled in.

    Raises:
        NumericalError: no scale gives a finite log density at all points of the sample.
    """
    dimension = q.loc.shape[0]
    min_samples = max(16, 4 * dimension if q.scale.ndim == 2 else 0)
    num_samples = power_of_two(min_samples)
    num_rows = max(power_of_two(max_samples), 2 * num_samples)
    num_gradients = num_rounds = 0
    while True:
        # Optimize on the fixed sample
        sample = jnp.asarray(gaussian.base_sample(seed, dimension, num_samples, num_rows), q.loc.dtype)
        q, result = _optimize_from(problem, q, sample, num_samples, stop)
        num_gradients += num_samples * int(result.num_evaluations)
        # Check on fresh draws
        elbo, error = interrupts.wait(_fresh_bound(problem, q, jax.random.fold_in(key_fresh, num_rounds)))
        gap = -result.value - elbo
        num_rounds += 1
        bar.update(num_rounds, f"{num_samples} points, bound {float(elbo):.2f}, gap {float(gap):.2g}")
        closed = bool(gap <= jnp.maximum(2 * error, _MAX_GAP * dimension))
        if closed or num_samples >= num_rows or stop.requested:
            break
        # Double the sample
        num_samples *= 2
    return q, VIInfo(
        elbo=elbo,
        elbo_standard_error=error,
        gap=gap,
        khat=jnp.full_like(elbo, jnp.nan),
        identity=jnp.full_like(elbo, jnp.nan),
        loc=q.loc,
        scale=q.scale,
        num_samples=jnp.asarray(num_samples, jnp.int32),
        num_gradients=jnp.asarray(num_gradients, jnp.int32),
        status=result.status if closed else jnp.asarray(int(Status.MAX_ITERATIONS), jnp.int32),
    )


def power_of_two(num: int) -> int:
    """Return the smallest power of two that is at least ``num``: Sobol samples of such sizes are balanced."""
    return 1 << (num - 1).bit_length()


def _optimize_from(
    problem: VIProblem,
    q: VariationalGaussian,
    sample: jax.Array,
    num_samples: int,
    stop: interrupts.Interruption,
) -> tuple[VariationalGaussian, optimization.OptimizeResult]:
    """Optimize; as long as the density is not finite at a point of the sample, start again with a smaller scale.

    Raises:
        NumericalError: no scale helps.
    """
    for _ in range(_MAX_SHRINKS):
        fitted, result = _optimize(problem, q, sample, num_samples, stop)
        if int(result.status) != Status.NON_FINITE:
            return fitted, result
        q = q._replace(scale=q.scale / 4)
    raise NumericalError(
        f"the log density is not finite around the starting point; {advice(Status.NON_FINITE)}",
        Status.NON_FINITE,
    )


def _optimize(
    problem: VIProblem,
    q: VariationalGaussian,
    sample: jax.Array,
    num_samples: int,
    stop: interrupts.Interruption,
) -> tuple[VariationalGaussian, optimization.OptimizeResult]:
    """Optimize in pieces, until the search is finished or Ctrl-C was pressed."""
    # Zeros in place of the initial state, which ``_descend`` makes inside jit: nothing else is compiled
    search = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(_init_search, q))
    pace, num_done = interrupts.Pace(8), 0
    while True:
        with pace.measured(pace.size):
            piece = _descend(
                problem, q, sample, np.int32(num_samples), search, np.int32(num_done), np.int32(pace.size)
            )
            search, unfinished, fitted, result = interrupts.wait(piece)
        num_done += pace.size
        if not unfinished or stop.requested:
            return fitted, result


def _init_search(q: VariationalGaussian) -> optimization.LBFGSState:
    return optimization.start_search(gaussian.identity_update(q))


@jax.jit
def _descend(
    problem: VIProblem,
    q: VariationalGaussian,
    sample: Array,
    num_samples: Array,
    search: optimization.LBFGSState,
    num_done: Array,
    num_evaluations: Array,
) -> tuple[optimization.LBFGSState, Bool[Array, ""], VariationalGaussian, optimization.OptimizeResult]:
    """Continue a search for some evaluations, or start it if none are done.

    Returns the search, whether it is unfinished, the Gaussian there, and the result so far.
    """
    loss = jax.tree_util.Partial(_negative_bound, problem, q, sample, num_samples)
    search = jax.tree.map(functools.partial(jnp.where, num_done == 0), _init_search(q), search)
    search, unfinished = optimization.continue_search(
        loss, search, max_steps=_MAX_STEPS, num_evaluations=num_done + num_evaluations, tolerance=_TOLERANCE
    )
    result = optimization.search_result(search)
    return search, unfinished, gaussian.apply_update(q, result.position), result


def _negative_bound(problem: VIProblem, q, sample, num_samples, update) -> Scalar:
    return gaussian.negative_bound(
        q, problem.logdensity_fn, problem.template, sample, num_samples, update, block=problem.block
    )


def _log_density(problem: VIProblem, draws: Array) -> Array:
    unravel = ravel_pytree(problem.template)[1]

    def evaluate(x):
        return problem.logdensity_fn(unravel(x))

    return jax.lax.map(evaluate, draws) if problem.block == 1 else jax.vmap(evaluate)(draws)


@jax.jit
def _fresh_bound(problem: VIProblem, q: VariationalGaussian, key: PRNGKey) -> tuple[Scalar, Scalar]:
    """Return the evidence lower bound on fresh draws, and its standard error."""
    draws = gaussian.draw(q, key, _NUM_FRESH)
    log_ratios = _log_density(problem, draws) - gaussian.log_density(q, draws)
    return jnp.mean(log_ratios), jnp.std(log_ratios) / float(np.sqrt(_NUM_FRESH))
