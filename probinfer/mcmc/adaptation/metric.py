"""The metric of Hamiltonian samplers: estimated from draws and gradients, chosen by the held-out Fisher divergence.

Every metric is one object, an inverse mass matrix ``diag(s) (I + U (diag(l) - I) U^T) diag(s)``: it is diagonal if all
``l = 1``, low-rank if only the eigenvalues outside [1/2, 2] are used, dense if all are. So the sampler is compiled
once, whichever is chosen. The estimate minimizes the Fisher divergence between the whitened posterior and a standard
normal; it uses gradients, so that ``d + 1`` draws are enough for a Gaussian target of any condition number.

The choice: each candidate ``L L^T`` is fitted to one half of the chains and judged on the other half by
``mean |L^T grad log p(x) + L^{-1} (x - mean)|^2 / d``, zero for a target that it whitens to a standard normal. The
simplest candidate whose divergence is at most 1.25 times the best plus 0.05 is chosen. A dense metric fitted to too
few draws fails on the other half, so that no rule on draws per dimension is needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.metric_estimators import fisher_score_low_rank
from blackjax.mcmc.metrics import LowRankInverseMassMatrix, Metric, gaussian_euclidean_low_rank
from jax.flatten_util import ravel_pytree

from probinfer.core.types import Array, Bool, Float, Int

__all__ = [
    "NAMES",
    "MetricChoice",
    "allowed_metrics",
    "choose",
    "default_rank",
    "divergence",
    "euclidean",
    "from_secants",
    "identity",
    "whiten",
]

NAMES = ("diagonal", "low-rank", "dense")
_CUTOFF = 2.0
_DENSE_LIMIT = 64
_MAX_RANK = 32


class MetricChoice(NamedTuple):
    """A chosen metric and the reasons for it.

    Attributes:
        metric: the inverse mass matrix.
        chosen: its index in ``NAMES``.
        divergences: held-out Fisher divergences of the candidates, per dimension.
        stretch: largest eigenvalue of the covariance of the draws whitened by the metric.
    """

    metric: LowRankInverseMassMatrix
    chosen: Int[Array, ""]
    divergences: Float[Array, "3"]
    stretch: Float[Array, ""]


def default_rank(metric: str, dimension: int) -> int:
    """Return the number of eigenvectors: all of them in up to 64 dimensions or for a dense metric.

    Args:
        metric: ``"auto"`` or a name in ``NAMES``.
        dimension: of the position.
    """
    if metric == "diagonal":
        return 1
    return dimension if metric == "dense" or dimension <= _DENSE_LIMIT else _MAX_RANK


def allowed_metrics(metric: str, dimension: int) -> tuple[bool, bool, bool]:
    """Return which of the candidates in ``NAMES`` may be chosen.

    Args:
        metric: ``"auto"`` or a name in ``NAMES``.
        dimension: of the position.

    Raises:
        ValueError: the name is unknown.
    """
    if metric == "auto":
        return True, True, dimension <= _DENSE_LIMIT
    if metric not in NAMES:
        raise ValueError(f"metric must be 'auto' or one of {NAMES}, got {metric!r}")
    diagonal, low_rank, dense = (name == metric for name in NAMES)
    return diagonal, low_rank, dense


def identity(dimension: int, rank: int, dtype: Any) -> LowRankInverseMassMatrix:
    """Return the identity as a metric.

    Args:
        dimension: of the position.
        rank: number of eigenvectors (their eigenvalues are 1).
        dtype: of the arrays.
    """
    return LowRankInverseMassMatrix(
        jnp.ones(dimension, dtype), jnp.eye(dimension, rank, dtype=dtype), jnp.ones(rank, dtype)
    )


def from_secants(
    position_differences: Float[Array, "pair d"],
    gradient_differences: Float[Array, "pair d"],
    candidates: Bool[Array, "3"],
    rank: int,
) -> LowRankInverseMassMatrix:
    """Return the metric in which the secant pairs of an L-BFGS search agree.

    Every pair ``(dx, dg)`` with ``-dg . dx > 0`` is scaled to ``-dg . dx = 1`` and stands for a draw and its gradient,
    with both signs; other pairs are ignored. Directions in which no pair differs keep the diagonal scale, coordinates
    in which none differs the scale 1.

    Args:
        position_differences: dx.
        gradient_differences: dg, of the log density.
        candidates: metrics that may be chosen; only the diagonal is used if nothing else is allowed.
        rank: number of eigenvectors.
    """
    curvature = -jnp.sum(position_differences * gradient_differences, axis=1)
    usable = jnp.isfinite(curvature) & (curvature > 0)
    scale = jnp.where(usable, 1 / jnp.sqrt(jnp.where(usable, curvature, 1)), 0)[:, None]
    draws, gradients = (
        jnp.where(usable[:, None], x, 0) * scale for x in (position_differences, gradient_differences)
    )
    estimate = fisher_score_low_rank(
        jnp.concatenate([draws, -draws]), jnp.concatenate([gradients, -gradients]), rank, cutoff=_CUTOFF
    )
    sigma = jnp.where(jnp.any(draws != 0, axis=0) & jnp.any(gradients != 0, axis=0), estimate.sigma, 1)
    return LowRankInverseMassMatrix(sigma, estimate.U, jnp.where(jnp.any(candidates[1:]), estimate.lam, 1))


def choose(
    draws: Float[Array, "step chain d"],
    gradients: Float[Array, "step chain d"],
    count: Int[Array, ""],
    candidates: Bool[Array, "3"],
    rank: int,
) -> MetricChoice:
    """Fit the three candidates and choose one.

    Args:
        draws: unconstrained draws, of which the first ``count`` steps are valid.
        gradients: of the log density at the draws.
        count: number of valid steps.
        candidates: metrics that may be chosen.
        rank: number of eigenvectors.

    Returns:
        The choice; its metric is fitted to all valid draws.

    References:
        Seyboldt, Carlson and Carpenter (2026), algorithm 1 and theorem 2.3 (the estimate, from blackjax).
    """
    # Split into a training half and a held-out half: by chains, or by time if there is only one
    num_steps, num_chains, dimension = draws.shape
    valid = jnp.broadcast_to((jnp.arange(num_steps) < count)[:, None], (num_steps, num_chains))
    if num_chains > 1:
        train = valid & (jnp.arange(num_chains) % 2 == 0)
    else:
        train = valid & (jnp.arange(num_steps) < count // 2)[:, None]
    draws, gradients = draws.reshape(-1, dimension), gradients.reshape(-1, dimension)
    train, valid = train.reshape(-1), valid.reshape(-1)

    def fit(mask):
        estimate = fisher_score_low_rank(_fill(draws, mask), _fill(gradients, mask), rank, cutoff=1.0)
        return _candidates(estimate)

    # Fit
    fits = jax.lax.map(fit, jnp.stack([train, valid]))
    trained, final = jax.tree.map(lambda x: x[0], fits), jax.tree.map(lambda x: x[1], fits)
    # Judge on the held-out half
    divergences = jax.lax.map(lambda metric: divergence(metric, draws, gradients, valid & ~train), trained)
    divergences = jnp.where(jnp.isfinite(divergences), divergences, jnp.inf)
    ranked = jnp.where(candidates, divergences, jnp.inf)
    # Choose the simplest that is close to the best; if no divergence is finite, the first candidate allowed
    close = candidates & (ranked <= 1.25 * jnp.min(ranked) + 0.05)
    chosen = jnp.argmax(close)
    metric = jax.tree.map(lambda x: x[chosen], final)
    # Rows that do not count are filled with the mean: rescale the covariance from all rows to the valid ones
    whitened = _fill(whiten(metric, draws), valid)
    scale = draws.shape[0] / jnp.sum(valid)
    covariance = jnp.cov(whitened.T.reshape(dimension, -1)).reshape(dimension, dimension)
    stretch = jnp.linalg.eigvalsh(covariance)[-1]
    return MetricChoice(metric, chosen.astype(jnp.int32), divergences, (stretch * scale).astype(draws.dtype))


def divergence(
    metric: LowRankInverseMassMatrix,
    draws: Float[Array, "n d"],
    gradients: Float[Array, "n d"],
    mask: Bool[Array, " n"],
) -> Float[Array, ""]:
    """Return ``mean |L^T g + L^{-1} x|^2 / d`` over the masked rows, both centered; zero for a whitened target.

    Args:
        metric: ``L L^T``.
        draws: unconstrained draws.
        gradients: of the log density at the draws.
        mask: the rows that count.
    """
    draws = _fill(draws, mask) - _mean(draws, mask)
    gradients = (_fill(gradients, mask) - _mean(gradients, mask)) * metric.sigma
    gradients = gradients + ((gradients @ metric.U) * (jnp.sqrt(metric.lam) - 1)) @ metric.U.T
    return jnp.sum((gradients + whiten(metric, draws)) ** 2) / jnp.maximum(jnp.sum(mask), 1) / draws.shape[1]


def whiten(metric: LowRankInverseMassMatrix, draws: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Return ``L^{-1} x`` with ``L = diag(s) (I + U (sqrt(l) - 1) U^T)``."""
    scaled = draws / metric.sigma
    return scaled + ((scaled @ metric.U) * (1 / jnp.sqrt(metric.lam) - 1)) @ metric.U.T


