r"""Feynman-Kac correctors: score-based samplers of powers and products of distributions.

Given are the scores :math:`s_i(x, t)` of K diffusion models with one noising process; the target is

.. math:: q \propto \prod_i p_i^{a_i}: \quad p^\beta;\; p_1 p_2;\; p_1^{1-w} p_2^{w}\ (\text{guidance}).

The reverse diffusion with the summed score :math:`S=\sum_i a_i s_i` does not sample it: the sum is the score of
:math:`q_\sigma\propto\prod_i p_{i,\sigma}^{a_i}` at every noise level, but the :math:`q_\sigma` are not the marginals
of one noising process. Particles that follow it need weights. In the coordinates y = x / signal(t) noise of variance
:math:`\sigma^2` is added to the data and nothing else. Let u be the variance removed so far,
:math:`du=-d\sigma^2`. The heat equation :math:`\partial_u p_i=-\tfrac12\Delta p_i` gives

.. math:: \partial_u\log\prod_i p_i^{a_i} = -\tfrac12\Big(\nabla\!\cdot S + \sum_i a_i|s_i|^2\Big),

and weighted particles :math:`dY = v\,du + dW_u,\; d\log w = h\,du` have density
:math:`\partial_u\rho = -\nabla\!\cdot(v\rho)+\tfrac12\Delta\rho + h\rho`. With :math:`v = S + b\,(y-m)` and
:math:`\rho=\prod_i p_i^{a_i}` the divergences of the scores cancel (d is the dimension):

.. math:: h = \tfrac12\Big(|S|^2 - \sum_i a_i |s_i|^2\Big) + b\,\big(d + (y-m)\cdot S\big).

Here :math:`b=(A-1)/2V`, where :math:`A=\sum_i a_i`, and m and :math:`V=\sigma^2+\tau^2` are center and variance of the
noised data. As long as the experts are about normal, h is the same for all particles and :math:`z=(y-m)/\sqrt V` is an
Ornstein-Uhlenbeck process at its stationary distribution N(0, 1/A), whose steps are exact.

Only scores are evaluated. The normalizing constant :math:`\int\prod_i p_i^{a_i}` is estimated too.

References:
    Skreta, Akhound-Sadegh, Ohanesian, Bondesan, Aspuru-Guzik, Doucet, Brekelmans, Tong and Neklyudov (2025),
    "Feynman-Kac correctors in diffusion", propositions 3.1 to 3.3.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from probinfer.core.algorithms import as_partial
from probinfer.core.arguments import check_key
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey, field, pytree
from probinfer.smc.diffusion.noise import VarianceExploding, VariancePreserving
from probinfer.smc.filtering.filter import Result, check_counts, particle_filter
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac

__all__ = ["Composition", "composed", "drift_and_rate", "sample_composed"]

_NUM_PROBES = 32  # points at which scores are evaluated to find center and scale of the data


@pytree
class Composition:
    """The experts, their exponents and the noise levels.

    Attributes:
        diffusion: how the data were noised.
        score_fns: K functions (x, t) -> score.
        exponents: (K,).
        noise_levels: (T,) decreasing standard deviations of the noise, in units of the data.
        center: m, of shape ``shape``.
        data_variance: tau^2, a scalar.
        corrected: whether particles are weighed.
        shape: of one position.
    """

    diffusion: Any
    score_fns: Any
    exponents: Any
    noise_levels: Any
    center: Any
    data_variance: Any
    corrected: Any
    shape: tuple = field(static=True)


def composed(
    diffusion: Any,
    score_fns: Any,
    exponents: Any,
    shape: tuple[int, ...],
    num_steps: Any,
    *,
    corrected: bool = True,
) -> BatchedFeynmanKac:
    r"""Return the model whose last particles have the density :math:`\prod_i p_i^{a_i}`, for ``particle_filter``.

    Step 0 draws from the normal distribution that :math:`q_\sigma` tends to at large noise. Each further step lowers
    the noise by the same factor, by Heun's rule for the nonlinear part: two evaluations of every score per particle.
    For smooth scores the error of the distribution falls with the square of the number of steps. The experts are
    sampled with the smallest noise added to them, in units of the data. At the largest noise they are taken as
    isotropic normal distributions, with a relative error of the order (scale of the data / largest noise)^2. Center
    and scale of the data are found from the scores; they affect the variance of the weights, not the target.

    Memory: N positions and K scores each.

    Args:
        diffusion: how the data of all the experts were noised: ``VarianceExploding`` or ``VariancePreserving``.
        score_fns: ``score_fn(x, t)``, the gradient in x of the log density of the noised data, for one x of the given
            shape, in the coordinates and at the times of ``diffusion``. Data are bound with ``jax.tree_util.Partial``.
        exponents: (K,); single ones may be negative, their sum must be positive.
        shape: of a position.
        num_steps: T, how many noise levels; give the same number to ``particle_filter``.
        corrected: False: particles are not weighed, and do not sample the product; for comparison.

    Returns:
        The model. Its particles are in units of the data, (N, *shape); its evidence is the integral of the product.

    Raises:
        TypeError: ``diffusion`` is not a noising process, a score not a function, or ``num_steps`` not an integer.
        ValueError: no scores, not one exponent for each, a sum of exponents that is not positive and finite, a score
            of another shape, or steps too long for Heun's rule to be stable.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probinfer import smc
        >>> def score(x, t):  # of N(0, 1) with noise t
        ...     return -x / (1 + t**2)
        >>> model = smc.composed(smc.VarianceExploding(0.01, 50.0), [score], [4.0], (1,), 60)
        >>> result = smc.particle_filter(jax.random.key(0), model, 60, 4000, store="none")
        >>> bool(abs(jnp.std(result.particles) - 0.5) < 0.1)  # N(0, 1)^4 is N(0, 1/4), unnormalized
        True
    """
    if not isinstance(diffusion, (VarianceExploding, VariancePreserving)):
        raise TypeError(
            f"diffusion must be a smc.VarianceExploding or smc.VariancePreserving, got {type(diffusion).__name__}"
        )
    check_counts(num_steps=num_steps)
    dtype = jnp.result_type(float)
    exponents = jnp.asarray(exponents, dtype)
    score_fns = _checked_scores(score_fns, exponents, tuple(shape), dtype)
    low, high = diffusion.noise_range()
    _check_exponents(exponents, float(high) / float(low), num_steps)
    composition = Composition(
        diffusion=diffusion,
        score_fns=score_fns,
        exponents=exponents,
        noise_levels=jnp.geomspace(high, low, num_steps, dtype=dtype),
        center=jnp.zeros(tuple(shape), dtype),
        data_variance=jnp.zeros((), dtype),
        corrected=jnp.asarray(corrected),
        shape=tuple(shape),
    )
    composition = _fit_location_and_scale(composition)
    return BatchedFeynmanKac(Partial(_init, composition), Partial(_extend, composition))


def sample_composed(
    key: Any,
    diffusion: Any,
    score_fns: Any,
    exponents: Any,
    shape: tuple[int, ...],
    num_steps: Any,
    num_particles: Any,
    *,
    corrected: bool = True,
) -> Result:
    r"""Sample :math:`\prod_i p_i^{a_i}` by weighted particles and estimate its integral: ``composed``, and the filter.

    Args:
        key: random key.
        diffusion: as in ``composed``, like the rest.
        score_fns: K functions (x, t) -> score.
        exponents: (K,).
        shape: of a position.
        num_steps: T.
        num_particles: N.
        corrected: whether particles are weighed.

    Returns:
        ``particles`` (N, *shape), ``log_weights`` (N,), ``log_evidence`` and ``status``; nothing of the past is stored.

    Raises:
        TypeError: ``key`` is not a key; as ``composed``.
        ValueError: as ``composed`` and ``particle_filter``.
    """
    check_key(key)
    model = composed(diffusion, score_fns, exponents, shape, num_steps, corrected=corrected)
    return particle_filter(key, model, num_steps, num_particles, store="none")


def drift_and_rate(
    composition: Composition, y: Float[Array, "*event"], noise_level: Float[Array, ""]
) -> tuple[Float[Array, "*event"], Float[Array, ""]]:
    r"""Return v and h of the equations of the module at a noise level.

    Args:
        composition: experts and exponents.
        y: position, in units of the data.
        noise_level: standard deviation of the noise, in the same units.
    """
    scores = _scores(composition, y, noise_level)
    exponents, dimension = composition.exponents, math.prod(composition.shape)
    summed_score = jnp.tensordot(exponents, scores, 1)
    squares = jnp.sum(scores.reshape(scores.shape[0], -1) ** 2, axis=1)
    rate = 0.5 * (jnp.sum(summed_score**2) - jnp.sum(exponents * squares))
    centered = y - composition.center
    b = 0.5 * (jnp.sum(exponents) - 1) / (noise_level**2 + composition.data_variance)
    return summed_score + b * centered, rate + b * (dimension + jnp.sum(centered * summed_score))


def _scores(composition: Composition, y: Array, noise_level: Array) -> Array:
    """Return the scores (K, ...) in units of the data: that of y = x / signal is signal * s(signal * y)."""
    time = composition.diffusion.time(noise_level)
    signal = composition.diffusion.signal(time)
    return signal * jnp.stack([score_fn(signal * y, time) for score_fn in composition.score_fns])


@jax.jit
def _fit_location_and_scale(composition: Composition) -> Composition:
    r"""Return the composition with center m and data variance: S is about :math:`-A(y-m)/V` if noise hides the data.

    From the largest noise down, slope and zero of S are fitted at points of :math:`N(m, V/A)`, until the fitted
    variance of the data exceeds that of the noise.
    """
    total = jnp.sum(composition.exponents)
    dtype = composition.noise_levels.dtype
    half = jax.random.normal(jax.random.key(0), (_NUM_PROBES // 2, *composition.shape), dtype)
    probes = jnp.concatenate([half, -half])

    def update(carry: tuple, noise_level: Array) -> tuple[tuple, None]:
        center, data_variance, finished = carry
        variance = noise_level**2 + data_variance
        scale = jnp.sqrt(variance / total)
        scores = jax.vmap(lambda probe: _scores(composition, center + scale * probe, noise_level))(probes)
        summed_score = jnp.tensordot(scores, composition.exponents, ((1,), (0,)))
        slope = jnp.sum(summed_score * probes) / (scale * jnp.sum(probes**2))
        fitted = jnp.maximum(-total / slope - noise_level**2, 0)
        # a positive slope: the modes have separated, so that the data are wider than the noise
        fitted = jnp.where(slope < 0, fitted, jnp.maximum(data_variance, noise_level**2))
        usable = ~finished & jnp.isfinite(fitted) & jnp.all(jnp.isfinite(summed_score))
        center = jnp.where(usable, center + jnp.mean(summed_score, axis=0) * variance / total, center)
        data_variance = jnp.where(usable, fitted, data_variance)
        return (center, data_variance, finished | (data_variance >= noise_level**2)), None

    start = composition.center, composition.data_variance, jnp.zeros((), bool)
    (center, data_variance, _), _ = jax.lax.scan(update, start, composition.noise_levels)
    return dataclasses.replace(composition, center=center, data_variance=data_variance)


def _init(
    composition: Composition, key: PRNGKey, num_particles: int, reference: ArrayTree = None
) -> tuple[Array, Array]:
    r"""At the largest noise expert i is about :math:`N(m_i, V I)`, where :math:`m_i=m+V s_i(m)`."""
    _refuse_reference(reference)
    noise_level, exponents = composition.noise_levels[0], composition.exponents
    dimension = math.prod(composition.shape)
    variance, total = noise_level**2 + composition.data_variance, jnp.sum(exponents)

    # The product of the experts is N(m + shift, V/A) times its integral
    shifts = variance * _scores(composition, composition.center, noise_level)
    shift = jnp.tensordot(exponents, shifts, 1) / total
    squares = jnp.sum(shifts.reshape(shifts.shape[0], -1) ** 2, axis=1)
    disagreement = (jnp.sum(exponents * squares) - total * jnp.sum(shift**2)) / variance
    twice_log_integral = (
        dimension * ((1 - total) * jnp.log(2 * jnp.pi * variance) - jnp.log(total)) - disagreement
    )

    noise = jax.random.normal(key, (num_particles, *composition.shape), noise_level.dtype)
    particles = composition.center + shift + jnp.sqrt(variance / total) * noise
    log_weights = jnp.broadcast_to(0.5 * twice_log_integral, (num_particles,))
    return particles, jnp.where(composition.corrected, log_weights, 0)


def _extend(
    composition: Composition, key: PRNGKey, particles: Array, t: Array, reference: ArrayTree = None
) -> tuple[Array, Array]:
    r"""In :math:`z=(y-m)/\sqrt V`: :math:`dz=(-\tfrac A2z+R)\,d\lambda+dB,\;d\lambda=-d\log V`.

    R is zero for normal experts. The linear part is solved exactly. Heun's rule for R and the log weight is of weak
    order 2, since the noise is additive.
    """
    _refuse_reference(reference)
    center, total = composition.center, jnp.sum(composition.exponents)
    noise_levels = composition.noise_levels[t - 1], composition.noise_levels[t]
    scales = [jnp.sqrt(noise_level**2 + composition.data_variance) for noise_level in noise_levels]
    step_size = 2 * jnp.log(scales[0] / scales[1])
    # Ornstein-Uhlenbeck: factor of z, integrated factor of R, standard deviation of the noise
    decay, gain = jnp.exp(-total * step_size / 2), -jnp.expm1(-total * step_size / 2) * 2 / total
    noises = jax.random.normal(key, particles.shape, particles.dtype) * jnp.sqrt(
        -jnp.expm1(-total * step_size) / total
    )

    def remainder_and_rate(z: Array, i: int) -> tuple[Array, Array]:
        drift, rate = drift_and_rate(composition, center + scales[i] * z, noise_levels[i])
        return scales[i] * drift + 0.5 * (total + 1) * z, scales[i] ** 2 * rate

    def heun_step(y: Array, noise: Array) -> tuple[Array, Array]:
        z = (y - center) / scales[0]
        linear = decay * z + noise
        remainder, rate = remainder_and_rate(z, 0)
        next_remainder, next_rate = remainder_and_rate(linear + gain * remainder, 1)
        z = linear + 0.5 * gain * (remainder + next_remainder)
        return center + scales[1] * z, 0.5 * step_size * (rate + next_rate)

    propagated, increments = jax.vmap(heun_step)(particles, noises)
    return propagated, jnp.where(composition.corrected, increments, 0)


def _refuse_reference(reference: ArrayTree) -> None:
    if reference is not None:
        raise ValueError(
            "a composed sampler cannot follow a reference path: its weights depend on the noise, not on positions "
            "alone; use particle_filter"
        )


def _checked_scores(score_fns: Any, exponents: Array, shape: tuple, dtype: Any) -> tuple:
    score_fns = tuple(score_fns) if isinstance(score_fns, (tuple, list)) else (score_fns,)
    if not all(callable(fn) for fn in score_fns):
        raise TypeError("score_fns must be functions (x, t) -> score, in a list; bind data with Partial")
    if not score_fns or exponents.shape != (len(score_fns),):
        raise ValueError(
            f"expected one exponent for each of the scores, got {len(score_fns)} scores and exponents of shape "
            f"{exponents.shape}"
        )
    partials = tuple(as_partial(fn) for fn in score_fns)
    x_and_t = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((), dtype)
    for i, fn in enumerate(partials):
        score = jax.eval_shape(fn, *x_and_t)
        if getattr(score, "shape", None) != shape:
            raise ValueError(
                f"score {i} must have the shape of a position, {shape}, got {score}; it is called for one position at "
                "a time"
            )
    return partials


def _check_exponents(exponents: Array, noise_ratio: float, num_steps: int) -> None:
    """Check that Heun's rule is stable.

    The drift of the noise alone is -a y / sigma^2: a (1 - r^2) must be at most 2, with r the ratio of successive noise
    levels. ``noise_ratio`` is that of the largest level to the smallest.
    """
    if isinstance(exponents, jax.core.Tracer):
        return
    values = np.asarray(exponents, float)
    if not (np.all(np.isfinite(values)) and np.sum(values) > 0):
        raise ValueError(
            f"the exponents must be finite and their sum positive, or the product has no integral, got {values}"
        )
    total = float(np.sum(np.maximum(values, 0)))
    min_steps = 2 if total <= 2 else math.ceil(1 - 2 * math.log(noise_ratio) / math.log1p(-2 / total))
    if num_steps < min_steps:
        raise ValueError(
            f"num_steps must be at least {min_steps} for the exponents {values} and noise that falls by a factor of "
            f"{noise_ratio:.3g}, got {num_steps}: longer steps are unstable"
        )
