"""The Krichevsky-Trofimov bettor: it bets a share of its wealth that is the mean outcome, shrunk by t / (t + 1)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer.betting import groups
from probinfer.betting.groups import Norm
from probinfer.betting.units import transformation
from probinfer.core.types import Array, ArrayTree, Int, field, pytree

__all__ = ["KT", "KTState", "kt"]


class KTState(NamedTuple):
    r"""State of a Krichevsky-Trofimov bettor.

    Attributes:
        start: where the run started, a tree like the parameters (at least float32, as are the next two).
        displacement: :math:`\zeta`, the last bet, relative to ``start``.
        total: :math:`\sum c`, the sum of the normalized outcomes.
        gain: :math:`\sum \langle \zeta, c \rangle`, the wealth less its initial value w, one number per group.
        largest: the length of the largest gradient, one number per group.
        num_outcomes: number of outcomes since the first that was not zero, one number per group.
        num_nonfinite: number of frozen groups, summed over the steps.
    """

    start: ArrayTree
    displacement: ArrayTree
    total: ArrayTree
    gain: ArrayTree
    largest: ArrayTree
    num_outcomes: ArrayTree
    num_nonfinite: Int[Array, ""]


@pytree
class KT:
    """The recursion of :func:`kt`, given the unit at every step."""

    norm: Norm = field(static=True)

    def init(self, params: ArrayTree) -> KTState:
        """Return the state before the first outcome."""
        zeros = groups.zeros(params)
        group_zeros = groups.lengths(self.norm, zeros)
        return KTState(
            start=groups.widen(params),
            displacement=zeros,
            total=zeros,
            gain=group_zeros,
            largest=group_zeros,
            num_outcomes=group_zeros,
            num_nonfinite=jnp.zeros((), jnp.int32),
        )

    def advance(self, state: KTState, outcome: ArrayTree, unit: ArrayTree) -> KTState:
        """Collect the winnings of one finite outcome and place the next bet."""
        largest = jax.tree.map(jnp.maximum, state.largest, groups.lengths(self.norm, outcome))
        divisor = jax.tree.map(lambda top: jnp.where(top > 0, top, jnp.ones_like(top)), largest)
        normalized = jax.tree.map(jnp.divide, outcome, groups.broadcast(self.norm, divisor, outcome))
        winnings = groups.inner_products(self.norm, state.displacement, normalized)
        gain = jax.tree.map(jnp.add, state.gain, winnings)
        total = jax.tree.map(jnp.add, state.total, normalized)
        count = jax.tree.map(lambda t, top: t + (top > 0).astype(t.dtype), state.num_outcomes, largest)
        rate = jax.tree.map(lambda w, g, t: (w.astype(g.dtype) + g) / (t + 1), unit, gain, count)
        bet = jax.tree.map(jnp.multiply, total, groups.broadcast(self.norm, rate, total))
        return state._replace(displacement=bet, total=total, gain=gain, largest=largest, num_outcomes=count)

    def freeze(self, usable: ArrayTree, new: KTState, old: KTState) -> KTState:
        """Keep the old state of the groups that are not usable, and count them."""
        return groups.freeze(self.norm, usable, new, old, ("gain", "largest", "num_outcomes"))


def kt(*, norm: Norm = "element", unit: Any | None = None) -> optax.GradientTransformation:
    r"""Bet on normalized outcomes :math:`c_s = -\nabla f_s / \max_{r \le s} |\nabla f_r|`, |c| <= 1.

    .. math:: \zeta_t = \frac{\sum_{s \le t} c_s}{t + 1} \Big(w + \sum_{s \le t} \langle \zeta_{s-1}, c_s \rangle\Big)

    The wealth in brackets never falls to zero, and the regret of the bets against any u is at most
    :math:`|u| \sqrt{T \log(1 + 24 T^2 |u|^2 / w^2)} + w`, which is a guarantee for the mean of the iterates.
    Use it as the last link of a chain, as :func:`probinfer.betting.coin`.

    Args:
        norm: who bets: "element", "block" or "particle", as in ``coin``.
        unit: the initial wealth w in units of the parameters; the first step is half of it. None: estimated by 16 steps
            of distance over gradients, as in ``coin``, with restarts at steps 16, 32, 64, ..., each with a quarter of
            the distance traveled since the last.

    Returns:
        A transformation of gradients of a loss; groups that are not finite are frozen and counted as in ``coin``.

    Raises:
        ValueError: The norm is unknown, or the unit is not positive; from ``init``: there are no parameters, or the
            particles have no common leading axis.
        TypeError: From ``init``: the parameters are not floating point.

    References:
        Orabona and Pal (2016), "Coin betting and parameter-free online learning", algorithm 1 and corollary 5.
    """
    groups.check_norm(norm)
    return transformation(KT(norm), unit)
