"""Gaussian variational inference as engines: weighted draws from the closest Gaussian, and a report on them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.arguments import check_counts
from probinfer.core.errors import NumericalError
from probinfer.core.status import Status
from probinfer.core.types import PRNGKey, field, pytree
from probinfer.inference import engine, tails
from probinfer.inference.posterior import Posterior
from probinfer.running import interrupts
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.targets import Target
from probinfer.vi import gaussian
from probinfer.vi.fitting import VIProblem, fit, initial_gaussian, power_of_two
from probinfer.vi.report import details, refuse_improper
from probinfer.vi.weighing import MIN_JUDGED_DRAWS, weighted_draws

__all__ = ["FullRank", "MeanField"]

_BLOCK = 32


@pytree
class MeanField:
    """The Gaussian with independent unconstrained coordinates that is closest in KL(q || p), with weighted draws.

    The draws come from the Gaussian with wider tails (in every second one a coordinate is drawn from a wide Student t
    distribution) and carry Pareto-smoothed importance weights, so that ``summary``, ``expectation``, ``resample`` and
    ``predictive`` are those of the posterior, not of the Gaussian; :class:`VIInfo` says how accurate they are. Averages
    of ``draws`` without the weights are wrong; ``resample`` makes equal weights. The Gaussian is in ``info``. If
    weights cannot correct the draws, these are the Gaussian's, of equal weights, and the status is
    ``POOR_APPROXIMATION``.

    The fixed sample starts with 16 points and doubles until the bound on fresh draws is below the optimized one by
    no more than two standard errors or 0.01 nats per dimension.

    Args:
        num_draws: draws from the approximation, in one chain.
        max_samples: the largest fixed sample.
        mode: points one after another (``"map"``), in vectorized blocks (``"vmap"``), or as suits the device
            (``"auto"``).
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
        """Fit the Gaussian to an exact target and draw from it; ``checkpoint`` is not used.

        Returns:
            A posterior of one chain of weighted draws (of equal weights if the status is ``POOR_APPROXIMATION``),
            without a log evidence; its ``info`` is a :class:`VIInfo`.

        Raises:
            TypeError: a minibatch target.
            NumericalError: the log density is not finite around the starting point.

        Warns:
            ConvergenceWarning: the gap did not close, the optimizer stalled, or weights cannot correct the
                approximation; or Ctrl-C ended the search early.
        """
        return _sample(key, target, self, False, progress)


@pytree
class FullRank:
    """The Gaussian with any covariance that is closest in KL(q || p), with weighted draws as in :class:`MeanField`.

    The scale is a lower triangle with a positive diagonal. The fixed sample must span the space, or the bound on it
    could be raised without limit by stretching the scale in a direction without points: it starts with at least 4 d
    points, counting both of each reflected pair.

    Args:
        num_draws: draws from the approximation, in one chain.
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
    check_counts(config, ("num_draws", "max_samples"))
    if config.num_draws < 1 or config.max_samples < 16:
        raise ValueError(
            f"expected num_draws >= 1 and max_samples >= 16, got {config.num_draws} and {config.max_samples}"
        )
    if config.mode not in ("auto", "map", "vmap"):
        raise ValueError(f"mode must be 'auto', 'map' or 'vmap', got {config.mode!r}")


def _sample(key: PRNGKey, target: Target, config: Any, full: bool, progress: bool | str | None) -> Posterior:
    name = type(config).__name__
    engine.check_target(key, target, name)
    # Start
    key_init, key_base, key_fresh, key_draws = jax.random.split(key, 4)
    initial_positions = target.init(key_init, 1)
    logdensity_fn = engine.exact_logdensity(target, initial_positions)
    mode = "map" if config.mode == "auto" and jax.default_backend() == "cpu" else config.mode
    with bars.task(name, None, progress) as bar, interrupts.deferred() as stop:
        seed = int(jax.random.bits(key_base))
        dimension = sum(leaf.size for leaf in jax.tree.leaves(initial_positions))
        batch = power_of_two(max(16, 4 * dimension)) if full else 2
        sample = jnp.asarray(gaussian.base_sample(seed, dimension, batch, batch))
        initial = initial_gaussian(logdensity_fn, engine.to_default_dtype(initial_positions), sample, full)
        q, position, num_gradients = interrupts.wait(initial)
        # Fit
        problem = VIProblem(logdensity_fn, position, 1 if mode == "map" else _BLOCK)
        try:
            q, info = fit(problem, q, config.max_samples, seed, key_fresh, bar, stop)
        except NumericalError as error:
            if target.prior is None:
                refuse_improper(name, logdensity_fn, position, error)
            raise
        # Draw and weigh
        draws = interrupts.wait(weighted_draws(problem, q, key_draws, config.num_draws))
        interrupted = stop.requested
    # Judge
    poor = bool(draws.poor)
    status = jnp.int32(Status.POOR_APPROXIMATION) if poor else info.status
    num_gradients = num_gradients + info.num_gradients + max(config.num_draws, MIN_JUDGED_DRAWS)
    # Look for an improper tail from the end of the ascent, since the fit may have diverged; and always, since k-hat of
    # draws that never reach a tail does not show that it is too heavy to integrate
    start = jax.tree.map(lambda leaf: leaf[None], position)
    status, reason = tails.doubted(status, logdensity_fn, start, prior=target.prior, always=True)
    info = info._replace(khat=draws.khat, identity=draws.identity, num_gradients=num_gradients, status=status)
    description = reason or (details(info) if int(status) != Status.OK else "")
    if interrupted:
        status, description = engine.interrupted_part(
            "the search for the Gaussian may not have ended", status, description
        )
        info = info._replace(status=jnp.int32(status))
    engine.warn(status, description, name)
    if poor:
        return engine.finish(target, draws.gaussian, initial_positions, info)
    return engine.finish(target, draws.positions, initial_positions, info, log_weights=draws.log_weights)
