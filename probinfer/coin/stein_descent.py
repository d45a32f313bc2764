"""Stein variational gradient descent without a learning rate: its direction, followed by a bet."""

from __future__ import annotations

import math
from typing import Any

import jax

from probinfer.coin.cloud.bandwidth import check_rule
from probinfer.coin.cloud.geometry import Diagonal, Identity
from probinfer.coin.cloud.graphical import graphical_direction, neighborhoods
from probinfer.coin.cloud_descent import descent
from probinfer.core.algorithms import Algorithm
from probinfer.core.types import Array
from probinfer.kernels import RBF
from probinfer.numerics.stein import stein_direction

__all__ = ["svgd", "svgd_direction"]


def svgd(
    logdensity_fn: Any,
    kernel: Any = None,
    geometry: Any = None,
    bet: Any = None,
    *,
    bandwidth: str = "median",
    neighbors: Any = None,
) -> Algorithm:
    r"""Carry particles to a density along :math:`\frac1N \sum_j [k(x_j, x_i) s(x_j) + \nabla_{x_j} k(x_j, x_i)]`.

    With nothing set there is nothing to tune: the direction is taken in coordinates that are relative to the cloud
    (``geometry``), under a Gaussian kernel as wide as the median distance, and followed by bets of a tenth of the
    cloud. The published coin is ``svgd(fn, geometry=coin.Identity(), bet=betting.coin(unit=0.5),
    bandwidth="published")``.

    The cloud ends too narrow where there are not many more particles than dimensions: see ``coin.predicted_sd``.

    Args:
        logdensity_fn: log density of one position (a tree), or a ``StochasticLogDensity`` of a key and a position: one
            batch a step for all particles.
        kernel: None: ``exp(-r²/h)``, that is ``kernels.RBF(lengthscale=0.5**0.5)``; ``kernels.InverseMultiquadric()``
            is ``(1 + r²/h)^(-1/2)``. The lengthscale is in units of the root of h, unless ``bandwidth`` is "fixed".
        geometry: ``coin.Full()``, ``coin.LowRank()``, ``coin.Diagonal()``, ``coin.Identity()``; None: ``Full()`` where
            there are more particles than dimensions (up to 1024), else ``LowRank()``, for minibatches ``Diagonal()``.
        bet: an optax transformation, in the coordinates of the cloud. None: ``betting.coin(unit=0.1)`` until the cloud
            has settled, ``betting.fuse(unit=0.1, particles=True)`` from there on.
        bandwidth: "median": h is the median squared distance, a lower quantile for 32 steps; "published": the
            median over log(N + 1); "fixed": the kernel as it is.
        neighbors: for each coordinate of the flattened position the others that its kernel sees (``coin.graphical``);
            ``[()] * d``: none. With it the geometry is ``Diagonal()`` (or ``Identity()``), the bandwidth the median of
            each neighborhood. None: one kernel sees all coordinates.

    Returns:
        ``init(positions) -> CloudState`` with leaves (N, ...), whose ``.positions`` are the particles, and
        ``step(key, state) -> (CloudState, CloudInfo)``, for ``pi.run``. Memory O(N d) beside that of the densities.

    Raises:
        TypeError: ``logdensity_fn`` is no function, a kernel without a lengthscale, a ``bet`` that is no optax
            transformation; from ``init``: positions that are not floating point.
        ValueError: an unknown bandwidth rule; ``neighbors`` with another bandwidth or a geometry that mixes; from
            ``init``: no leaves, leading axes that differ, fewer than two particles, NaN, identical particles, or a
            coordinate without spread where the geometry needs one.

    References:
        Liu and Wang (2016), "Stein variational gradient descent"; Sharrock and Nemeth (2023), "Coin sampling";
        Sharrock and Nemeth (2025), arXiv 2510.25315, for distance over gradients.
    """
    kernel = RBF(lengthscale=math.sqrt(0.5)) if kernel is None else kernel
    if neighbors is not None:
        check_rule(kernel, "median")
        geometry = Diagonal() if geometry is None else geometry
        if bandwidth != "median" or not isinstance(geometry, Diagonal | Identity):
            raise ValueError(
                "neighbors need coordinates that are not mixed, and set their own bandwidths: use geometry="
                "coin.Diagonal() or coin.Identity(), and bandwidth='median'"
            )
        direction_fn = jax.tree_util.Partial(graphical_direction, *neighborhoods(neighbors))
        return descent(logdensity_fn, direction_fn, kernel, geometry, bet, bandwidth="fixed")
    return descent(logdensity_fn, svgd_direction, kernel, geometry, bet, bandwidth=bandwidth)


def svgd_direction(kernel: Any, z: Array, scores: Array, mask: Array, score_fn: Any) -> Array:
    """Return ``stein.stein_direction``, as ``descent`` calls it."""
    return stein_direction(kernel, z, scores, mask)
