"""The coin: bet a share of the wealth, the share set by the outcomes so far, in units of the largest outcome."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer.betting import groups
from probinfer.betting.groups import Norm
from probinfer.betting.units import checked_number, transformation
from probinfer.core.types import Array, ArrayTree, field, pytree

__all__ = ["Coin", "CoinState", "coin"]

_NUM_BETS = 64  # without a unit: the last step of the coins


class CoinState(NamedTuple):
    """What a coin remembers.

    ``start``, ``displacement`` zeta from there and ``total`` S, the sum of the outcomes, are trees like the parameters
    (at least float32);
    ``length`` A, the sum of the sizes of the outcomes, ``reward`` R and ``largest`` L hold one number a group.
    ``num_nonfinite`` counts the groups that were frozen, summed over the steps.
    """

    start: Any
    displacement: Any
    total: Any
    length: Any
    reward: Any
    largest: Any
    num_nonfinite: Any


@pytree
class Coin:
    """The recursion of :func:`coin`; the unit comes with every step."""

    alpha: Any
    norm: Norm = field(static=True)

    def start(self, params: ArrayTree) -> CoinState:
        """A state without outcomes."""
        still = groups.zeros(params)
        none = groups.size(self.norm, still)
        return CoinState(groups.wide(params), still, still, none, none, none, jnp.zeros((), jnp.int32))

    def advance(self, state: CoinState, outcome: ArrayTree, unit: ArrayTree) -> CoinState:
        """Take one finite outcome, bet again."""
        sizes = groups.size(self.norm, outcome)
        largest = jax.tree.map(jnp.maximum, state.largest, sizes)
        length = jax.tree.map(jnp.add, state.length, sizes)
        gain = groups.inner(self.norm, state.displacement, outcome)
        reward = jax.tree.map(lambda r, g: jnp.maximum(r + g, 0), state.reward, gain)
        total = jax.tree.map(jnp.add, state.total, outcome)
        rate = jax.tree.map(self._rate, length, largest, reward, unit)
        bet = jax.tree.map(jnp.multiply, total, groups.spread(self.norm, rate, total))
        return CoinState(state.start, bet, total, length, reward, largest, state.num_nonfinite)

    def freeze(self, usable: ArrayTree, new: CoinState, old: CoinState) -> CoinState:
        """Keep the old state of the groups that are not usable, and count them."""
        norm, count = self.norm, old.num_nonfinite + groups.count_frozen(usable)
        bet, total = (groups.select(norm, usable, new[i], old[i]) for i in (1, 2))
        length, reward, largest = (groups.choose(usable, new[i], old[i]) for i in range(3, 6))
        return CoinState(old.start, bet, total, length, reward, largest, count)

    def _rate(self, length: Array, largest: Array, reward: Array, unit: Array) -> Array:
        """The bet per total outcome, (2 w + R / L) / max(A + L, alpha L): no product of two gradients."""
        some = largest > 0
        top = jnp.where(some, largest, jnp.ones_like(largest))
        share = jnp.maximum(length + top, jnp.asarray(self.alpha, top.dtype) * top)
        return jnp.where(some, (2 * unit.astype(top.dtype) + reward / top) / share, jnp.zeros_like(top))


def coin(
    *, alpha: Any = 0.0, norm: Norm = "element", unit: Any | None = None
) -> optax.GradientTransformation:
    r"""Bet on coins whose outcomes are minus the gradients; no learning rate.

    With outcome :math:`c = -\nabla f`, running maximum :math:`L = \max |c|`, :math:`A = \sum |c|`,
    :math:`S = \sum c` and reward :math:`R = \max(R + \langle \zeta, c \rangle, 0)`, the displacement from the start is

    .. math:: \zeta = \frac{S}{L \max(A + L, \alpha L)} (2 w L + R)

    so that the first step has the length ``unit`` = w (alpha up to 2) whatever the scale of the gradients.

    The emitted update leads from where the parameters are to the start plus the bet. It should be the **last link** of
    an ``optax.chain``. Where the parameters are given to ``update``, as ``optax`` asks, the reward counts the
    displacement that they show, so that they may be projected or clipped after the step and may be of low precision;
    without them every emitted update is believed to have been made in full. Arithmetic is at least float32.

    Without a unit a single iterate finds one, in epochs that end at steps 16, 32, 64, ... In the first each group steps
    along minus its gradient by the distance travelled in the epoch, at first 1e-6 (1 + \|x\|), over the root of its sum
    of squared gradients; coins follow up to step 64, in units of a quarter of the distance travelled in the epoch
    before; after that it walks again as in the first, from that unit.

    Args:
        alpha: wait: the bet is held below S / (alpha L) times the wealth. 0 is the published sampler, 100 the published
            optimiser of neural networks.
        norm: who bets. "element": every number for itself. "block": one bet a leaf, with Euclidean lengths.
            "particle": the leading axis of every leaf counts particles, one bet a particle over all leaves.
        unit: length of the first step in units of the parameters; 0.5 is the published update. In coordinates that
            are already relative to a cloud of particles: 0.1. None: found, as said above.

    Returns:
        A transformation of gradients of a loss. Groups with a gradient or a bet that is not finite do not move, their
        state does not change, and ``state.num_nonfinite`` counts them.

    Raises:
        ValueError: an unknown norm, a unit that is not positive, a negative alpha; from ``init``: no parameters, or
            particles without a common leading axis.
        TypeError: from ``init``: parameters that are not floating point.

    References:
        Orabona and Tommasi (2017), "Training deep networks without learning rates through coin betting", algorithm 2;
        Sharrock and Nemeth (2023), "Coin sampling", algorithm 3 (alpha = 0).
    """
    groups.check_norm(norm)
    alpha = checked_number(
        "alpha", alpha, "must be a number and must not be negative", lambda value: value >= 0
    )
    return transformation(Coin(alpha, norm), unit, _NUM_BETS)
