r"""Coin sampling inside constraints: the particles move in the dual space of a mirror map, which has no constraints.

Bets are placed in coordinates relative to the cloud of the dual variables, as in ``coin.svgd``; the kernel compares the
positions. Every position is inside the constraints by construction.
"""

from __future__ import annotations

from typing import Any

import optax

from probinfer import betting
from probinfer.coin.cloud import bandwidth as bandwidths
from probinfer.coin.cloud.geometry import Diagonal, Identity
from probinfer.coin.cloud_descent import bind_bet
from probinfer.coin.constrained.mirrored_step import MirroredConfig, MirroredInfo, MirroredState, init, step
from probinfer.core.algorithms import Algorithm, algorithm, as_partial
from probinfer.core.binding import StochasticLogDensity
from probinfer.core.errors import shortened
from probinfer.core.types import strong_array
from probinfer.kernels import InverseMultiquadric

__all__ = ["MirroredInfo", "MirroredState", "mirrored_svgd", "mirrored_svmd"]

_UNIT = 0.1  # first bet, in standard deviations of the dual cloud


def mirrored_svgd(
    logdensity_fn: Any,
    mirror: Any,
    *,
    kernel: Any = None,
    geometry: Any = None,
    bet: optax.GradientTransformation | None = None,
    bandwidth: str = "median",
    on: str = "positions",
) -> Algorithm:
    r"""Carry particles inside constraints to a density, along the mirrored Stein direction, without a learning rate.

    .. math:: \frac1N \sum_j k(\theta_j, \theta_i) \nabla_\eta \log \tilde\pi(\eta_j)
        + \nabla^2\psi(\theta_j)^{-1} \nabla_{\theta_j} k(\theta_j, \theta_i)

    The published algorithm is ``geometry=coin.Identity(), bet=betting.coin(unit=0.5), bandwidth="published"``.

    Args:
        logdensity_fn: log density of one constrained position (on a simplex with respect to its first D - 1 numbers),
            or a ``StochasticLogDensity``: one batch per step for all particles.
        mirror: ``coin.Simplex()``, ``coin.Orthant()``, ``coin.Box(low, high)``, or ``coin.mirror_from_bijector(...)``
            for the supports of NumPyro.
        kernel: its lengthscale is in units of the root of the bandwidth h. None: ``(1 + r²/h)^(-1/2)``.
        geometry: of the dual cloud, as in ``coin.svgd``.
        bet: an optax transformation in the coordinates of the geometry. None: ``betting.coin(unit=0.1)`` for 64 steps,
            then ``betting.fuse(unit=0.1, particles=True)``.
        bandwidth: "median": h is the median squared distance, a lower quantile for 32 steps; "published": the median
            from the start; "fixed": the lengthscale of the kernel.
        on: what the distances of the kernel are computed from. "positions": the positions, in standard deviations of
            the cloud if the geometry has restarts; "dual": the relative dual coordinates.

    Returns:
        ``init(positions) -> MirroredState`` with leaves (N, ...) of constrained values, whose ``.positions`` are the
        particles, and ``step(key, state) -> (MirroredState, MirroredInfo)``, for ``pi.run``. Memory O(N² + N D d).

    Raises:
        TypeError: ``logdensity_fn`` is not a function, ``mirror`` is not a mirror map, ``kernel`` has no lengthscale,
            or ``bet`` is not an optax transformation; from ``init``: the positions are not floating point.
        ValueError: ``bandwidth`` or ``on`` is unknown; from ``init``: the positions are not a cloud, are on or outside
            the boundary, or have no spread.

    References:
        Shi, Liu and Mackey (2022), "Sampling with mirrored Stein operators", algorithm 1; Sharrock, Mackey and Nemeth
        (2023), "Learning rate free sampling in constrained domains", algorithm 1 (coin MSVGD).
    """
    if on not in ("positions", "dual"):
        raise ValueError(f"on must be one of positions, dual; got {on!r}")
    return _build(logdensity_fn, mirror, kernel, geometry, bet, bandwidth, on, None)


