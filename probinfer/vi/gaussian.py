"""Gaussians in unconstrained space, and their evidence bound on a fixed sample.

The approximation is ``x = c + S (a + T z)`` with ``z`` standard normal. The centre ``c`` and the scale ``S`` (a vector
for mean-field, a lower triangle for full rank) stay put during an optimisation; the shift ``a`` and the lower
triangle ``T`` with a positive diagonal are what it moves, from zero and the identity. Where ``S S^T`` is near the
covariance the problem is well conditioned, whatever the scales of the target.

The bound ``E log p(x) + log |S T| + d/2 log(2 pi e)`` is averaged over ``z_1 ... z_M``, the same at every evaluation,
so that it is an ordinary function, and L-BFGS needs no learning rate.

References:
    Giordano, Ingram and Broderick (2024), "Black box variational inference with a deterministic objective".
    Burroni, Domke and Sheldon (2023), "Sample average approximation for black-box VI".

Draws that are to be weighted come from a wider law, :func:`widened`: a Gaussian fitted by KL(q || p) is too narrow
where p has a longer tail, and there its own draws are too few for any weights to mend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats
from jax.flatten_util import ravel_pytree

from probinfer.core.types import Array, ArrayTree, Float, Int, PRNGKey, Scalar

__all__ = [
    "Frame",
    "Moves",
    "base_sample",
    "draw",
    "log_density",
    "log_ratios",
    "log_widened",
    "negative_bound",
    "recentre",
    "still",
    "widened",
]

_DEGREES, _WIDER = 4.0, 1.5  # of the Student t law in half of the widened draws, in standard deviations
_SOBOL_LIMIT = scipy.stats.qmc.Sobol.MAXDIM


class Frame(NamedTuple):
    """What stays put: ``centre`` (d,) and ``scale``, (d,) for mean-field or (d, d) lower triangular."""

    centre: Any
    scale: Any


class Moves(NamedTuple):
    """What is optimised: ``shift`` (d,), the log diagonal of T (d,), and its strict lower triangle, or nothing."""

    shift: Any
    log_diagonal: Any
    lower: Any


def still(frame: Frame) -> Moves:
    """Return the moves that change nothing."""
    dimension = frame.centre.shape[0]
    size = dimension * (dimension - 1) // 2 if frame.scale.ndim == 2 else 0
    zeros = jnp.zeros(dimension, frame.centre.dtype)
    return Moves(zeros, zeros, jnp.zeros(size, frame.centre.dtype))


def recentre(frame: Frame, moves: Moves) -> Frame:
    """Return the frame in which the moved approximation is at rest."""
    centre = frame.centre + _times(frame.scale, moves.shift)
    if frame.scale.ndim == 1:
        return Frame(centre, frame.scale * jnp.exp(moves.log_diagonal))
    return Frame(centre, jnp.tril(frame.scale @ _triangle(moves)))


def draw(frame: Frame, key: PRNGKey, num: int) -> Float[Array, "num d"]:
    """Draw from the approximation at rest.

    Args:
        frame: its centre and scale.
        key: random key.
        num: how many.
    """
    noise = jax.random.normal(key, (num, frame.centre.shape[0]), frame.centre.dtype)
    return frame.centre + (noise * frame.scale if frame.scale.ndim == 1 else noise @ frame.scale.T)


def log_ratios(
    frame: Frame, logdensity_fn: Callable, like: ArrayTree, draws: Float[Array, "num d"], mode: str
) -> Float[Array, " num"]:
    """Return ``log p(x) - log q(x)`` for draws from the approximation at rest.

    Args:
        frame: its centre and scale.
        logdensity_fn: log density of a position.
        like: one position, for its structure.
        draws: flattened positions.
        mode: ``"map"`` or ``"vmap"`` over the draws.
    """
    unravel = ravel_pytree(like)[1]

    def evaluate(x):
        return logdensity_fn(unravel(x))

    log_p = jax.vmap(evaluate)(draws) if mode == "vmap" else jax.lax.map(evaluate, draws)
    return log_p - log_density(frame, draws)


def log_density(frame: Frame, draws: Float[Array, "num d"]) -> Float[Array, " num"]:
    """Return the normalised log density of the approximation at rest.

    Args:
        frame: its centre and scale.
        draws: flattened positions.
    """
    offset = draws - frame.centre
    if frame.scale.ndim == 1:
        noise = offset / frame.scale
    else:
        noise = jax.scipy.linalg.solve_triangular(frame.scale, offset.T, lower=True).T
    normal = -0.5 * jnp.sum(noise**2, axis=1) - 0.5 * draws.shape[1] * float(np.log(2 * np.pi))
    return normal - _log_determinant(frame.scale)


def widened(frame: Frame, key: PRNGKey, draws: Float[Array, "num d"]) -> Float[Array, "num d"]:
    r"""Widen draws of the approximation: the law that a defensive importance sampler draws from.

    In about every second draw one coordinate, chosen at random, is drawn again from 1.5 times a Student t law of four
    degrees of freedom in units of its standard deviation, and the others follow by their regression on it:

    .. math:: r(x) = q(x) \Big[\tfrac12 + \tfrac1{2d} \sum_k t(z_k) / \phi(z_k)\Big], \quad z_k = (x_k - c_k)/\sigma_k.

    So p/r is at most 2 p/q, and bounded along every coordinate in which p falls off as a Student t law does or faster.

    Args:
        frame: centre and scale of q.
        key: random key.
        draws: from q.

    References:
        Hesterberg (1995), "Weighted average importance sampling and defensive mixture distributions"; Shaw (2006),
        "Sampling Student's T distribution - use of the inverse cumulative distribution function", for its quantile.
    """
    key_wide, key_which, key_far = jax.random.split(key, 3)
    num, dimension = draws.shape
    which = jax.random.randint(key_which, (num,), 0, dimension)
    far = _WIDER * _student(jax.random.uniform(key_far, (num,), draws.dtype))
    near = jnp.take_along_axis(_standardised(frame, draws), which[:, None], axis=1)[:, 0]
    if frame.scale.ndim == 1:
        along = jnp.zeros_like(draws).at[jnp.arange(num), which].set(frame.scale[which])
    else:
        along = (frame.scale @ frame.scale.T)[which] / _marginal_sd(frame)[which][:, None]
    wide = jax.random.bernoulli(key_wide, 0.5, (num,))
    return draws + jnp.where(wide, far - near, 0)[:, None] * along


def log_widened(frame: Frame, draws: Float[Array, "num d"]) -> Float[Array, " num"]:
    """Return the normalised log density of :func:`widened`.

    Args:
        frame: centre and scale of q.
        draws: flattened positions.
    """
    z = _standardised(frame, draws)
    student = jax.scipy.stats.t.logpdf(z / _WIDER, _DEGREES) - float(np.log(_WIDER))
    gains = jax.nn.logsumexp(student - jax.scipy.stats.norm.logpdf(z), axis=1) - float(np.log(z.shape[1]))
    return log_density(frame, draws) + jnp.logaddexp(jnp.zeros_like(gains), gains) - float(np.log(2))


def _student(uniform: Array) -> Array:
    """The quantile of the Student t law of four degrees of freedom."""
    tiny = jnp.finfo(uniform.dtype).eps
    u = jnp.clip(uniform, tiny, 1 - tiny)
    root = jnp.sqrt(4 * u * (1 - u))
    return jnp.sign(u - 0.5) * 2 * jnp.sqrt(jnp.maximum(jnp.cos(jnp.arccos(root) / 3) / root - 1, 0))


def _standardised(frame: Frame, draws: Array) -> Array:
    return (draws - frame.centre) / _marginal_sd(frame)


def _marginal_sd(frame: Frame) -> Array:
    return frame.scale if frame.scale.ndim == 1 else jnp.sqrt(jnp.sum(frame.scale**2, axis=1))


def base_sample(seed: int, dimension: int, num: int, room: int) -> np.ndarray:
    """Return fixed standard-normal points, the first ``num`` rows of ``room`` (the rest is zero).

    Scrambled Sobol points and their reflections, so odd moments vanish; their second moments are made exact: all of
    them where there are at least 2 d pairs, else the variances alone. A Gaussian target is then fitted exactly.

    Args:
        seed: of the scrambling; the points of a larger ``num`` start with those of a smaller one, up to the scaling.
        dimension: d.
        num: an even number.
        room: rows of the result.
    """
    pairs = num // 2
    generator = np.random.default_rng(seed)
    if dimension <= _SOBOL_LIMIT:
        # rng was called seed before SciPy 1.15; the generator is the third positional argument of neither
        sobol = scipy.stats.qmc.Sobol(dimension, scramble=True, **{_RNG: generator})
        uniform = np.clip(sobol.random(pairs), 1e-12, 1 - 1e-12)
        points = scipy.special.ndtri(uniform)
    else:
        points = generator.standard_normal((pairs, dimension))
    if pairs >= 2 * dimension:
        chol = np.linalg.cholesky(points.T @ points / pairs)
        points = np.linalg.solve(chol, points.T).T
    else:
        points = points / np.sqrt(np.mean(points**2, axis=0))
    sample = np.zeros((room, dimension))
    sample[:num:2], sample[1:num:2] = points, -points
    return sample


def negative_bound(
    frame: Frame,
    logdensity_fn: Callable,
    like: ArrayTree,
    sample: Float[Array, "room d"],
    count: Int[Array, ""],
    moves: Moves,
    *,
    block: int = 1,
) -> Scalar:
    """Return minus the evidence bound on the first ``count`` points.

    Value and gradient are summed point by point in a loop whose length is data, so that samples of every size share
    one compiled program; there is no derivative of the gradient.

    Args:
        frame: what stays put.
        logdensity_fn: log density of a position.
        like: one position, for its structure.
        sample: the points.
        count: how many of them count.
        moves: what is optimised.
        block: points evaluated together (static); divides ``room``.
    """
    unravel = ravel_pytree(like)[1]

    def log_p(moves, z):
        inner = moves.shift + (
            z * jnp.exp(moves.log_diagonal) if frame.scale.ndim == 1 else _triangle(moves) @ z
        )
        return logdensity_fn(unravel(frame.centre + _times(frame.scale, inner)))

    def forward(moves):
        start = (jnp.zeros((), sample.dtype), jax.tree.map(jnp.zeros_like, moves))
        total = jax.lax.fori_loop(
            0, -(-count // block), functools.partial(_add_block, log_p, moves, sample, count, block), start
        )
        return jax.tree.map(lambda x: x / count.astype(x.dtype), total)

    @jax.custom_vjp
    def mean_log_p(moves):
        return forward(moves)[0]

    mean_log_p.defvjp(forward, lambda gradient, cotangent: (jax.tree.map(lambda g: cotangent * g, gradient),))
    entropy = 0.5 * frame.centre.shape[0] * float(np.log(2 * np.pi * np.e))
    return -(mean_log_p(moves) + _log_determinant(frame.scale) + jnp.sum(moves.log_diagonal) + entropy)


def _add_block(log_p, moves, sample, count, block: int, index, total):
    """Add the values and gradients of one block; points beyond ``count`` do not count."""
    points = jax.lax.dynamic_slice_in_dim(sample, index * block, block)
    if block == 1:
        value, gradient = jax.value_and_grad(log_p)(moves, points[0])
        return jax.tree.map(jnp.add, total, (value, gradient))
    counts = index * block + jnp.arange(block) < count
    terms = jax.vmap(jax.value_and_grad(log_p), (None, 0))(moves, points)

    def add(whole, part):
        chosen = counts.reshape(-1, *[1] * (part.ndim - 1))
        return whole + jnp.sum(jnp.where(chosen, part, 0), axis=0)

    return jax.tree.map(add, total, terms)


def _triangle(moves: Moves) -> Float[Array, "d d"]:
    dimension = moves.shift.shape[0]
    rows, columns = np.tril_indices(dimension, -1)
    return jnp.diag(jnp.exp(moves.log_diagonal)).at[rows, columns].set(moves.lower)


def _times(scale: Array, vector: Array) -> Array:
    return scale * vector if scale.ndim == 1 else scale @ vector


def _log_determinant(scale: Array) -> Scalar:
    return jnp.sum(jnp.log(scale if scale.ndim == 1 else jnp.diag(scale)))


_RNG = "rng" if tuple(int(x) for x in scipy.__version__.split(".")[:2]) >= (1, 15) else "seed"
