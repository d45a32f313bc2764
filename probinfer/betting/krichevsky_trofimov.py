"""The bettor of Krichevsky and Trofimov: the share of the wealth that is bet is the mean outcome, shrunk once."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer.betting import groups
from probinfer.betting.groups import Norm
from probinfer.betting.units import transformation
from probinfer.core.types import ArrayTree, field, pytree

__all__ = ["KT", "KTState", "kt"]


class KTState(NamedTuple):
    """What the bettor remembers.

    ``start``, ``displacement`` zeta from there and ``total``, the sum of the normalised outcomes, are trees like the
    parameters (at least float32); ``gain`` (the wealth less what it started with), ``largest`` and ``num_outcomes``
    hold one number a group. ``num_nonfinite`` counts the groups that were frozen, summed over the steps.
    """

    start: Any
    displacement: Any
    total: Any
    gain: Any
    largest: Any
    num_outcomes: Any
    num_nonfinite: Any


@pytree
class KT:
    """The recursion of :func:`kt`; the unit comes with every step."""

    norm: Norm = field(static=True)

    def start(self, params: ArrayTree) -> KTState:
        """A state without outcomes."""
        still = groups.zeros(params)
        none = groups.size(self.norm, still)
        return KTState(groups.wide(params), still, still, none, none, none, jnp.zeros((), jnp.int32))

    def advance(self, state: KTState, outcome: ArrayTree, unit: ArrayTree) -> KTState:
        """Take one finite outcome, bet again."""
        largest = jax.tree.map(jnp.maximum, state.largest, groups.size(self.norm, outcome))
        some = jax.tree.map(lambda top: jnp.where(top > 0, top, jnp.ones_like(top)), largest)
        normal = jax.tree.map(jnp.divide, outcome, groups.spread(self.norm, some, outcome))
        gain = jax.tree.map(jnp.add, state.gain, groups.inner(self.norm, state.displacement, normal))
        total = jax.tree.map(jnp.add, state.total, normal)
        count = jax.tree.map(lambda t, top: t + (top > 0).astype(t.dtype), state.num_outcomes, largest)
        rate = jax.tree.map(lambda w, g, t: (w.astype(g.dtype) + g) / (t + 1), unit, gain, count)
        bet = jax.tree.map(jnp.multiply, total, groups.spread(self.norm, rate, total))
        return KTState(state.start, bet, total, gain, largest, count, state.num_nonfinite)

    def freeze(self, usable: ArrayTree, new: KTState, old: KTState) -> KTState:
        """Keep the old state of the groups that are not usable, and count them."""
        norm, count = self.norm, old.num_nonfinite + groups.count_frozen(usable)
        bet, total = (groups.select(norm, usable, new[i], old[i]) for i in (1, 2))
        gain, largest, num_outcomes = (groups.choose(usable, new[i], old[i]) for i in range(3, 6))
        return KTState(old.start, bet, total, gain, largest, num_outcomes, count)


def kt(*, norm: Norm = "element", unit: Any | None = None) -> optax.GradientTransformation:
    r"""Bet on normalised outcomes :math:`c_s = -\nabla f_s / \max_{r \le s} |\nabla f_r|`, |c| <= 1.

    .. math:: \zeta_t = \frac{\sum_{s \le t} c_s}{t + 1} \Big(w + \sum_{s \le t} \langle \zeta_{s-1}, c_s \rangle\Big)

    The wealth in brackets never falls to zero, and against any comparison u the regret of the bets is at most
    :math:`|u| \sqrt{T \log(1 + 24 T^2 |u|^2 / w^2)} + w`. That is a promise for the mean of the iterates.
    Last link of a chain, as :func:`probinfer.betting.coin`.

    Args:
        norm: who bets: "element", "block" or "particle", as in ``coin``.
        unit: the wealth w at the start in units of the parameters; the first step is half of it. None:
            found by 16 steps of distance over gradients, as in ``coin``; restarts at steps 16, 32, 64, ..., each with
            a quarter of the distance travelled since the last.

    Returns:
        A transformation of gradients of a loss; what is not finite is frozen and counted as in ``coin``.

    Raises:
        ValueError: an unknown norm, a unit that is not positive; from ``init``: no parameters, or particles without a
            common leading axis.
        TypeError: from ``init``: parameters that are not floating point.

    References:
        Orabona and Pal (2016), "Coin betting and parameter-free online learning", algorithm 1 and corollary 5.
    """
    groups.check_norm(norm)
    return transformation(KT(norm), unit)
