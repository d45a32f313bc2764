"""Moments of the latent function at new inputs, and the precision with which they are computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from probinfer.core.status import Status
from probinfer.core.types import Array, Bool, Float, Int, pytree

__all__ = ["LatentMoments"]


@pytree
class LatentMoments:
    """Mean and variance of the latent function at M inputs; unpacks as the pair ``mean, variance``.

    Attributes:
        mean: means ``(M,)``.
        variance: variances ``(M,)``.
        floor: the size ``(M,)`` of the rounding errors of variance and mean. A variance below it is accurate in its
            order of magnitude only.
    """

    mean: Any
    variance: Any
    floor: Any

    @property
    def lost(self) -> Bool[Array, " M"]:
        """Whether the variance is below its floor."""
        return self.variance < self.floor

    @property
    def status(self) -> Int[Array, ""]:
        """``Status``: ``NON_FINITE``, ``PRECISION_LOST`` if a variance is below its floor, or ``OK``."""
        finite = jnp.all(jnp.isfinite(self.mean) & jnp.isfinite(self.variance))
        lost = jnp.where(jnp.any(self.lost), int(Status.PRECISION_LOST), int(Status.OK))
        return jnp.where(finite, lost, int(Status.NON_FINITE)).astype(jnp.int32)

    @property
    def stddev(self) -> Float[Array, " M"]:
        """Standard deviations."""
        return jnp.sqrt(self.variance)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the mean and the variance."""
        return iter((self.mean, self.variance))

    def __getitem__(self, index: Any) -> Any:
        """``[0]`` is the mean, ``[1]`` the variance."""
        return (self.mean, self.variance)[index]

    def __len__(self) -> int:
        """Two: a mean and a variance."""
        return 2
