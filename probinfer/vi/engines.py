"""Gaussian variational inference as engines: optimise on a fixed sample, check on a fresh one, enlarge, repeat."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from probinfer import engine, importance, optimize, tails
from probinfer import progress as bars
from probinfer.base import Status
from probinfer.checkpoint import Checkpoint
from probinfer.errors import NumericalError, advice
from probinfer.mcmc import metric as metrics
from probinfer.mcmc import starts
from probinfer.posterior import Posterior
from probinfer.targets import Target
from probinfer.types import Array, ArrayTree, PRNGKey, field, pytree
from probinfer.vi import gaussian
from probinfer.vi.report import KHAT, VIInfo, details, refuse_improper

__all__ = ["FullRank", "MeanField", "VIInfo"]

_FRESH = 1000
_TOLERANCE = 1e-6
_NATS = 0.01
_BLOCK = 32
_MATCHES = 4
_SHRINKS = 20  # fourfold each
_HARMLESS = 0.05  # nats, of the log ratios: so nearly equal weights have no tail that matters


@pytree
class MeanField:
    """The Gaussian with independent unconstrained coordinates that is closest in KL(q || p).

    The fixed sample starts with 16 points and doubles until the bound on fresh draws is below the optimised one by
    no more than two standard errors or 0.01 nats a dimension.

    Args:
        num_draws: draws from the approximation, one chain.
        max_samples: the largest fixed sample.
        mode: points one after another (``"map"``), in vectorised blocks (``"vmap"``), or as the device asks.
    """

    num_draws: int = field(static=True, default=1000)
    max_samples: int = field(static=True, default=1024)
    mode: str = field(static=True, default="auto")

    def __post_init__(self):
        """Check the settings."""
        _check_settings(self)

    def sample(
        self,
        key: PRNGKey,
        target: Target,
        *,
        progress: bool | str | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Fit the Gaussian and draw from it.

        Args:
            key: random key.
            target: an exact target.
            progress: a line while it works; ``None`` means on a terminal.
            checkpoint: not used.

        Returns:
            A posterior of one chain without a log evidence; its ``info`` is a :class:`VIInfo`.

        Raises:
            TypeError: not a key, not a target, or a minibatch target.
            NumericalError: the log density is not finite around the starting point.

        Warns:
            ConvergenceWarning: the gap did not close, the optimiser stalled, or ``khat`` is above 0.7.
        """
        return _sample(key, target, self, False, progress)


