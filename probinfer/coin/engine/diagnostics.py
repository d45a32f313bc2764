r"""Is a cloud where it should be? Identities that hold for draws of the density, and what N particles can show.

Without references, from the scores alone: :math:`E[s_k] = 0`, and :math:`E[(x_k - E x_k) s_k] = -1`, whatever the
density, as long as it falls off. For a Gaussian the second is minus the variance of the cloud over its own (given the
other coordinates): nearer to zero than -1 means collapsed. The kernel Stein discrepancy alone does not see this: a
collapsed cloud may have a smaller one than independent draws.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from probinfer.coin.cloud.bandwidth import squared_bandwidth
from probinfer.coin.cloud.table import masked_mean
from probinfer.core.types import Array, Bool, Float
from probinfer.kernels import InverseMultiquadric
from probinfer.numerics.stein import stein_sums

__all__ = ["Judgement", "complaint", "judge", "particles_for", "predicted_sd"]

_NARROW, _WIDE = 0.75, 1.35  # of the mean variance ratio
_PREDICTED = 0.87
_AWAY = 1.0  # of a coordinate's location; independent draws of a normal have about N^(-1/2)
_NOTHING = 0.1
_WANTED = 0.95
_FEWEST, _MOST = 100, 2000


class Judgement(NamedTuple):
    r"""What the scores say of a cloud.

    ``virial`` (d,), mean of :math:`(x_k - \bar x_k) s_k`: -1 when right. ``location`` (d,), mean score times standard
    deviation: 0 when right. ``ksd``, the root of the V-statistic of the kernel Stein discrepancy in the coordinates of
    the cloud, inverse multiquadric as wide as the median distance.
    """

    virial: Float[Array, " d"]
    location: Float[Array, " d"]
    ksd: Float[Array, ""]


def judge(
    table: Float[Array, "N d"],
    scores: Float[Array, "N d"],
    z: Float[Array, "N d"],
    pulled: Float[Array, "N d"],
    keep: Bool[Array, " N"],
) -> Judgement:
    """Return the identities in the units of the positions, and the discrepancy in the coordinates of the cloud.

    Args:
        table: particles.
        scores: gradients of the log density there.
        z: particles in the coordinates of the cloud.
        pulled: scores in them.
        keep: which particles count.
    """
    scores, pulled = (jnp.where(keep[:, None], a, 0) for a in (scores, pulled))
    centred = table - masked_mean(keep, table)
    square = squared_bandwidth("median", z, keep, jnp.int32(2**30))
    count = jnp.maximum(jnp.sum(keep.astype(z.dtype)), 1)
    kernel = InverseMultiquadric(lengthscale=jnp.sqrt(square))
    weights = keep.astype(z.dtype)[:, None]
    sums = stein_sums((kernel,), jnp.where(keep[:, None], z, 0), pulled, weights)
    diagonal = jnp.sum(jnp.where(keep, jnp.sum(pulled**2, axis=1) + z.shape[1] / square, 0))
    return Judgement(
        virial=masked_mean(keep, centred * scores),
        location=masked_mean(keep, scores) * jnp.sqrt(masked_mean(keep, centred**2)),
        ksd=jnp.sqrt(jnp.maximum(sums.forms[0] + diagonal, 0)) / count,
    )


def predicted_sd(num_particles: int, num_dims: int) -> float:
    r"""Return the standard deviation that N particles keep of a Gaussian's: :math:`(1 + (e - 2) d/N)^{-1/2}`.

    A mean-field balance: in high dimension all distances are near the median, where the kernel is 1/e, but that of a
    particle with itself is 1, and pulls it to the mode. For the median bandwidth, not for that over log N. Too high
    where there are more dimensions than particles (0.64 for 0.54 at d = 2 N, ``benchmarks/coin_collapse.py``).

    Args:
        num_particles: N.
        num_dims: d.

    Raises:
        ValueError: fewer than one of either.
    """
    if num_particles < 1 or num_dims < 1:
        raise ValueError(
            f"expected at least one particle and one dimension, got {num_particles} and {num_dims}"
        )
    return 1 / math.sqrt(1 + (math.e - 2) * num_dims / num_particles)


def particles_for(num_dims: int) -> int:
    """Return how many particles keep 95 % of the standard deviation in so many dimensions: 100 to 2000."""
    needed = (math.e - 2) * num_dims / (1 / _WANTED**2 - 1)
    return int(min(max(_FEWEST, 10 * math.ceil(needed / 10)), _MOST))


def complaint(virial: Any, num_particles: int, location: Any = 0.0, *, exact: bool = True) -> str:
    """Say in words what is wrong with the place or the width of a cloud; nothing if nothing is.

    Args:
        virial: of all coordinates, (d,).
        num_particles: N.
        location: of all coordinates, (d,).
        exact: whether engines that need the exact log density can be advised.
    """
    away = float(np.max(np.abs(location)))
    if away > _AWAY:
        return (
            f"the cloud is not where its density is (mean score times standard deviation = {away:.2g} in one "
            "coordinate, 0 is right): it rests where its direction vanishes, or has not arrived; "
            + (
                "compare with mcmc.NUTS(), or start nearer"
                if exact
                else "take larger batches, or raise max_steps"
            )
        )
    ratio = -float(np.mean(virial))
    dims = len(virial)
    expected = predicted_sd(num_particles, dims)
    if ratio > _WIDE:
        return f"the cloud is wider than its density (mean -E[x s] = {ratio:.2f}, 1 is right): it has not settled"
    if ratio >= _NARROW and expected >= _PREDICTED:
        return ""
    if ratio < _NOTHING:
        return (
            f"the density does not hold the cloud (mean -E[x s] = {ratio:.2f}, 1 is right): it has collapsed, or "
            "the density is flat there, or its scale is still far away (raise max_steps)"
        )
    seen = (
        f"mean -E[x s] = {ratio:.2f}, 1 is right; {num_particles} particles in {dims} dimensions keep about "
    )
    more = max(particles_for(dims), 2 * num_particles)
    return (
        f"the cloud is too narrow ({seen}{expected:.0%} of a standard deviation): take num_particles={more}"
        + (", or polish='hmc'" if exact else "")
    )
