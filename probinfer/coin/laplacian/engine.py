"""LAWGD as an engine: a start where the density is known, the algorithm, and the report of all coin samplers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.coin.cloud.particles import unravel_particles
from probinfer.coin.engine.svgd import check_particles, sample_particles
from probinfer.coin.laplacian.direction import algorithm_of, evaluate_spectrum, spectrum_of
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

    Its particles are far better spread than independent draws, and find their number in each mode. It costs a spectrum
    at the start, by a few ten thousand evaluations of the density on a grid.

    Args:
        num_particles: 450 at most in one dimension, 150 in two.
        max_steps: the most steps; the rule of ``coin.SVGD`` may end the run before.
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
            TypeError: a count is not an integer.
            ValueError: a count out of range, or an unknown polish.
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
        """Carry particles from about the first two moments of the posterior to the posterior.

        Args:
            key: random key.
            target: exact, of one or two dimensions.
            progress: a bar; ``None`` means on a terminal.
            checkpoint: where to keep checkpoints; the same call continues from there to the same particles.

        Returns:
            A posterior of one chain, without a log evidence; its ``info`` is that of ``coin.SVGD``.

        Raises:
            TypeError: not a key or not a target, or a target that estimates its density from minibatches.
            ValueError: more than two dimensions, or too many particles.
            NumericalError: the density is improper, its log is NaN, or its tails are too heavy for a grid.

        Warns:
            ConvergenceWarning: as ``coin.SVGD``.
        """
        engine.check(key, target, "LAWGD")
        key_search, key = jax.random.split(key)
        positions = target.init(key_search, self.num_particles)
        spectrum = spectrum_of(target.logdensity_fn, positions)
        template = jax.tree.map(lambda leaf: leaf[0], positions)
        near = dataclasses.replace(target, draw_fn=Bound(_draw, spectrum, template), start=None)
        try:
            return sample_particles(
                self, lambda fn: algorithm_of(fn, spectrum, self.bet), key, near, progress, checkpoint
            )
        except ValueError as error:  # no particle is where the spectrum is known: a ridge without an end
            said = "" if target.prior is not None else tails.improper(target.logdensity_fn, positions)
            if not said:
                raise
            status = Status.IMPROPER_DENSITY
            raise NumericalError(f"LAWGD: {said}; {advice(status)}", status) from error


def _draw(spectrum: Spectrum, template: ArrayTree, key: PRNGKey, attempt: Array) -> ArrayTree:
    """A normal draw with the moments of the density, from where it is negligible moved to the nearest known place."""
    key_draw, key_shift = jax.random.split(jax.random.fold_in(key, attempt))
    w = jax.random.normal(key_draw, spectrum.center.shape, spectrum.center.dtype)
    shift = jax.random.uniform(key_shift, w.shape, w.dtype, -0.5, 0.5)  # no two particles at one place
    row = spectrum.center + spectrum.scale * w
    known = evaluate_spectrum(spectrum, row[None])[2][0]
    last = jnp.asarray(spectrum.rows.shape) - 1
    index = jnp.clip(jnp.round((w - spectrum.origin) / spectrum.spacing), 0, last).astype(jnp.int32)
    home = spectrum.homes[tuple(index)] + shift * spectrum.spacing
    found = spectrum.center + spectrum.scale * jnp.where(known, w, home)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), template)
    return unravel_particles(one, found)
