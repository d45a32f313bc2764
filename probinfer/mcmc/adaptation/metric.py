"""The metric of Hamiltonian samplers: estimated from draws and gradients, and chosen by what it leaves undone.

Every metric is one object, an inverse mass matrix ``diag(s) (I + U (diag(l) - I) U^T) diag(s)``: all ``l = 1`` is
diagonal, eigenvalues outside [1/2, 2] alone are low-rank, all of them dense. So the sampler is compiled once,
whichever is chosen. The estimate minimises the Fisher divergence between the whitened posterior and a standard
normal; it uses gradients, so ``d + 1`` draws are enough for a Gaussian target of any condition.

The choice: each candidate ``L L^T`` is fitted to one half of the chains and judged on the other half by
``mean |L^T grad log p(x) + L^{-1} (x - mean)|^2 / d``, zero for a target that it whitens to a standard normal. The
simplest candidate whose divergence is within a quarter (and a twentieth) of the best is taken. A dense metric
fitted to too few draws fails on the other half, which is what asks for enough draws per dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.metric_estimators import fisher_score_low_rank
from blackjax.mcmc.metrics import LowRankInverseMassMatrix, Metric, gaussian_euclidean_low_rank
from jax.flatten_util import ravel_pytree

from probinfer.core.types import Array, Float, Int

__all__ = [
    "NAMES",
    "Choice",
    "allowed",
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


class Choice(NamedTuple):
    """A chosen metric and the reasons.

    ``metric`` is blackjax's ``LowRankInverseMassMatrix``, ``chosen`` an index into ``NAMES``, ``divergences`` the
    held-out Fisher divergences (3,) of the candidates, ``stretch`` the largest eigenvalue of the covariance of the
    draws whitened by the metric.
    """

    metric: Any
    chosen: Any
    divergences: Any
    stretch: Any


def default_rank(metric: str, dimension: int) -> int:
    """Return how many eigenvectors are kept: all of them up to 64 dimensions or where a dense metric is asked for.

    Args:
        metric: ``"auto"`` or a name in ``NAMES``.
        dimension: of the position.
    """
    if metric == "diagonal":
        return 1
    return dimension if metric == "dense" or dimension <= _DENSE_LIMIT else _MAX_RANK


def allowed(metric: str, dimension: int) -> tuple[bool, bool, bool]:
    """Return which candidates may be chosen.

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
        rank: eigenvectors kept (none of them used).
        dtype: of the arrays.
    """
    return LowRankInverseMassMatrix(
        jnp.ones(dimension, dtype), jnp.eye(dimension, rank, dtype=dtype), jnp.ones(rank, dtype)
    )


def from_secants(
    moved: Float[Array, "pair d"], bent: Float[Array, "pair d"], candidates: Array, rank: int
) -> LowRankInverseMassMatrix:
    """Return the metric that makes the displacements and gradient changes of a climb agree.

    Every pair ``(dx, dg)`` with ``-dg . dx > 0`` is scaled to one and stands for a draw and its gradient, with both
    signs; other pairs do not count. Directions no pair has seen keep the diagonal scale.

    Args:
        moved: differences of positions.
        bent: differences of gradients of the log density.
        candidates: (3,) booleans; only the diagonal is used where nothing else is allowed.
        rank: eigenvectors kept.
    """
    curvature = -jnp.sum(moved * bent, axis=1)
    good = jnp.isfinite(curvature) & (curvature > 0)
    scale = jnp.where(good, 1 / jnp.sqrt(jnp.where(good, curvature, 1)), 0)[:, None]
    moved, bent = (jnp.where(good[:, None], x, 0) * scale for x in (moved, bent))
    estimate = fisher_score_low_rank(
        jnp.concatenate([moved, -moved]), jnp.concatenate([bent, -bent]), rank, cutoff=_CUTOFF
    )
    sigma = jnp.where(jnp.any(moved != 0, axis=0) & jnp.any(bent != 0, axis=0), estimate.sigma, 1)
    return LowRankInverseMassMatrix(sigma, estimate.U, jnp.where(jnp.any(candidates[1:]), estimate.lam, 1))


def choose(
    draws: Float[Array, "step chain d"],
    gradients: Float[Array, "step chain d"],
    count: Int[Array, ""],
    candidates: Array,
    rank: int,
) -> Choice:
    """Fit the three candidates and choose one.

    Args:
        draws: unconstrained draws, of which the first ``count`` steps are valid.
        gradients: of the log density at the draws.
        count: number of valid steps.
        candidates: (3,) booleans, which may be chosen.
        rank: eigenvectors kept.

    Returns:
        The choice, fitted to all valid draws.

    References:
        Seyboldt, Carlson and Carpenter (2026), algorithm 1 and theorem 2.3 (the estimate, from blackjax).
    """
    steps, chains, dimension = draws.shape
    valid = jnp.broadcast_to((jnp.arange(steps) < count)[:, None], (steps, chains))
    if chains > 1:
        train = valid & (jnp.arange(chains) % 2 == 0)
    else:
        train = valid & (jnp.arange(steps) < count // 2)[:, None]
    draws, gradients = draws.reshape(-1, dimension), gradients.reshape(-1, dimension)
    train, valid = train.reshape(-1), valid.reshape(-1)

    def fit(mask):
        estimate = fisher_score_low_rank(_fill(draws, mask), _fill(gradients, mask), rank, cutoff=1.0)
        return _candidates(estimate)

    halves = jax.lax.map(fit, jnp.stack([train, valid]))
    fitted, final = jax.tree.map(lambda x: x[0], halves), jax.tree.map(lambda x: x[1], halves)
    divergences = jax.lax.map(lambda metric: divergence(metric, draws, gradients, valid & ~train), fitted)
    divergences = jnp.where(jnp.isfinite(divergences), divergences, jnp.inf)
    ranked = jnp.where(candidates, divergences, jnp.inf)
    # where no candidate is finite the first allowed one stands
    close = candidates & (ranked <= 1.25 * jnp.min(ranked) + 0.05)
    chosen = jnp.argmax(close)
    metric = jax.tree.map(lambda x: x[chosen], final)
    whitened = _fill(whiten(metric, draws), valid)
    scale = draws.shape[0] / jnp.sum(valid)
    stretch = jnp.linalg.eigvalsh(jnp.cov(whitened.T.reshape(dimension, -1)).reshape(dimension, dimension))[
        -1
    ]
    return Choice(metric, chosen.astype(jnp.int32), divergences, (stretch * scale).astype(draws.dtype))


def divergence(
    metric: LowRankInverseMassMatrix,
    draws: Float[Array, "n d"],
    gradients: Float[Array, "n d"],
    mask: Array,
) -> Float[Array, ""]:
    """Return ``mean |L^T g + L^{-1} x|^2 / d`` over the masked rows, both centred: zero when whitened.

    Args:
        metric: ``L L^T``.
        draws: unconstrained draws.
        gradients: of the log density at the draws.
        mask: (n,) booleans, the rows that count.
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

    In ``q . (q + U (l - 1) U^T q) / 2`` terms of single coordinates may be negative. Where a step far too large made
    one of them overflow the energy was minus infinity, and the transition there, off the target by any distance, was
    accepted. As half a square it is positive or, at worst, not a number, which is refused.

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
    """Stack diagonal, low-rank and dense: they differ in the eigenvalues that are not replaced by one."""
    lam = estimate.lam
    outside = (lam > _CUTOFF) | (lam < 1 / _CUTOFF)
    lams = jnp.stack([jnp.ones_like(lam), jnp.where(outside, lam, 1), lam])
    return LowRankInverseMassMatrix(
        jnp.broadcast_to(estimate.sigma, (3, *estimate.sigma.shape)),
        jnp.broadcast_to(estimate.U, (3, *estimate.U.shape)),
        lams,
    )


def _mean(rows: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask[:, None], rows, 0), axis=0) / jnp.maximum(jnp.sum(mask), 1).astype(
        rows.dtype
    )


def _fill(rows: Array, mask: Array) -> Array:
    """Replace the rows that do not count by the mean of those that do: they add nothing to a covariance."""
    return jnp.where(mask[:, None], rows, _mean(rows, mask))
