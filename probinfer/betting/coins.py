"""Coin betting: bet a share of the wealth that past outcomes determine, in units of the largest outcome."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer.betting import groups
from probinfer.betting.groups import Norm
from probinfer.betting.units import checked_number, transformation
from probinfer.core.types import Array, ArrayTree, Int, field, pytree

__all__ = ["Coin", "CoinState", "coin"]

_NUM_BETS = 64  # without a given unit: the step after which distance over gradients replaces the coin


class CoinState(NamedTuple):
    r"""State of a coin.

    Attributes:
        start: where the run started, a tree like the parameters (at least float32, as are the next two).
        displacement: :math:`\zeta`, the last bet, relative to ``start``.
        total: :math:`S = \sum c`, the sum of the outcomes.
        length: :math:`A = \sum |c|`, one number per group.
        reward: :math:`R`, what the bets have won, one number per group.
        largest: :math:`L = \max |c|`, one number per group.
        num_nonfinite: number of frozen groups, summed over the steps.
    """

    start: ArrayTree
    displacement: ArrayTree
    total: ArrayTree
    length: ArrayTree
    reward: ArrayTree
    largest: ArrayTree
    num_nonfinite: Int[Array, ""]


@pytree
class Coin:
    """The recursion of :func:`coin`, given the unit at every step."""

    alpha: Any
    norm: Norm = field(static=True)

    def init(self, params: ArrayTree) -> CoinState:
        """Return the state before the first outcome."""
        zeros = groups.zeros(params)
        group_zeros = groups.lengths(self.norm, zeros)
        return CoinState(
            start=groups.widen(params),
            displacement=zeros,
            total=zeros,
            length=group_zeros,
            reward=group_zeros,
            largest=group_zeros,
            num_nonfinite=jnp.zeros((), jnp.int32),
        )

    def advance(self, state: CoinState, outcome: ArrayTree, unit: ArrayTree) -> CoinState:
        """Collect the winnings of one finite outcome and place the next bet."""
        lengths = groups.lengths(self.norm, outcome)
        largest = jax.tree.map(jnp.maximum, state.largest, lengths)
        length = jax.tree.map(jnp.add, state.length, lengths)
        winnings = groups.inner_products(self.norm, state.displacement, outcome)
        reward = jax.tree.map(lambda r, g: jnp.maximum(r + g, 0), state.reward, winnings)
        total = jax.tree.map(jnp.add, state.total, outcome)
        rate = jax.tree.map(self._rate, length, largest, reward, unit)
        bet = jax.tree.map(jnp.multiply, total, groups.broadcast(self.norm, rate, total))
        return state._replace(displacement=bet, total=total, length=length, reward=reward, largest=largest)

    def freeze(self, usable: ArrayTree, new: CoinState, old: CoinState) -> CoinState:
        """Keep the old state of the groups that are not usable, and count them."""
        return groups.freeze(self.norm, usable, new, old, ("length", "reward", "largest"))

    def _rate(self, length: Array, largest: Array, reward: Array, unit: Array) -> Array:
        """Return bet / S = (2 w + R / L) / max(A + L, alpha L), which squares no gradient and so cannot overflow."""
        nonzero = largest > 0
        safe_largest = jnp.where(nonzero, largest, jnp.ones_like(largest))
        dtype = safe_largest.dtype
        min_length = jnp.asarray(self.alpha, dtype) * safe_largest
        share = jnp.maximum(length + safe_largest, min_length)
        rate = (2 * unit.astype(dtype) + reward / safe_largest) / share
        return jnp.where(nonzero, rate, jnp.zeros_like(safe_largest))


def coin(
    *, alpha: Any = 0.0, norm: Norm = "element", unit: Any | None = None
) -> optax.GradientTransformation:
    r"""Bet on coins whose outcomes are minus the gradients; no learning rate.

    With outcome :math:`c = -\nabla f`, running maximum :math:`L = \max |c|`, :math:`A = \sum |c|`,
    :math:`S = \sum c` and reward :math:`R = \max(R + \langle \zeta, c \rangle, 0)`, the displacement from the start is

    .. math:: \zeta = \frac{S}{L \max(A + L, \alpha L)} (2 w L + R)

    so that the first step has the length ``unit`` = w (alpha up to 2) whatever the scale of the gradients.

    The emitted update leads from the current parameters to the start plus the bet, so this should be the **last link**
    of an ``optax.chain``. If the parameters are passed to ``update``, as ``optax`` recommends, the reward is computed
    from their actual displacement: they may be projected or clipped after the step, and may have low precision.
    Otherwise every emitted update is assumed to have been applied in full. Arithmetic is at least float32.

    If no unit is given, it is estimated in epochs that end at steps 16, 32, 64, ... In the first epoch each group steps
    along minus its gradient by the distance traveled in the epoch, initially 1e-6 (1 + \|x\|), over the root of its
    sum of squared gradients; coins follow up to step 64, in units of a quarter of the distance traveled in the
    previous epoch; later epochs step as the first one does, with that unit as the initial distance.

    Args:
        alpha: caution: the bet is at most S / (alpha L) times the wealth. 0 is the published sampler, 100 the published
            optimizer of neural networks.
        norm: who bets. "element": every number by itself. "block": one bet per leaf, with Euclidean lengths.
            "particle": the leading axis of every leaf indexes particles; one bet per particle over all leaves.
        unit: length of the first step in units of the parameters; 0.5 is the published update. Use 0.1 in coordinates
            that are standardized by a cloud of particles. None: estimated, as described above.

    Returns:
        A transformation of gradients of a loss. Groups with a gradient or a bet that is not finite do not move, their
        state does not change, and ``state.num_nonfinite`` counts them.

    Raises:
        ValueError: The norm is unknown, the unit is not positive, or alpha is negative; from ``init``: there are no
            parameters, or the particles have no common leading axis.
        TypeError: From ``init``: the parameters are not floating point.

    References:
        Orabona and Tommasi (2017), "Training deep networks without learning rates through coin betting", algorithm 2;
        Sharrock and Nemeth (2023), "Coin sampling", algorithm 3 (alpha = 0).
    """
    groups.check_norm(norm)
    alpha = checked_number(
        "alpha", alpha, "must be a number and must not be negative", lambda value: value >= 0
    )
    return transformation(Coin(alpha, norm), unit, _NUM_BETS)
