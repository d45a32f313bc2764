r"""The optax transformation of a bettor, with a given unit of length or with one that restarts estimate.

A bettor is an object with ``norm``, ``init``, ``advance`` and ``freeze``. If no unit is given, the run is split into
epochs that end at steps 16, 32, 64, 128, ... The first epoch walks from the tiny unit 1e-6 (1 + \|x\|); every other one
starts at the current iterate, with a fresh state, in units of a quarter of the largest displacement of the previous
epoch. In a walk each group steps :math:`D / \sqrt G` along its outcome, the distance traveled in the epoch (at least
the unit) over the root of the squared gradients of the epoch: the distance doubles as long as the outcomes agree, so
the scale of the parameters need not be known, and steps shrink under noise. A coin bets in the epochs from step 16 to
64 and walks again after that. The constants were chosen on quadratics and one logistic regression;
``benchmarks/betting.py`` compares them with others and with Adam.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer.betting import groups, moves
from probinfer.core.errors import shortened
from probinfer.core.trees import select
from probinfer.core.types import Array, ArrayTree, Int, pytree, strong_array

__all__ = ["RestartState", "check_unit", "checked_number", "transformation"]

_RELATIVE_UNIT = 1e-6  # unit of the first epoch, relative to 1 + |x|
_FIRST_EPOCH = 16  # steps of the first epoch; later ones end at the powers of two
_SHARE = 0.25  # unit of an epoch, relative to the largest displacement of the previous one


class RestartState(NamedTuple):
    r"""State of a bettor that estimates its unit.

    Attributes:
        bet: state of the bettor since the last restart, a ``CoinState`` or ``KTState``.
        unit: w, the unit of this epoch, one number per group.
        farthest: D, the largest displacement in this epoch before the last step, one number per group.
        root_sum: :math:`\sqrt G`, the root of the sum of squared outcomes in this epoch, one number per group.
        num_steps: number of steps.
        num_nonfinite: number of frozen groups, summed over the steps.
    """

    bet: Any
    unit: ArrayTree
    farthest: ArrayTree
    root_sum: ArrayTree
    num_steps: Int[Array, ""]
    num_nonfinite: Int[Array, ""]


@pytree
class _Betting:
    """A bettor with its unit, or else with the step after which distance over gradients replaces its bets."""

    bettor: Any
    unit: Any
    num_bets: Any


def check_unit(unit: Any) -> Any:
    """Return the unit as a number.

    Raises:
        TypeError: The unit is not a number.
        ValueError: The unit is not positive.
    """
    requirement = "is a length and must be positive"
    return checked_number("unit", unit, requirement, lambda value: value > 0, "; None estimates one")


def checked_number(name: str, value: Any, requirement: str, is_valid: Any, suffix: str = "") -> Any:
    """Return a number as a float; traced numbers are not checked.

    A float rather than an array: it is still data if the transformation is an argument of a jitted function, so that
    another number compiles nothing, and flax accepts it in a static attribute (``nnx.Optimizer``).

    Raises:
        TypeError: The value is not a number.
        ValueError: ``is_valid`` is False for the number.
    """
    array = strong_array(value)
    if isinstance(array, jax.core.Tracer):
        return array
    if not isinstance(array, jax.Array) or array.ndim or not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"{name} {requirement}, got {shortened(value)}{suffix}")
    if not bool(is_valid(array)):
        raise ValueError(f"{name} {requirement}, got {value}{suffix}")
    return float(array)


def transformation(
    bettor: Any, unit: Any | None, num_bets: int | None = None
) -> optax.GradientTransformation:
    """Return the optax transformation of a bettor.

    Args:
        bettor: with ``norm``, ``init``, ``advance`` and ``freeze``.
        unit: its unit; None: estimated in epochs.
        num_bets: without a unit, the step after which it walks again; None: never.
    """
    if unit is None:
        limit = int(jnp.iinfo(jnp.int32).max) if num_bets is None else num_bets
        functions, betting = (_init_restarts, _update_restarts), _Betting(bettor, None, limit)
    else:
        functions, betting = (_init, _update), _Betting(bettor, check_unit(unit), None)
    return optax.GradientTransformation(*(jax.tree_util.Partial(fn, betting) for fn in functions))


def _init(betting: _Betting, params: ArrayTree) -> Any:
    groups.check_params(params, particles=betting.bettor.norm == "particle")
    return betting.bettor.init(params)


def _update(betting: _Betting, updates: ArrayTree, state: Any, params: ArrayTree | None = None) -> Any:
    bettor = betting.bettor
    outcome, usable = _outcomes(bettor, updates)
    credited, actual = moves.displacements(state, updates, params)
    state = state._replace(displacement=credited)
    lengths = groups.lengths(bettor.norm, credited)
    unit = jax.tree.map(lambda length: jnp.full(length.shape, betting.unit, length.dtype), lengths)
    new, usable = _freeze(bettor, usable, bettor.advance(state, outcome, unit), state)
    return moves.updates_to_bet(bettor.norm, usable, new.displacement, actual, updates), new


def _outcomes(bettor: Any, updates: ArrayTree) -> tuple[ArrayTree, ArrayTree]:
    """Return the outcomes, zero in groups that are not finite, and which groups are usable."""
    outcome = groups.outcomes(updates)
    usable = groups.all_finite(bettor.norm, outcome)
    return groups.select_leaves(bettor.norm, usable, outcome, groups.zeros(outcome)), usable


def _freeze(bettor: Any, usable: ArrayTree, new: Any, old: Any) -> tuple[Any, ArrayTree]:
    """Keep the old state of groups whose outcome or bet is not finite."""
    finite = groups.all_finite(bettor.norm, new.displacement)
    usable = jax.tree.map(jnp.logical_and, usable, finite)
    return bettor.freeze(usable, new, old), usable


def _init_restarts(betting: _Betting, params: ArrayTree) -> RestartState:
    bet = _init(betting, params)
    lengths = groups.lengths(betting.bettor.norm, groups.outcomes(params))
    unit = jax.tree.map(lambda length: _RELATIVE_UNIT * (1 + length), lengths)
    count = jnp.zeros((), jnp.int32)
    return _start_epoch(bet, unit, count, count)


def _start_epoch(bet: Any, unit: ArrayTree, num_steps: Array, num_nonfinite: Array) -> RestartState:
    """Return the state at the start of an epoch."""
    zeros = jax.tree.map(jnp.zeros_like, unit)
    return RestartState(
        bet=bet,
        unit=unit,
        farthest=zeros,
        root_sum=zeros,
        num_steps=num_steps,
        num_nonfinite=num_nonfinite,
    )


def _update_restarts(
    betting: _Betting, updates: ArrayTree, state: RestartState, params: ArrayTree | None = None
) -> tuple[ArrayTree, RestartState]:
    bettor = betting.bettor
    outcome, usable = _outcomes(bettor, updates)
    credited, actual = moves.displacements(state.bet, updates, params)
    state, actual = _restart_if_due(bettor, _with_displacement(bettor, state, credited), actual)

    # Bet or walk
    root_sum = jax.tree.map(jnp.hypot, state.root_sum, groups.lengths(bettor.norm, outcome))
    bet = bettor.advance(state.bet, outcome, state.unit)
    walk = state.bet._replace(displacement=_walk(bettor, state, outcome, root_sum))
    is_bet = (state.num_steps >= _FIRST_EPOCH) & (state.num_steps < betting.num_bets)
    proposed = select(is_bet, bet, walk)

    # Freeze groups that are not finite
    bet, usable = _freeze(bettor, usable, proposed, state.bet)
    root_sum = groups.select_statistics(usable, root_sum, state.root_sum)
    new = state._replace(
        bet=bet, root_sum=root_sum, num_steps=state.num_steps + 1, num_nonfinite=bet.num_nonfinite
    )
    return moves.updates_to_bet(bettor.norm, usable, bet.displacement, actual, updates), new


def _with_displacement(bettor: Any, state: RestartState, displacement: ArrayTree) -> RestartState:
    """Return the state with the displacement that followed from the last step."""
    farthest = jax.tree.map(jnp.maximum, state.farthest, groups.lengths(bettor.norm, displacement))
    return state._replace(bet=state.bet._replace(displacement=displacement), farthest=farthest)


def _restart_if_due(bettor: Any, state: RestartState, actual: ArrayTree) -> tuple[RestartState, ArrayTree]:
    """Return the state, restarted at the end of an epoch, and the parameters' displacement from its start."""
    epoch_ended = (state.num_steps >= _FIRST_EPOCH) & (state.num_steps & (state.num_steps - 1) == 0)
    remainder = jax.tree.map(jnp.subtract, actual, state.bet.displacement)
    return select(epoch_ended, (_restart(bettor, state), remainder), (state, actual))


def _walk(bettor: Any, state: RestartState, outcome: ArrayTree, root_sum: ArrayTree) -> ArrayTree:
    """Return the displacement after a step D / sqrt(G) along the outcome."""

    def rate(unit: Array, farthest: Array, root: Array) -> Array:
        divisor = jnp.where(root > 0, root, jnp.ones_like(root))
        return jnp.where(root > 0, jnp.maximum(unit, farthest) / divisor, jnp.zeros_like(root))

    rates = jax.tree.map(rate, state.unit, state.farthest, root_sum)
    steps = jax.tree.map(jnp.multiply, outcome, groups.broadcast(bettor.norm, rates, outcome))
    return jax.tree.map(jnp.add, state.bet.displacement, steps)


def _restart(bettor: Any, state: RestartState) -> RestartState:
    """Return the state at the start of the next epoch."""
    unit = jax.tree.map(
        lambda farthest, old: jnp.where(farthest > 0, _SHARE * farthest, old), state.farthest, state.unit
    )
    start = jax.tree.map(jnp.add, state.bet.start, state.bet.displacement)
    bet = bettor.init(start)._replace(num_nonfinite=state.num_nonfinite)
    return _start_epoch(bet, unit, state.num_steps, state.num_nonfinite)
