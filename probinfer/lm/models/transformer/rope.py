r"""Rotary positions: pairs of coordinates of queries and keys are rotated by angles that grow with the position.

At position p the coordinates i and i + D/2 of a head are rotated by :math:`p\,\omega_i`,
:math:`\omega_i = \theta^{-2i/D}`. The scalings change the frequencies, so that a model can use positions beyond those
of its training.

References:
    Su et al. (2021), "RoFormer: Enhanced transformer with rotary position embedding". Chen et al. (2023), "Extending
    context window of large language models via position interpolation" (linear). Peng et al. (2023), "YaRN: Efficient
    context window extension of large language models", section 3. Grattafiori et al. (2024), "The Llama 3 herd of
    models", section 3.4 (llama3).
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import close_matches
from probinfer.core.types import Array, Float, Int

__all__ = ["KINDS", "Rope", "angles", "frequencies", "rotate"]

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies of the rotation.

    Attributes:
        kind: "default", "linear" (all frequencies are divided by ``factor``), "dynamic" (the base grows once the
            sequence is longer than the context of the model), "llama3" or "yarn" (low frequencies are divided by
            ``factor``, high ones unchanged).
        theta: base of the frequencies.
        factor: factor of the extension of the context, 1 or more.
        original_context: context of the training before the extension (llama3, yarn); ``None``: max_context.
        low: yarn: number of turns over the original context below which a frequency is divided; llama3:
            low_freq_factor.
        high: yarn: number of turns above which a frequency is unchanged; llama3: high_freq_factor.
        attention_factor: yarn: multiplies queries and keys; ``None``: 0.1 log(factor) + 1, or from the two below.
        mscale: yarn: slope of that logarithm in the numerator, with ``mscale_all`` in the denominator.
        mscale_all: yarn: see ``mscale``.
        truncate: yarn: the ends of the ramp are rounded outwards to integers.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int | None = None
    low: float = 1.0
    high: float = 32.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of rotation {self.kind!r}{close_matches(self.kind, KINDS)}")
        if not self.theta > 1.0 or not self.factor >= 1.0:
            raise ValueError(
                f"a rotation needs theta > 1 and factor >= 1; got {self.theta} and {self.factor}"
            )
        if self.kind in ("llama3", "yarn") and not 0 < self.low < self.high:
            raise ValueError(
                f"a {self.kind} rotation needs 0 < low < high; got low = {self.low}, high = {self.high}"
            )


def frequencies(rope: Rope, dim: int, context: int, length: int | None = None) -> tuple[np.ndarray, float]:
    r"""Return frequencies :math:`\omega_i` (D/2,) and the factor on queries and keys.

    Args:
        rope: the rotation.
        dim: width D of a head.
        context: context of the model.
        length: length of the whole sequence, if longer than ``context``; used by "dynamic" alone.

    Returns:
        Radians per position, float64, and the factor.
    """
    plain = rope.theta ** (-np.arange(0, dim, 2) / dim)
    original = rope.original_context or context
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "dynamic":
        growth = rope.factor * max(length or 0, context) / context - (rope.factor - 1)
        return (rope.theta * growth ** (dim / (dim - 2))) ** (-np.arange(0, dim, 2) / dim), 1.0
    if rope.kind == "llama3":
        # weight 1 leaves the frequency unchanged, 0 divides it by the factor
        num_turns = original * plain / (2 * math.pi)
        weight = np.clip((num_turns - rope.low) / (rope.high - rope.low), 0.0, 1.0)
        return plain * (weight + (1 - weight) / rope.factor), 1.0
    if rope.kind == "yarn":
        weight = 1 - _ramp(rope, dim, original)
        return plain * (weight + (1 - weight) / rope.factor), _attention_factor(rope)
    return plain, 1.0


def _ramp(rope, dim, original):
    """Rise from 0 at the index that makes ``high`` turns over the original context to 1 at that of ``low``."""

    def index(num_turns):
        return dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = index(rope.high), index(rope.low)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    return np.clip((np.arange(dim // 2) - first) / ((last - first) or 1e-3), 0.0, 1.0)


def _attention_factor(rope):
    def scale(slope):
        return 0.1 * slope * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    if rope.mscale and rope.mscale_all:
        return scale(rope.mscale) / scale(rope.mscale_all)
    return scale(1.0)


def angles(
    omega: np.ndarray, factor: float, positions: Int[Array, "*b"], dtype
) -> tuple[Float[Array, "*b h"], Float[Array, "*b h"]]:
    r"""Return cosines and sines of :math:`p\,\omega_i`, times the factor.

    Args:
        omega: frequencies (D/2,).
        factor: factor on queries and keys.
        positions: positions p.
        dtype: at least float32.

    Returns:
        Both (..., D/2).
    """
    radians = positions.astype(dtype)[..., None] * jnp.asarray(omega, dtype)
    return jnp.cos(radians) * dtype(factor), jnp.sin(radians) * dtype(factor)


def rotate(x: Float[Array, "*b d"], cos: Float[Array, "*c h"], sin: Float[Array, "*c h"]) -> Array:
    """Rotate the pairs (a, b) of coordinates i and i + D/2 to (a cos - b sin, b cos + a sin).

    Args:
        x: heads (..., D).
        cos: broadcastable to the halves (..., D/2).
        sin: likewise.

    Returns:
        Rotated heads, in the dtype of the cosines.
    """
    a, b = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
