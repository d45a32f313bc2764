"""Gaussian variational inference as engines: weighted draws of the closest Gaussian, and what is known of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

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
from probinfer.vi.fitting import Problem, first_frame, fit, power_of_two
from probinfer.vi.report import details, refuse_improper
from probinfer.vi.weighing import FEWEST, weighted_draws

__all__ = ["FullRank", "MeanField"]

_BLOCK = 32


@pytree
class MeanField:
    """The Gaussian with independent unconstrained coordinates that is closest in KL(q || p), and weighted draws of it.

    The draws come from the Gaussian with wider tails (in every second one a coordinate is drawn from a wide Student t
    law) and carry Pareto-smoothed importance weights, so that ``summary``, ``expectation``, ``resample`` and
    ``predictive`` are those of the posterior, not of the Gaussian: what they promise, :class:`VIInfo` says. Averages of
    ``draws`` themselves are wrong; ``resample`` makes equal weights. The Gaussian is in ``info``. Where weights mend
    nothing, the draws are the Gaussian's, of equal weights, and the status is ``POOR_APPROXIMATION``.

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
            A posterior of one chain of weighted draws (of equal weights where the status is ``POOR_APPROXIMATION``),
            without a log evidence; its ``info`` is a :class:`VIInfo`.

        Raises:
            TypeError: not a key, not a target, or a minibatch target.
            NumericalError: the log density is not finite around the starting point.

        Warns:
            ConvergenceWarning: the gap did not close, the optimiser stalled, or weights cannot mend the approximation;
                or Ctrl-C ended the search early.
        """
        return _sample(key, target, self, False, progress)


@pytree
class FullRank:
    """The Gaussian with any covariance that is closest in KL(q || p), with weighted draws as in :class:`MeanField`.

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
    with bars.task(name, None, progress) as bar, interrupts.deferred() as stop:
        seed = int(jax.random.bits(key_base))
        starting_float = engine.to_default_dtype(starting)
        dimension = sum(leaf.size for leaf in jax.tree.leaves(starting))
        batch = power_of_two(max(16, 4 * dimension)) if full else 2
        sample = jnp.asarray(gaussian.base_sample(seed, dimension, batch, batch))
        frame, position, spent = interrupts.wait(first_frame(logdensity_fn, starting_float, sample, full))
        problem = Problem(logdensity_fn, position, 1 if mode == "map" else _BLOCK)
        try:
            frame, info = fit(problem, frame, config.max_samples, seed, key_fresh, bar, stop)
        except NumericalError as error:
            if target.prior is None:
                refuse_improper(name, logdensity_fn, position, error)
            raise
        drawn = interrupts.wait(weighted_draws(problem, frame, key_draws, config.num_draws))
        early = stop.requested
    poor = bool(drawn.poor)
    status = jnp.int32(Status.POOR_APPROXIMATION) if poor else info.status
    spent = spent + info.num_gradients + max(config.num_draws, FEWEST)
    start = jax.tree.map(lambda leaf: leaf[None], position)  # the fit itself may have gone beyond all numbers
    # k-hat of draws that never went there does not see a tail that is too heavy to integrate
    status, found = tails.doubted(status, logdensity_fn, start, prior=target.prior, always=True)
    info = info._replace(khat=drawn.khat, identity=drawn.identity, num_gradients=spent, status=status)
    said = found or (details(info) if int(status) != Status.OK else "")
    if early:
        status, said = engine.part("the Gaussian may be that of a search that had not ended", status, said)
        info = info._replace(status=jnp.int32(status))
    engine.warn(status, said, name)
    if poor:
        return engine.finish(target, drawn.gaussian, starting, info)
    return engine.finish(target, drawn.positions, starting, info, log_weights=drawn.log_weights)
