"""LAWGD as an engine: a start where the eigenfunctions are known, and the run that all coin samplers share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.coin.cloud.particles import unravel_particles
from probinfer.coin.engine.svgd import check_particles, sample_particles
from probinfer.coin.laplacian.direction import algorithm_of, evaluate_spectrum, nearest_known, spectrum_of
from probinfer.coin.laplacian.spectrum import Spectrum
from probinfer.core.binding import Bound
from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, PRNGKey, field, pytree
from probinfer.inference import engine, tails
from probinfer.inference.posterior import Posterior
from probinfer.running.checkpoint import Checkpoint
from probinfer.targets import Target

__all__ = ["LAWGD"]


@pytree
class LAWGD:
    """Laplacian-adjusted Wasserstein gradient descent without a learning rate, for one or two dimensions.

    Its particles are far more evenly spread than independent draws, and each mode gets the right number of them. The
    spectrum at the start takes a few ten thousand evaluations of the density on a grid.

    Args:
        num_particles: at most 450 in one dimension, 150 in two.
        max_steps: maximal number of steps; the stopping rule of ``coin.SVGD`` may end the run earlier.
        polish: as in ``coin.SVGD``.
        bet: as in ``coin.lawgd``.

    References:
        Chewi, Le Gouic, Lu, Maunu and Rigollet (2020), "SVGD as a kernelized Wasserstein gradient flow of the
        chi-squared divergence", section 4.
    """

    num_particles: int = field(static=True, default=100)
    max_steps: int = field(static=True, default=1024)
    polish: str | None = field(static=True, default=None)
    bet: Any = field(default=None)

    def __post_init__(self):
        """Check the settings.

        Raises:
            TypeError: A count is not an integer.
            ValueError: A count is out of range, or the polish is unknown.
        """
        check_particles(self)

    def sample(
        self,
        key: PRNGKey,
        target: Target,
        *,
        progress: bool | str | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Carry particles to the posterior of an exact target of one or two dimensions.

        They start from a normal distribution with about its first two moments.

        Returns:
            A posterior of one chain, without a log evidence; its ``info`` is that of ``coin.SVGD``.

        Raises:
            TypeError: the target estimates its density from minibatches.
            ValueError: There are more than two dimensions, or too many particles.
            NumericalError: The density is improper, its log is NaN, or its tails are too heavy for a grid.

        Warns:
            ConvergenceWarning: as ``coin.SVGD``.
        """
        engine.check_target(key, target, "LAWGD")
        key_search, key = jax.random.split(key)
        positions = target.init(key_search, self.num_particles)
        spectrum = spectrum_of(target.logdensity_fn, positions)
        template = jax.tree.map(lambda leaf: leaf[0], positions)
        near = dataclasses.replace(target, draw_fn=Bound(_draw, spectrum, template), start=None)
        try:
            return sample_particles(
                self, lambda fn: algorithm_of(fn, spectrum, self.bet), key, near, progress, checkpoint
            )
        except ValueError as error:  # too few particles where the spectrum is known, as on an endless ridge
            reason = "" if target.prior is not None else tails.improper(target.logdensity_fn, positions)
            if not reason:
                raise
            status = Status.IMPROPER_DENSITY
            raise NumericalError(f"LAWGD: {reason}; {advice(status)}", status) from error


def _draw(spectrum: Spectrum, template: ArrayTree, key: PRNGKey, attempt: Array) -> ArrayTree:
    """Draw from a normal with the moments of the density; where that is negligible, move to the nearest known point."""
    key_draw, key_shift = jax.random.split(jax.random.fold_in(key, attempt))
    w = jax.random.normal(key_draw, spectrum.center.shape, spectrum.center.dtype)
    shift = jax.random.uniform(key_shift, w.shape, w.dtype, -0.5, 0.5)  # so that no two particles coincide
    row = spectrum.center + spectrum.scale * w
    known = evaluate_spectrum(spectrum, row[None])[2][0]
    home = nearest_known(spectrum, w[None])[0] + shift * spectrum.spacing
    return unravel_particles(template, spectrum.center + spectrum.scale * jnp.where(known, w, home))
