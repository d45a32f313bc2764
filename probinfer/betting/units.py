r"""From a bettor to an optax transformation: with a unit of length, or with one found in restarts.

A bettor is an object with ``norm``, ``start``, ``advance`` and ``freeze``. Without a unit the game is played in epochs
that end at steps 16, 32, 64, 128, ... The first walks from the tiny unit 1e-6 (1 + \|x\|) and every other one starts
from the current iterate, without memory, in units of a quarter of the largest displacement of the epoch before. In a
walk each group steps :math:`D / \sqrt G` along its outcome, the distance travelled in the epoch (at least the unit)
over the root of the squared gradients of the epoch: the distance doubles as long as the outcomes agree, so nothing of
the scale of the parameters is left to choose, and steps shrink under noise. A coin bets in the epochs from step 16 to
64 and walks again after that. The constants were chosen on quadratics and one logistic regression;
``benchmarks/betting.py`` shows these and others beside Adam.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer.betting import groups, moves
from probinfer.core.errors import shortened
from probinfer.core.types import Array, ArrayTree, pytree, strong_array

__all__ = ["RestartState", "check_unit", "checked_number", "transformation"]

_START = 1e-6  # unit of the first epoch, relative to 1 + |x|
_FIRST = 16  # steps of the first epoch; later ones end at the powers of two
_SHARE = 0.25  # unit of an epoch over the farthest displacement of the one before


class RestartState(NamedTuple):
    """What a bettor that looks for its unit remembers beside its ``bet``, whose displacement is from the last restart.

    ``unit`` is the unit of this epoch, ``farthest`` the largest displacement before the last step and ``root_sum`` the
    root of the sum of squared outcomes in it, one number a group each; ``num_steps`` counts steps, ``num_nonfinite``
    the groups that were frozen, summed over the steps.
    """

    bet: Any
    unit: Any
    farthest: Any
    root_sum: Any
    num_steps: Any
    num_nonfinite: Any


@pytree
class _Betting:
    """A bettor, and a unit, or the step after which distance over gradients takes over from its bets."""

    bettor: Any
    unit: Any
    num_bets: Any


def check_unit(unit: Any) -> Any:
    """The unit as a number.

    Raises:
        TypeError: no number.
        ValueError: not positive.
    """
    what = "is a length and must be positive"
    return checked_number("unit", unit, what, lambda value: value > 0, "; None finds one")


def checked_number(name: str, value: Any, what: str, holds: Any, more: str = "") -> Any:
    """A number as a float; traced ones are not looked at.

    A Python number is data where a transformation is an argument of a jitted function, so that another number traces
    nothing, and it is none where flax asks a static attribute to hold no arrays (``nnx.Optimizer``).

    Raises:
        TypeError: no number.
        ValueError: one for which ``holds`` is False.
    """
    array = strong_array(value)
    if isinstance(array, jax.core.Tracer):
        return array
    if not isinstance(array, jax.Array) or array.ndim or not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"{name} {what}, got {shortened(value)}{more}")
    if not bool(holds(array)):
        raise ValueError(f"{name} {what}, got {value}{more}")
    return float(array)


def transformation(
    bettor: Any, unit: Any | None, num_bets: int | None = None
) -> optax.GradientTransformation:
    """The optax transformation of a bettor; with ``unit`` None it walks 16 steps, then bets up to step ``num_bets``."""
    if unit is None:
        limit = int(jnp.iinfo(jnp.int32).max) if num_bets is None else num_bets
        functions, betting = (_init_restarts, _update_restarts), _Betting(bettor, None, limit)
    else:
        functions, betting = (_init, _update), _Betting(bettor, check_unit(unit), None)
    return optax.GradientTransformation(*(jax.tree_util.Partial(fn, betting) for fn in functions))


def _init(betting: _Betting, params: ArrayTree) -> Any:
    groups.check_params(params, particles=betting.bettor.norm == "particle")
    return betting.bettor.start(params)


def _update(betting: _Betting, updates: ArrayTree, state: Any, params: ArrayTree | None = None) -> Any:
    bettor = betting.bettor
    outcome, usable = _outcomes(bettor, updates)
    made, real = moves.displacements(state, updates, params)
    state = state._replace(displacement=made)
    numbers = groups.size(bettor.norm, made)
    unit = jax.tree.map(lambda number: jnp.full(number.shape, betting.unit, number.dtype), numbers)
    new, usable = _freeze(bettor, usable, bettor.advance(state, outcome, unit), state)
    return moves.emitted(bettor.norm, usable, new.displacement, real, updates), new


def _outcomes(bettor: Any, updates: ArrayTree) -> tuple[ArrayTree, ArrayTree]:
    """Outcomes, zero in the groups where one is not finite, and which groups are usable."""
    raw = groups.outcomes(updates)
    usable = groups.finite(bettor.norm, raw)
    return groups.select(bettor.norm, usable, raw, groups.zeros(raw)), usable


def _freeze(bettor: Any, usable: ArrayTree, new: Any, old: Any) -> tuple[Any, ArrayTree]:
    """Keep the state of groups whose outcome or bet is not finite."""
    bets = groups.finite(bettor.norm, new.displacement)
    usable = jax.tree.map(jnp.logical_and, usable, bets)
    return bettor.freeze(usable, new, old), usable


def _init_restarts(betting: _Betting, params: ArrayTree) -> RestartState:
    bet = _init(betting, params)
    sizes = groups.size(betting.bettor.norm, groups.outcomes(params))
    unit = jax.tree.map(lambda size: _START * (1 + size), sizes)
    none = jax.tree.map(jnp.zeros_like, unit)
    count = jnp.zeros((), jnp.int32)
    return RestartState(bet, unit, none, none, count, count)


def _update_restarts(
    betting: _Betting, updates: ArrayTree, state: RestartState, params: ArrayTree | None = None
) -> tuple[ArrayTree, RestartState]:
    bettor = betting.bettor
    outcome, usable = _outcomes(bettor, updates)
    made, real = moves.displacements(state.bet, updates, params)
    state, real = _next_epoch(bettor, _settled(bettor, state, made), real)
    root_sum = jax.tree.map(jnp.hypot, state.root_sum, groups.size(bettor.norm, outcome))
    bet = bettor.advance(state.bet, outcome, state.unit)
    walk = state.bet._replace(displacement=_walk(bettor, state, outcome, root_sum))
    betting_now = (state.num_steps >= _FIRST) & (state.num_steps < betting.num_bets)
    proposed = _where(betting_now, bet, walk)
    bet, usable = _freeze(bettor, usable, proposed, state.bet)
    root_sum = groups.choose(usable, root_sum, state.root_sum)
    new = state._replace(
        bet=bet, root_sum=root_sum, num_steps=state.num_steps + 1, num_nonfinite=bet.num_nonfinite
    )
    return moves.emitted(bettor.norm, usable, bet.displacement, real, updates), new


def _settled(bettor: Any, state: RestartState, made: ArrayTree) -> RestartState:
    """The state with the displacement that was made by the last step."""
    farthest = jax.tree.map(jnp.maximum, state.farthest, groups.size(bettor.norm, made))
    return state._replace(bet=state.bet._replace(displacement=made), farthest=farthest)


def _next_epoch(bettor: Any, state: RestartState, real: ArrayTree) -> tuple[RestartState, ArrayTree]:
    """The state, restarted where an epoch is over, and the displacement of the parameters from its start."""
    over = (state.num_steps >= _FIRST) & (state.num_steps & (state.num_steps - 1) == 0)
    rest = jax.tree.map(jnp.subtract, real, state.bet.displacement)
    return _where(over, (_restarted(bettor, state), rest), (state, real))


def _walk(bettor: Any, state: RestartState, outcome: ArrayTree, root_sum: ArrayTree) -> ArrayTree:
    """The displacement after a step D / sqrt(G) along the outcome."""

    def rate(unit: Array, farthest: Array, root: Array) -> Array:
        some = jnp.where(root > 0, root, jnp.ones_like(root))
        return jnp.where(root > 0, jnp.maximum(unit, farthest) / some, jnp.zeros_like(root))

    rates = jax.tree.map(rate, state.unit, state.farthest, root_sum)
    steps = jax.tree.map(jnp.multiply, outcome, groups.spread(bettor.norm, rates, outcome))
    return jax.tree.map(jnp.add, state.bet.displacement, steps)


def _restarted(bettor: Any, state: RestartState) -> RestartState:
    """The state at the start of the next epoch."""
    unit = jax.tree.map(lambda far, old: jnp.where(far > 0, _SHARE * far, old), state.farthest, state.unit)
    none = jax.tree.map(jnp.zeros_like, unit)
    start = jax.tree.map(jnp.add, state.bet.start, state.bet.displacement)
    bet = bettor.start(start)._replace(num_nonfinite=state.num_nonfinite)
    return RestartState(bet, unit, none, none, state.num_steps, state.num_nonfinite)


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
