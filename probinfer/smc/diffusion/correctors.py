r"""Feynman-Kac correctors: score-based samplers of powers and products of the laws their scores belong to.

Scores :math:`s_i(x, t)` of K diffusion models, noised in one way, are given; wanted is the law

.. math:: q \propto \prod_i p_i^{a_i}: \quad p^\beta;\; p_1 p_2;\; p_1^{1-w} p_2^{w}\ (\text{guidance}).

To follow the reverse diffusion with the summed score :math:`S=\sum_i a_i s_i` does not sample it: the sum is the
score of :math:`q_\sigma\propto\prod_i p_{i,\sigma}^{a_i}` at every noise level, but the laws :math:`q_\sigma` are not
those of one noising process. Particles that follow it need weights. In the coordinates y = x / signal(t), where
noise of variance :math:`\sigma^2` is added to the data and nothing else, let u be the variance taken away so far,
:math:`du=-d\sigma^2`. The heat equation :math:`\partial_u p_i=-\tfrac12\Delta p_i` gives

.. math:: \partial_u\log\prod_i p_i^{a_i} = -\tfrac12\Big(\nabla\!\cdot S + \sum_i a_i|s_i|^2\Big),

and weighted particles :math:`dY = v\,du + dW_u,\; d\log w = h\,du` have density
:math:`\partial_u\rho = -\nabla\!\cdot(v\rho)+\tfrac12\Delta\rho + h\rho`. With :math:`v = S + b\,(y-m)` and
:math:`\rho=\prod_i p_i^{a_i}` the divergences of the scores cancel (d is the dimension):

.. math:: h = \tfrac12\Big(|S|^2 - \sum_i a_i |s_i|^2\Big) + b\,\big(d + (y-m)\cdot S\big).

Here :math:`b=(A-1)/2V`, where :math:`A=\sum_i a_i` and m and :math:`V=\sigma^2+\tau^2` are centre and variance of the
noised data: while the experts are about normal, h is then the same for all particles and
:math:`z=(y-m)/\sqrt V` an Ornstein-Uhlenbeck process at its stationary law N(0, 1/A), which is stepped exactly.

Only scores are evaluated. The normaliser :math:`\int\prod_i p_i^{a_i}` is estimated too.

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
from probinfer.core.errors import check_key
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey, field, pytree
from probinfer.smc.diffusion.noise import VarianceExploding, VariancePreserving
from probinfer.smc.filtering.filter import Result, check_counts, particle_filter
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac

__all__ = ["Composition", "composed", "drift_and_rate", "sample_composed"]

_PROBES = 32  # points at which scores are looked at to find centre and scale of the data


@pytree
class Composition:
    """What is composed, and along which noise levels.

    Attributes:
        diffusion: how the data were noised.
        score_fns: K functions (x, t) -> score.
        exponents: (K,).
        levels: (T,) falling standard deviations of the noise, in units of the data.
        centre: m, of shape ``shape``.
        width: tau^2, a scalar.
        corrected: whether particles are weighed.
        shape: of one position.
    """

    diffusion: Any
    score_fns: Any
    exponents: Any
    levels: Any
    centre: Any
    width: Any
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
    r"""Return the model whose last particles have the law :math:`\prod_i p_i^{a_i}`, for ``particle_filter``.

    Step 0 draws from the normal law that :math:`q_\sigma` tends to at large noise; each further step lowers the noise
    by the same factor, by Heun's rule for what is not normal: two evaluations of every score a particle. For smooth
    scores the error of the law falls with the square of the number of steps. The law reached is that of the experts
    with the smallest noise still on them, in units of the data; at the largest noise the experts are taken for round
    normal laws, a relative error of the order (scale of the data / largest noise)^2. Centre and scale of the data are
    found from the scores; they matter for the variance of the weights, not for the law.

    Memory: N positions and K scores each.

    Args:
        diffusion: how the data of all the experts were noised: ``VarianceExploding`` or ``VariancePreserving``.
        score_fns: ``score_fn(x, t)``, the gradient in x of the log density of the noised data, for one x of the given
            shape, in the coordinates and at the times of ``diffusion``. Data are bound with ``jax.tree_util.Partial``.
        exponents: (K,); negative ones are allowed, their sum is positive.
        shape: of a position.
        num_steps: T, how many noise levels; hand the same number to ``particle_filter``.
        corrected: False: particles are not weighed, which is not a sample of the product; to compare.

    Returns:
        The model. Its particles are in units of the data, (N, *shape); its evidence is the integral of the product.

    Raises:
        TypeError: ``diffusion`` or a score is something else, or ``num_steps`` no integer.
        ValueError: no scores, not one exponent each, a sum of exponents that is not positive and finite, a score of
            another shape, or steps too long for Heun's rule to be stable.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probinfer import smc
        >>> def score(x, t):  # of N(0, 1) with noise t
        ...     return -x / (1 + t**2)
        >>> model = smc.composed(smc.VarianceExploding(0.01, 50.0), [score], [4.0], (1,), 60)
        >>> result = smc.particle_filter(jax.random.key(0), model, 60, 4000, store="none")
        >>> bool(abs(jnp.std(result.particles) - 0.5) < 0.1)  # N(0, 1)^4 is N(0, 1/4), unnormalised
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
    levels = jnp.geomspace(high, low, num_steps, dtype=dtype)
    start = jnp.zeros(tuple(shape), dtype), jnp.zeros((), dtype)
    model = _located(
        Composition(diffusion, score_fns, exponents, levels, *start, jnp.asarray(corrected), tuple(shape))
    )
    return BatchedFeynmanKac(Partial(_init, model), Partial(_extend, model))


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
        ``particles`` (N, *shape), ``log_weights`` (N,), ``log_evidence`` and ``status``; nothing of the past is kept.

    Raises:
        TypeError: not a key, and as ``composed``.
        ValueError: as ``composed`` and ``particle_filter``.
    """
    check_key(key)
    model = composed(diffusion, score_fns, exponents, shape, num_steps, corrected=corrected)
    return particle_filter(key, model, num_steps, num_particles, store="none")


def drift_and_rate(
    model: Composition, y: Float[Array, "*event"], level: Float[Array, ""]
) -> tuple[Float[Array, "*event"], Float[Array, ""]]:
    r"""Return v and h of the module's equations at a noise level.

    Args:
        model: what is composed.
        y: position, in units of the data.
        level: standard deviation of the noise, in the same units.
    """
    scores = _scores(model, y, level)
    drift = jnp.tensordot(model.exponents, scores, 1)
    squares = jnp.sum(scores.reshape(scores.shape[0], -1) ** 2, axis=1)
    rate = 0.5 * (jnp.sum(drift**2) - jnp.sum(model.exponents * squares))
    centred = y - model.centre
    pull = 0.5 * (jnp.sum(model.exponents) - 1) / (level**2 + model.width)
    return drift + pull * centred, rate + pull * (math.prod(model.shape) + jnp.sum(centred * drift))


def _scores(model: Composition, y: Array, level: Array) -> Array:
    """Scores (K, ...) in units of the data: the density of y = x / signal has the score signal * s(signal * y)."""
    time = model.diffusion.time(level)
    signal = model.diffusion.signal(time)
    return signal * jnp.stack([score_fn(signal * y, time) for score_fn in model.score_fns])


@jax.jit
def _located(model: Composition) -> Composition:
    r"""Fill in centre and width: S is about :math:`-A(y-m)/V` where the noise is as wide as the data.

    From the largest noise down, slope and zero of S are fitted over points of :math:`N(m, V/A)`, until the width found
    is that of the noise.
    """
    total = jnp.sum(model.exponents)
    half = jax.random.normal(jax.random.key(0), (_PROBES // 2, *model.shape), model.levels.dtype)
    probes = jnp.concatenate([half, -half])

    def down(carry: tuple, level: Array) -> tuple[tuple, None]:
        centre, width, found = carry
        variance = level**2 + width
        spread = jnp.sqrt(variance / total)
        scores = jax.vmap(lambda probe: _scores(model, centre + spread * probe, level))(probes)
        drift = jnp.tensordot(scores, model.exponents, ((1,), (0,)))
        slope = jnp.sum(drift * probes) / (spread * jnp.sum(probes**2))
        fitted = jnp.maximum(-total / slope - level**2, 0)
        fitted = jnp.where(
            slope < 0, fitted, jnp.maximum(width, level**2)
        )  # the modes fall apart: wider than the noise
        usable = ~found & jnp.isfinite(fitted) & jnp.all(jnp.isfinite(drift))
        centre = jnp.where(usable, centre + jnp.mean(drift, axis=0) * variance / total, centre)
        width = jnp.where(usable, fitted, width)
        return (centre, width, found | (width >= level**2)), None

    (centre, width, _), _ = jax.lax.scan(down, (model.centre, model.width, jnp.zeros((), bool)), model.levels)
    return dataclasses.replace(model, centre=centre, width=width)


def _init(model: Composition, key: PRNGKey, num: int, reference: ArrayTree = None) -> tuple[Array, Array]:
    r"""At the largest noise expert i is about :math:`N(m_i, V I)`, where :math:`m_i=m+V s_i(m)`."""
    _refuse(reference)
    level, exponents = model.levels[0], model.exponents
    variance, total, dimension = level**2 + model.width, jnp.sum(exponents), math.prod(model.shape)
    shifts = variance * _scores(model, model.centre, level)
    shift = jnp.tensordot(exponents, shifts, 1) / total
    noise = jax.random.normal(key, (num, *model.shape), level.dtype)
    squares = jnp.sum(shifts.reshape(shifts.shape[0], -1) ** 2, axis=1)
    conflict = (jnp.sum(exponents * squares) - total * jnp.sum(shift**2)) / variance
    log_integral = dimension * ((1 - total) * jnp.log(2 * jnp.pi * variance) - jnp.log(total)) - conflict
    weights = jnp.broadcast_to(0.5 * log_integral, (num,))
    particles = model.centre + shift + jnp.sqrt(variance / total) * noise
    return particles, jnp.where(model.corrected, weights, 0)


def _extend(
    model: Composition, key: PRNGKey, particles: Array, t: Array, reference: ArrayTree = None
) -> tuple[Array, Array]:
    r"""In :math:`z=(y-m)/\sqrt V`: :math:`dz=(-\tfrac A2z+R)\,d\lambda+dB,\;d\lambda=-d\log V`; R = 0 for normal laws.

    The linear part is solved exactly. Heun's rule for R and the log weight is of weak order 2: the noise is additive.
    """
    _refuse(reference)
    levels, total = (model.levels[t - 1], model.levels[t]), jnp.sum(model.exponents)
    roots = [jnp.sqrt(level**2 + model.width) for level in levels]
    span = 2 * jnp.log(roots[0] / roots[1])
    decay, gain = jnp.exp(-total * span / 2), -jnp.expm1(-total * span / 2) * 2 / total
    noises = jax.random.normal(key, particles.shape, particles.dtype) * jnp.sqrt(
        -jnp.expm1(-total * span) / total
    )

    def rest(z: Array, which: int) -> tuple[Array, Array]:
        drift, rate = drift_and_rate(model, model.centre + roots[which] * z, levels[which])
        return roots[which] * drift + 0.5 * (total + 1) * z, roots[which] ** 2 * rate

    def one(y: Array, noise: Array) -> tuple[Array, Array]:
        z = (y - model.centre) / roots[0]
        free = decay * z + noise
        here, rate = rest(z, 0)
        there, rate_there = rest(free + gain * here, 1)
        z = free + 0.5 * gain * (here + there)
        return model.centre + roots[1] * z, 0.5 * span * (rate + rate_there)

    moved, increments = jax.vmap(one)(particles, noises)
    return moved, jnp.where(model.corrected, increments, 0)


def _refuse(reference: ArrayTree) -> None:
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
    given = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((), dtype)
    for number, fn in enumerate(partials):
        found = jax.eval_shape(fn, *given)
        if getattr(found, "shape", None) != shape:
            raise ValueError(
                f"score {number} must have the shape of a position, {shape}, got {found}; it is called for one "
                "position at a time"
            )
    return partials


def _check_exponents(exponents: Array, span: float, num_steps: int) -> None:
    """The drift of the noise alone is -a y / sigma^2: Heun's rule is stable up to a (1 - ratio^2) = 2."""
    if isinstance(exponents, jax.core.Tracer):
        return
    values = np.asarray(exponents, float)
    if not (np.all(np.isfinite(values)) and np.sum(values) > 0):
        raise ValueError(
            f"the exponents must be finite and their sum positive, or the product has no integral, got {values}"
        )
    total = float(np.sum(np.maximum(values, 0)))
    least = 2 if total <= 2 else math.ceil(1 - 2 * math.log(span) / math.log1p(-2 / total))
    if num_steps < least:
        raise ValueError(
            f"num_steps must be at least {least} for the exponents {values} and noise that falls by a factor of "
            f"{span:.3g}, got {num_steps}: longer steps are unstable"
        )
