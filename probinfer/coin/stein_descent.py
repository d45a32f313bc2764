"""Stein variational gradient descent without a learning rate: the Stein direction, with bets as step sizes."""

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

    The defaults need no tuning: the direction is computed in coordinates relative to the cloud (``geometry``), with a
    Gaussian kernel as wide as the median distance, and the first bet is a tenth of the width of the cloud. The
    published coin sampler is ``svgd(fn, geometry=coin.Identity(), bet=betting.coin(unit=0.5),
    bandwidth="published")``.

    The cloud becomes too narrow unless there are many more particles than dimensions: see ``coin.predicted_sd``.

    Args:
        logdensity_fn: log density of one position (a tree), or a ``StochasticLogDensity`` of a key and a position: one
            batch per step for all particles.
        kernel: None: ``exp(-r²/h)``, that is ``kernels.RBF(lengthscale=0.5**0.5)``; ``kernels.InverseMultiquadric()``
            is ``(1 + r²/h)^(-1/2)``. The lengthscale is in units of the root of h, unless ``bandwidth`` is "fixed".
        geometry: ``coin.Full()``, ``coin.LowRank()``, ``coin.Diagonal()`` or ``coin.Identity()``; None: ``Full()`` if
            there are more particles than dimensions (up to 1024), otherwise ``LowRank()``, or ``Diagonal()`` for
            minibatches.
        bet: an optax transformation, in the coordinates of the cloud. None: ``betting.coin(unit=0.1)`` until the cloud
            has settled, then ``betting.fuse(unit=0.1, particles=True)``.
        bandwidth: "median": h is the median squared distance, a lower quantile for 32 steps; "published": the
            median over log(N + 1); "fixed": the lengthscale of the kernel.
        neighbors: for each coordinate of the flattened position the others that its kernel depends on
            (``coin.cloud.graphical``); ``[()] * d``: none. The geometry is then ``Diagonal()`` (or ``Identity()``), and
            the bandwidth the median of each neighborhood. None: one kernel depends on all coordinates.

    Returns:
        ``init(positions) -> CloudState`` with leaves (N, ...), whose ``.positions`` are the particles, and
        ``step(key, state) -> (CloudState, CloudInfo)``, for ``pi.run``. Memory O(N d) in addition to the densities.

    Raises:
        TypeError: ``logdensity_fn`` is not a function, the kernel has no lengthscale, or ``bet`` is not an optax
            transformation; from ``init``: the positions are not floating point.
        ValueError: The bandwidth rule is unknown, or ``neighbors`` are combined with another bandwidth or with a
            geometry that mixes coordinates; from ``init``: there are no leaves or fewer than two particles, leading
            axes differ, entries are NaN, particles are identical, or a coordinate has no spread but the geometry needs
            it.

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
                "neighbors need coordinates that are not mixed, and each neighborhood has its own bandwidth: use "
                "geometry=coin.Diagonal() or coin.Identity(), and bandwidth='median'"
            )
        direction_fn = jax.tree_util.Partial(graphical_direction, *neighborhoods(neighbors))
        return descent(logdensity_fn, direction_fn, kernel, geometry, bet, bandwidth="fixed")
    return descent(logdensity_fn, svgd_direction, kernel, geometry, bet, bandwidth=bandwidth)


def svgd_direction(kernel: Any, z: Array, scores: Array, mask: Array, score_fn: Any) -> Array:
    """Return ``numerics.stein.stein_direction``, as ``descent`` calls it."""
    return stein_direction(kernel, z, scores, mask)