def mirrored_svmd(
    logdensity_fn: Any,
    mirror: Any,
    *,
    kernel: Any = None,
    geometry: Any = None,
    bet: optax.GradientTransformation | None = None,
    bandwidth: str = "median",
    cutoff: float = 0.9,
) -> Algorithm:
    r"""Carry particles inside constraints to a density by a kernel that is adapted to the mirror map.

    .. math:: E\, k^{1/2}(\theta, \theta'') \nabla^2\psi(\theta'') k^{1/2}(\theta'', \theta')

    over the cloud, by one eigendecomposition of an N x N matrix per step. Try ``mirrored_svgd`` first: see
    ``benchmarks/coin_constrained.py``.

    Args:
        logdensity_fn: as in :func:`mirrored_svgd`.
        mirror: ``coin.Simplex()``, ``coin.Orthant()`` or ``coin.Box(low, high)``: it needs a Hessian.
        kernel: as in :func:`mirrored_svgd`.
        geometry: of the dual cloud: ``coin.Diagonal()`` (None) or ``coin.Identity()``.
        bet: an optax transformation in the coordinates of the geometry. None: ``betting.coin(unit=0.1)``.
        bandwidth: as in :func:`mirrored_svgd`.
        cutoff: share of the trace of the Gram matrix that the eigenvectors in use account for; nearer to 1 the
            direction is more exact but noisier.

    Returns:
        As :func:`mirrored_svgd`.

    Raises:
        TypeError: As :func:`mirrored_svgd`, or the mirror has no Hessian.
        ValueError: As :func:`mirrored_svgd`, or the cutoff is outside (0, 1], or the geometry mixes coordinates, which
            the Hessian does already.

    References:
        Shi, Liu and Mackey (2022), "Sampling with mirrored Stein operators", section 4.3.
    """
    if not 0 < cutoff <= 1:
        raise ValueError(f"cutoff is a share of a trace and must be in (0, 1], got {cutoff}")
    if not isinstance(mirror, type) and not hasattr(mirror, "hessian"):
        raise TypeError(
            f"mirrored_svmd needs the Hessian of a mirror map, but a {type(mirror).__name__} has none; use "
            "coin.Simplex(), coin.Orthant(), coin.Box(low, high), or mirrored_svgd"
        )
    geometry = Diagonal() if geometry is None else geometry
    if not isinstance(geometry, (Diagonal, Identity)):
        raise ValueError(
            f"mirrored_svmd takes coin.Diagonal() or coin.Identity(), got {shortened(geometry)}: its kernel mixes the "
            "coordinates already"
        )
    return _build(logdensity_fn, mirror, kernel, geometry, bet, bandwidth, "adapted", strong_array(cutoff))


def _build(
    logdensity_fn: Any,
    mirror: Any,
    kernel: Any,
    geometry: Any,
    bet: Any,
    bandwidth: str,
    on: str,
    cutoff: Any,
) -> Algorithm:
    if not callable(logdensity_fn):
        raise TypeError(
            f"logdensity_fn must be a function of one constrained position, got {shortened(logdensity_fn)}"
        )
    if isinstance(mirror, type) or not all(
        hasattr(mirror, name) for name in ("primal", "dual", "log_det", "inside")
    ):
        raise TypeError(
            f"mirror must be a mirror map, got {shortened(mirror)}; for example coin.Simplex(), or "
            "coin.mirror_from_bijector(constraint, example)"
        )
    kernel = InverseMultiquadric() if kernel is None else kernel
    bandwidths.check_rule(kernel, bandwidth)
    config = MirroredConfig(
        mirror=mirror,
        kernel=kernel,
        geometry=geometry,
        early=bind_bet(betting.coin(unit=_UNIT) if bet is None else bet),
        late=betting.fuse(unit=_UNIT, particles=True) if bet is None and on != "adapted" else None,
        cutoff=cutoff,
        bandwidth=bandwidth,
        on=on,
        stochastic=isinstance(logdensity_fn, StochasticLogDensity),
    )
    return algorithm(init, step, config, as_partial(logdensity_fn))