def euclidean(metric: LowRankInverseMassMatrix) -> Metric:
    """Return blackjax's Euclidean metric with a kinetic energy that rounding cannot make negative.

    In ``q . (q + U (l - 1) U^T q) / 2`` the terms of single coordinates may be negative. If a step is far too large,
    one of them may overflow to minus infinity, and the transition, however far from the target, is accepted. Written
    as half a square, the energy is positive or, at worst, NaN, which is rejected.

    Args:
        metric: inverse mass matrix ``L L^T``.
    """
    root = jnp.sqrt(metric.lam) - 1

    def kinetic_energy(momentum, position=None):
        del position
        scaled = metric.sigma * ravel_pytree(momentum)[0]
        velocity = scaled + metric.U @ (root * (scaled @ metric.U))
        return 0.5 * jnp.dot(velocity, velocity)

    return gaussian_euclidean_low_rank(*metric)._replace(kinetic_energy=kinetic_energy)


def _candidates(estimate: LowRankInverseMassMatrix) -> LowRankInverseMassMatrix:
    """Stack diagonal, low-rank and dense: they differ in the eigenvalues that are replaced by one."""
    lam = estimate.lam
    outside = (lam > _CUTOFF) | (lam < 1 / _CUTOFF)
    eigenvalues = jnp.stack([jnp.ones_like(lam), jnp.where(outside, lam, 1), lam])
    return LowRankInverseMassMatrix(
        jnp.broadcast_to(estimate.sigma, (3, *estimate.sigma.shape)),
        jnp.broadcast_to(estimate.U, (3, *estimate.U.shape)),
        eigenvalues,
    )


def _mean(rows: Array, mask: Array) -> Array:
    count = jnp.maximum(jnp.sum(mask), 1).astype(rows.dtype)
    return jnp.sum(jnp.where(mask[:, None], rows, 0), axis=0) / count


def _fill(rows: Array, mask: Array) -> Array:
    """Replace the rows that do not count by the mean of those that do, so that they add nothing to a covariance."""
    return jnp.where(mask[:, None], rows, _mean(rows, mask))
