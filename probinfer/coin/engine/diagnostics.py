r"""Diagnostics of a cloud from its scores: identities that hold for draws of the density, and what N particles allow.

For any density that decays, the scores satisfy :math:`E[s_k] = 0` and :math:`E[(x_k - E x_k) s_k] = -1`, so no
reference draws are needed. For a Gaussian the second is minus the variance of the cloud over that of the density (given
the other coordinates): a cloud whose value is nearer to zero has collapsed. The kernel Stein discrepancy alone does not
detect this: that of a collapsed cloud may be smaller than that of independent draws.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from probinfer.coin.cloud.bandwidth import squared_bandwidth
from probinfer.coin.cloud.geometry import moments
from probinfer.coin.cloud.particles import masked_mean
from probinfer.core.types import Array, Bool, Float
from probinfer.kernels import InverseMultiquadric
from probinfer.numerics.stein import stein_sums

__all__ = ["CloudDiagnostics", "describe_misfit", "diagnose", "particles_for", "predicted_sd"]

_NARROW, _WIDE = 0.75, 1.35  # bounds on the mean variance ratio
_MIN_PREDICTED_SD = 0.87
_MAX_LOCATION = 1.0  # independent draws of a normal have about N^(-1/2)
_COLLAPSED = 0.1  # mean variance ratio
_SD_SHARE = 0.95  # standard deviation that the default number of particles keeps
_MIN_PARTICLES, _MAX_PARTICLES = 100, 2000


class CloudDiagnostics(NamedTuple):
    r"""Identities of the scores of a cloud, and its discrepancy.

    Attributes:
        virial: mean of :math:`(x_k - \bar x_k) s_k`; -1 if the cloud is right.
        location: mean score times standard deviation; 0 if the cloud is right.
        ksd: root of the V-statistic of the kernel Stein discrepancy in the coordinates of the cloud, for an inverse
            multiquadric as wide as the median distance.
    """

    virial: Float[Array, " d"]
    location: Float[Array, " d"]
    ksd: Float[Array, ""]


def diagnose(
    table: Float[Array, "N d"],
    scores: Float[Array, "N d"],
    z: Float[Array, "N d"],
    scores_in_z: Float[Array, "N d"],
    mask: Bool[Array, " N"],
) -> CloudDiagnostics:
    """Return the identities in the units of the positions, and the discrepancy in the coordinates of the cloud.

    Args:
        table: particles.
        scores: gradients of the log density at the particles.
        z: particles in the coordinates of the cloud.
        scores_in_z: scores in these coordinates.
        mask: which particles count.
    """
    scores, scores_in_z = (jnp.where(mask[:, None], a, 0) for a in (scores, scores_in_z))
    mean, spread = moments(table, mask)
    square = squared_bandwidth("median", z, mask, jnp.int32(2**30))
    count = jnp.maximum(jnp.sum(mask.astype(z.dtype)), 1)
    kernel = InverseMultiquadric(lengthscale=jnp.sqrt(square))
    weights = mask.astype(z.dtype)[:, None]
    sums = stein_sums((kernel,), jnp.where(mask[:, None], z, 0), scores_in_z, weights)
    diagonal = jnp.sum(jnp.where(mask, jnp.sum(scores_in_z**2, axis=1) + z.shape[1] / square, 0))
    return CloudDiagnostics(
        virial=masked_mean(mask, (table - mean) * scores),
        location=masked_mean(mask, scores) * spread,
        ksd=jnp.sqrt(jnp.maximum(sums.forms[0] + diagonal, 0)) / count,
    )


def predicted_sd(num_particles: int, num_dims: int) -> float:
    r"""Return the share of a Gaussian's standard deviation that N particles keep, :math:`(1 + (e - 2) d/N)^{-1/2}`.

    A mean-field balance: in high dimension all distances are near the median, where the kernel is 1/e, but the kernel
    of a particle with itself is 1, which pulls it to the mode. It holds for the median bandwidth, not for the median
    over log N, and is too high if there are more dimensions than particles (0.64 instead of 0.54 at d = 2 N, see
    ``benchmarks/coin_collapse.py``).

    Args:
        num_particles: N.
        num_dims: d.

    Raises:
        ValueError: There is no particle, or no dimension.
    """
    if num_particles < 1 or num_dims < 1:
        raise ValueError(
            f"expected at least one particle and one dimension, got {num_particles} and {num_dims}"
        )
    return 1 / math.sqrt(1 + (math.e - 2) * num_dims / num_particles)


def particles_for(num_dims: int) -> int:
    """Return the number of particles that keep 95 % of the standard deviation in this dimension, from 100 to 2000."""
    needed = (math.e - 2) * num_dims / (1 / _SD_SHARE**2 - 1)
    return int(min(max(_MIN_PARTICLES, 10 * math.ceil(needed / 10)), _MAX_PARTICLES))


def describe_misfit(virial: Any, num_particles: int, location: Any = 0.0, *, exact: bool = True) -> str:
    """Return what is wrong with the location or the width of a cloud, with advice; an empty string if nothing is.

    Args:
        virial: of all coordinates, (d,).
        num_particles: N.
        location: of all coordinates, (d,).
        exact: whether the advice may name methods that need the exact log density.
    """
    max_location = float(np.max(np.abs(location)))
    if max_location > _MAX_LOCATION:
        advice = (
            "compare with mcmc.NUTS(), or start nearer" if exact else "use larger batches, or raise max_steps"
        )
        return (
            "the cloud is not where its density is (mean score times standard deviation = "
            f"{max_location:.2g} in one coordinate, 0 is right): it has stopped where its direction vanishes, or has "
            f"not arrived; {advice}"
        )
    ratio = -float(np.mean(virial))
    num_dims = len(virial)
    predicted = predicted_sd(num_particles, num_dims)
    if ratio > _WIDE:
        return f"the cloud is wider than its density (mean -E[x s] = {ratio:.2f}, 1 is right): it has not settled"
    if ratio >= _NARROW and predicted >= _MIN_PREDICTED_SD:
        return ""
    if ratio < _COLLAPSED:
        return (
            f"the density does not hold the cloud (mean -E[x s] = {ratio:.2f}, 1 is right): the cloud has collapsed, "
            "the density is flat there, or its scale is still far away (raise max_steps)"
        )
    more = max(particles_for(num_dims), 2 * num_particles)
    return (
        f"the cloud is too narrow (mean -E[x s] = {ratio:.2f}, 1 is right; {num_particles} particles in {num_dims} "
        f"dimensions keep about {predicted:.0%} of a standard deviation): use num_particles={more}"
        + (", or polish='hmc'" if exact else "")
    )