@pytree
class FullRank:
    """The Gaussian with any covariance that is closest in KL(q || p).

    The scale is a lower triangle with a positive diagonal. The fixed sample must span the space, or the bound on it
    could be raised without limit by stretching the scale where no point is looking: it starts with at least 4 d
    points, reflected pairs counted twice.

    Args:
        num_draws: draws from the approximation, one chain.
        max_samples: the largest fixed sample (at least 8 d are allowed).
        mode: as in :class:`MeanField`.
    """

    num_draws: int = field(static=True, default=1000)
    max_samples: int = field(static=True, default=1024)
    mode: str = field(static=True, default="auto")

    def __post_init__(self):
        """Check the settings."""
        _check_settings(self)

    def sample(
        self,
        key: PRNGKey,
        target: Target,
        *,
        progress: bool | str | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Fit the Gaussian and draw from it; arguments, result and errors as in :meth:`MeanField.sample`."""
        return _sample(key, target, self, True, progress)


def _check_settings(config: Any) -> None:
    """Refuse impossible settings.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count or mode out of range.
    """
    engine.check_counts(config, ("num_draws", "max_samples"))
    if config.num_draws < 1 or config.max_samples < 16:
        raise ValueError(
            f"expected num_draws >= 1 and max_samples >= 16, got {config.num_draws} and {config.max_samples}"
        )
    if config.mode not in ("auto", "map", "vmap"):
        raise ValueError(f"mode must be 'auto', 'map' or 'vmap', got {config.mode!r}")


def _sample(key: PRNGKey, target: Target, config: Any, full: bool, progress: bool | str | None) -> Posterior:
    name = type(config).__name__
    engine.check(key, target, name)
    key_init, key_base, key_fresh, key_draws = jax.random.split(key, 4)
    starting = target.init(key_init, 1)
    logdensity_fn = engine.exact_logdensity(target, starting)
    mode = "map" if config.mode == "auto" and jax.default_backend() == "cpu" else config.mode
    with bars.task(name, None, progress) as bar:
        seed = int(jax.random.bits(key_base))
        starting_float = engine.to_default_dtype(starting)
        dimension = sum(leaf.size for leaf in jax.tree.leaves(starting))
        batch = _power_of_two(max(16, 4 * dimension)) if full else 2
        sample = jnp.asarray(gaussian.base_sample(seed, dimension, batch, batch))
        frame, position, spent = _first_frame(logdensity_fn, starting_float, sample, full)
        problem = _Problem(logdensity_fn, position, 1 if mode == "map" else _BLOCK)
        try:
            frame, info = _fit(problem, frame, config.max_samples, seed, key_fresh, bar)
        except NumericalError as error:
            if target.prior is None:
                refuse_improper(name, logdensity_fn, position, error)
            raise
    info = info._replace(num_gradients=info.num_gradients + spent)
    draws = gaussian.draw(frame, key_draws, config.num_draws)
    unravel = ravel_pytree(position)[1]
    positions = jax.vmap(jax.vmap(unravel))(draws[None])
    start = jax.tree.map(lambda leaf: leaf[None], position)  # the fit itself may have gone beyond all numbers
    # k-hat of draws that never went there does not see a tail that is too heavy to integrate
    status, found = tails.doubted(info.status, logdensity_fn, start, prior=target.prior, always=True)
    info = info._replace(status=status)
    engine.warn(status, found or details(info), name)
    return engine.finish(target, positions, starting, info)


@pytree
class _Problem:
    """The target, one position for its structure, and how many points are evaluated together."""

    logdensity_fn: Any
    like: Any
    block: int = field(static=True)


@functools.partial(jax.jit, static_argnames="full")
def _first_frame(
    logdensity_fn, starting: ArrayTree, sample, full: bool
) -> tuple[gaussian.Frame, ArrayTree, Array]:
    """Climb to the typical set; the steps of the climb give a first scale, gradients at the sample a better one.

    Returns the frame, the end of the climb and the gradients spent.
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


def _fit(
    problem: _Problem,
    frame: gaussian.Frame,
    max_samples: int,
    seed: int,
    key_fresh: PRNGKey,
    bar: bars.Task,
) -> tuple[gaussian.Frame, VIInfo]:
    """Double the fixed sample until the fit to it holds on fresh draws."""
    dimension = frame.centre.shape[0]
    smallest = max(16, 4 * dimension if frame.scale.ndim == 2 else 0)
    num = _power_of_two(smallest)
    room = max(_power_of_two(max_samples), 2 * num)
    num_gradients = round_number = 0
    while True:
        sample = jnp.asarray(gaussian.base_sample(seed, dimension, num, room), frame.centre.dtype)
        frame, result = _optimize_from(problem, frame, sample, num)
        num_gradients += num * int(result.num_evaluations)
        fresh = _check_fresh(problem, frame, jax.random.fold_in(key_fresh, round_number))
        gap = -result.value - fresh.elbo
        round_number += 1
        bar.update(round_number, f"{num} points, bound {float(fresh.elbo):.2f}, gap {float(gap):.2g}")
        closed = bool(gap <= jnp.maximum(2 * fresh.elbo_standard_error, _NATS * dimension))
        if closed or num >= room:
            break
        num *= 2
    status = result.status if closed else jnp.asarray(int(Status.MAX_ITERATIONS), jnp.int32)
    spread = fresh.elbo_standard_error * float(np.sqrt(_FRESH))
    poor = (fresh.khat > KHAT) & (spread > _HARMLESS)
    status = jnp.where(poor, jnp.int32(Status.POOR_APPROXIMATION), status)
    return frame, fresh._replace(
        gap=gap,
        num_samples=jnp.asarray(num, jnp.int32),
        num_gradients=jnp.asarray(num_gradients, jnp.int32),
        status=status,
    )


def _power_of_two(num: int) -> int:
    """The least one that is not smaller: Sobol points are balanced there."""
    return 1 << (num - 1).bit_length()


def _optimize_from(
    problem: _Problem, frame: gaussian.Frame, sample: jax.Array, num: int
) -> tuple[gaussian.Frame, optimize.OptimizeResult]:
    """Optimise; where a point of the sample falls where the density is not finite, start with a smaller scale.

    Raises:
        NumericalError: no scale helps.
    """
    for _ in range(_SHRINKS):
        fitted, result = _optimize(problem, frame, sample, jnp.asarray(num, jnp.int32))
        if int(result.status) != Status.NON_FINITE:
            return fitted, result
        frame = frame._replace(scale=frame.scale / 4)
    raise NumericalError(
        f"the log density is not finite around the starting point; {advice(Status.NON_FINITE)}",
        Status.NON_FINITE,
    )


@jax.jit
def _optimize(
    problem: _Problem, frame: gaussian.Frame, sample, num
) -> tuple[gaussian.Frame, optimize.OptimizeResult]:
    loss = jax.tree_util.Partial(_negative_bound, problem, frame, sample, num)
    result = optimize.minimize(loss, gaussian.still(frame), tolerance=_TOLERANCE)
    return gaussian.recentre(frame, result.position), result


def _negative_bound(problem: _Problem, frame, sample, num, moves) -> jax.Array:
    return gaussian.negative_bound(
        frame, problem.logdensity_fn, problem.like, sample, num, moves, block=problem.block
    )


@jax.jit
def _check_fresh(problem: _Problem, frame: gaussian.Frame, key: PRNGKey) -> VIInfo:
    draws = gaussian.draw(frame, key, _FRESH)
    mode = "map" if problem.block == 1 else "vmap"
    ratios = gaussian.log_ratios(frame, problem.logdensity_fn, problem.like, draws, mode)
    nothing = jnp.zeros((), jnp.int32)
    return VIInfo(
        elbo=jnp.mean(ratios),
        elbo_standard_error=jnp.std(ratios) / float(np.sqrt(_FRESH)),
        gap=jnp.zeros_like(ratios[0]),
        khat=importance.psis(ratios).khat,
        loc=frame.centre,
        scale=frame.scale,
        num_samples=nothing,
        num_gradients=nothing,
        status=nothing,
    )
