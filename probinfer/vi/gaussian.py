"""Gaussians in unconstrained space, and their evidence lower bound on a fixed sample.

The approximation is ``x = c + S (a + T z)`` with ``z`` standard normal. The location ``c`` and the scale ``S`` (a
vector for mean-field, a lower triangle for full rank) are fixed during an optimization; the shift ``a`` and the lower
triangle ``T`` with a positive diagonal are optimized, from zero and the identity. If ``S S^T`` is near the covariance
the problem is well conditioned, whatever the scales of the target.

The bound ``E log p(x) + log |S T| + d/2 log(2 pi e)`` is averaged over ``z_1 ... z_M``, the same at every evaluation,
so that it is a deterministic function, and L-BFGS needs no learning rate.

References:
    Giordano, Ingram and Broderick (2024), "Black box variational inference with a deterministic objective".
    Burroni, Domke and Sheldon (2023), "Sample average approximation for black-box VI".

Draws that are to be weighted come from a wider distribution, :func:`widened`: a Gaussian fitted by KL(q || p) is too
narrow where p has a longer tail, and has too few draws there for weights to correct.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats
from jax.flatten_util import ravel_pytree

from probinfer.core.types import Array, ArrayTree, Float, Int, PRNGKey, Scalar

__all__ = [
    "GaussianUpdate",
    "VariationalGaussian",
    "apply_update",
    "base_sample",
    "draw",
    "identity_update",
    "log_density",
    "log_widened",
    "negative_bound",
    "widened",
]

_DEGREES, _WIDENING = (
    4.0,
    1.5,
)  # of the Student t distribution in half of the widened draws; in standard deviations
_SOBOL_LIMIT = scipy.stats.qmc.Sobol.MAXDIM


class VariationalGaussian(NamedTuple):
    """A Gaussian: ``x = c + S z`` with z standard normal.

    Attributes:
        loc: the location c.
        scale: S, standard deviations (mean-field) or a lower triangle (full rank).
    """

    loc: Float[Array, " d"]
    scale: Float[Array, " d"] | Float[Array, "d d"]


class GaussianUpdate(NamedTuple):
    """What is optimized: ``x = c + S (a + T z)``.

    Attributes:
        shift: a.
        log_diagonal: logarithm of the diagonal of T.
        lower: strict lower triangle of T, by rows; empty for mean-field.
    """

    shift: Float[Array, " d"]
    log_diagonal: Float[Array, " d"]
    lower: Float[Array, " triangle"]


def identity_update(q: VariationalGaussian) -> GaussianUpdate:
    """Return the update that changes nothing."""
    dimension = q.loc.shape[0]
    size = dimension * (dimension - 1) // 2 if q.scale.ndim == 2 else 0
    zeros = jnp.zeros(dimension, q.loc.dtype)
    return GaussianUpdate(zeros, zeros, jnp.zeros(size, q.loc.dtype))


def apply_update(q: VariationalGaussian, update: GaussianUpdate) -> VariationalGaussian:
    """Return the Gaussian with location ``c + S a`` and scale ``S T``."""
    loc = q.loc + _times(q.scale, update.shift)
    if q.scale.ndim == 1:
        return VariationalGaussian(loc, q.scale * jnp.exp(update.log_diagonal))
    return VariationalGaussian(loc, jnp.tril(q.scale @ _triangle(update)))


def draw(q: VariationalGaussian, key: PRNGKey, num: int) -> Float[Array, "num d"]:
    """Draw from a Gaussian.

    Args:
        q: the Gaussian.
        key: random key.
        num: number of draws.
    """
    noise = jax.random.normal(key, (num, q.loc.shape[0]), q.loc.dtype)
    return q.loc + (noise * q.scale if q.scale.ndim == 1 else noise @ q.scale.T)


def log_density(q: VariationalGaussian, draws: Float[Array, "num d"]) -> Float[Array, " num"]:
    """Return the normalized log density of a Gaussian.

    Args:
        q: the Gaussian.
        draws: flattened positions.
    """
    offset = draws - q.loc
    if q.scale.ndim == 1:
        noise = offset / q.scale
    else:
        noise = jax.scipy.linalg.solve_triangular(q.scale, offset.T, lower=True).T
    normal = -0.5 * jnp.sum(noise**2, axis=1) - 0.5 * draws.shape[1] * float(np.log(2 * np.pi))
    return normal - _log_determinant(q.scale)


def widened(q: VariationalGaussian, key: PRNGKey, draws: Float[Array, "num d"]) -> Float[Array, "num d"]:
    r"""Widen draws of a Gaussian to draws of r, the proposal of a defensive importance sampler.

    In about every second draw one coordinate, chosen at random, is drawn again from 1.5 times a Student t distribution
    of four degrees of freedom in units of its standard deviation, and the others follow by their regression on it:

    .. math:: r(x) = q(x) \Big[\tfrac12 + \tfrac1{2d} \sum_k t(z_k) / \phi(z_k)\Big], \quad z_k = (x_k - c_k)/\sigma_k.

    So p/r is at most 2 p/q, and bounded along every coordinate in which p falls off no slower than this t distribution.

    Args:
        q: the Gaussian.
        key: random key.
        draws: from q.

    References:
        Hesterberg (1995), "Weighted average importance sampling and defensive mixture distributions"; Shaw (2006),
        "Sampling Student's T distribution - use of the inverse cumulative distribution function", for its quantile.
    """
    key_wide, key_coordinate, key_student = jax.random.split(key, 3)
    num, dimension = draws.shape
    coordinate = jax.random.randint(key_coordinate, (num,), 0, dimension)
    # The new value of the coordinate, and the old one
    new = _WIDENING * _student(jax.random.uniform(key_student, (num,), draws.dtype))
    old = jnp.take_along_axis(_standardized(q, draws), coordinate[:, None], axis=1)[:, 0]
    # The regression of all coordinates on it
    if q.scale.ndim == 1:
        slopes = jnp.zeros_like(draws).at[jnp.arange(num), coordinate].set(q.scale[coordinate])
    else:
        slopes = (q.scale @ q.scale.T)[coordinate] / _marginal_sd(q)[coordinate][:, None]
    wide = jax.random.bernoulli(key_wide, 0.5, (num,))
    return draws + jnp.where(wide, new - old, 0)[:, None] * slopes


def log_widened(q: VariationalGaussian, draws: Float[Array, "num d"]) -> Float[Array, " num"]:
    """Return the normalized log density of :func:`widened`.

    Args:
        q: the Gaussian.
        draws: flattened positions.
    """
    z = _standardized(q, draws)
    student = jax.scipy.stats.t.logpdf(z / _WIDENING, _DEGREES) - float(np.log(_WIDENING))
    # In log space: the ratio t / phi overflows in the tails
    log_mean_ratio = jax.nn.logsumexp(student - jax.scipy.stats.norm.logpdf(z), axis=1)
    log_mean_ratio = log_mean_ratio - float(np.log(z.shape[1]))
    log_mixture = jnp.logaddexp(jnp.zeros_like(log_mean_ratio), log_mean_ratio)
    return log_density(q, draws) + log_mixture - float(np.log(2))


def _student(uniform: Array) -> Array:
    """Return the quantile of the Student t distribution of four degrees of freedom, in closed form."""
    eps = jnp.finfo(uniform.dtype).eps
    u = jnp.clip(uniform, eps, 1 - eps)
    root = jnp.sqrt(4 * u * (1 - u))
    return jnp.sign(u - 0.5) * 2 * jnp.sqrt(jnp.maximum(jnp.cos(jnp.arccos(root) / 3) / root - 1, 0))


def _standardized(q: VariationalGaussian, draws: Array) -> Array:
    return (draws - q.loc) / _marginal_sd(q)


def _marginal_sd(q: VariationalGaussian) -> Array:
    return q.scale if q.scale.ndim == 1 else jnp.sqrt(jnp.sum(q.scale**2, axis=1))


def base_sample(seed: int, dimension: int, num: int, num_rows: int) -> np.ndarray:
    """Return fixed standard-normal points: the first ``num`` of ``num_rows`` rows; the others are zero.

    Scrambled Sobol points and their reflections, so that odd moments vanish. Their second moments are made exact: all
    of them if there are at least 2 d pairs, else only the variances. A Gaussian target is then fitted exactly.

    Args:
        seed: of the scrambling; the points of a larger ``num`` start with those of a smaller one, up to the scaling.
        dimension: d.
        num: an even number.
        num_rows: of the result.
    """
    num_pairs = num // 2
    generator = np.random.default_rng(seed)
    if dimension <= _SOBOL_LIMIT:
        # SciPy renamed the keyword seed to rng in 1.15, and it is no positional argument
        sobol = scipy.stats.qmc.Sobol(dimension, scramble=True, **{_RNG: generator})
        uniform = np.clip(sobol.random(num_pairs), 1e-12, 1 - 1e-12)
        points = scipy.special.ndtri(uniform)
    else:
        points = generator.standard_normal((num_pairs, dimension))
    if num_pairs >= 2 * dimension:
        chol = np.linalg.cholesky(points.T @ points / num_pairs)
        points = np.linalg.solve(chol, points.T).T
    else:
        points = points / np.sqrt(np.mean(points**2, axis=0))
    sample = np.zeros((num_rows, dimension))
    sample[:num:2], sample[1:num:2] = points, -points
    return sample


def negative_bound(
    q: VariationalGaussian,
    logdensity_fn: Callable,
    template: ArrayTree,
    sample: Float[Array, "rows d"],
    count: Int[Array, ""],
    update: GaussianUpdate,
    *,
    block: int = 1,
) -> Scalar:
    """Return minus the evidence lower bound of an updated Gaussian on the first ``count`` points.

    Value and gradient are summed point by point in a loop whose length is data, so that samples of every size share
    one compiled program; the gradient cannot be differentiated again.

    Args:
        q: the Gaussian before the update.
        logdensity_fn: log density of a position.
        template: one position, for its structure.
        sample: the points.
        count: number of points used.
        update: what is optimized.
        block: points evaluated together (static); divides the number of rows.
    """
    unravel = ravel_pytree(template)[1]

    def log_p(update, z):
        scaled = z * jnp.exp(update.log_diagonal) if q.scale.ndim == 1 else _triangle(update) @ z
        return logdensity_fn(unravel(q.loc + _times(q.scale, update.shift + scaled)))

    def forward(update):
        zeros = (jnp.zeros((), sample.dtype), jax.tree.map(jnp.zeros_like, update))
        total = jax.lax.fori_loop(
            0, -(-count // block), functools.partial(_add_block, log_p, update, sample, count, block), zeros
        )
        return jax.tree.map(lambda x: x / count.astype(x.dtype), total)

    @jax.custom_vjp
    def mean_log_p(update):
        return forward(update)[0]

    # A loop of dynamic length has no reverse mode: the forward pass sums the gradient along with the value
    mean_log_p.defvjp(forward, lambda gradient, cotangent: (jax.tree.map(lambda g: cotangent * g, gradient),))
    entropy = 0.5 * q.loc.shape[0] * float(np.log(2 * np.pi * np.e))
    return -(mean_log_p(update) + _log_determinant(q.scale) + jnp.sum(update.log_diagonal) + entropy)


def _add_block(log_p, update, sample, count, block: int, index, total):
    """Add the values and gradients of one block; points from ``count`` on are ignored."""
    points = jax.lax.dynamic_slice_in_dim(sample, index * block, block)
    if block == 1:
        value, gradient = jax.value_and_grad(log_p)(update, points[0])
        return jax.tree.map(jnp.add, total, (value, gradient))
    used = index * block + jnp.arange(block) < count
    terms = jax.vmap(jax.value_and_grad(log_p), (None, 0))(update, points)

    def add(sum_so_far, term):
        mask = used.reshape(-1, *[1] * (term.ndim - 1))
        return sum_so_far + jnp.sum(jnp.where(mask, term, 0), axis=0)

    return jax.tree.map(add, total, terms)


def _triangle(update: GaussianUpdate) -> Float[Array, "d d"]:
    dimension = update.shift.shape[0]
    rows, columns = np.tril_indices(dimension, -1)
    return jnp.diag(jnp.exp(update.log_diagonal)).at[rows, columns].set(update.lower)


def _times(scale: Array, vector: Array) -> Array:
    return scale * vector if scale.ndim == 1 else scale @ vector


def _log_determinant(scale: Array) -> Scalar:
    return jnp.sum(jnp.log(scale if scale.ndim == 1 else jnp.diag(scale)))


_RNG = "rng" if tuple(int(x) for x in scipy.__version__.split(".")[:2]) >= (1, 15) else "seed"
