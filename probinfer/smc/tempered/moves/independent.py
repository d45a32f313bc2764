r"""Independent moves of many particles: proposals from one frozen Student-t, no gradient.

The law q is a Student-t around the weighted pilot cloud of the level, its location and the root of its covariance. A
proposal :math:`u' \sim q` is accepted with probability :math:`\min(1, w(u')/w(u))`, :math:`w = \pi/q`: reversible for
:math:`\pi`. A move is several such tries. Its tails are heavier than those of a log-concave density, so that w is
bounded there; where it is not, a particle may stay for long. One law spans separate modes, and can exchange them.

References:
    South, Pettitt and Drovandi (2019), "Sequential Monte Carlo samplers with independent Markov chain Monte Carlo
    proposals". Mengersen and Tweedie (1996), theorem 2.1 (bounded w).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.inference.engine import over
from probinfer.numerics.covariance_factor import push, standardized
from probinfer.smc.tempered.bridge import FREEDOM
from probinfer.smc.tempered.moves.hamiltonian import Moved

__all__ = ["independent_moves"]


class _Places(NamedTuple):
    """Positions (N, d) with log ratio and log importance weight (N,)."""

    position: Any
    log_ratio: Any
    log_weight: Any


def independent_moves(
    key: PRNGKey,
    density: Callable,
    positions: Float[Array, "n d"],
    loc: Float[Array, " d"],
    root: Float[Array, "..."],
    tries: Int[Array, ""],
    *,
    num_moves: int,
    mode: str,
) -> Moved:
    """Move every particle ``num_moves`` times and keep all states.

    Args:
        key: random key.
        density: position (d,) -> (log density, log ratio).
        positions: of the particles.
        loc: location of the proposals.
        root: of the covariance of the particles, see ``spread``; the scale of the proposals.
        tries: proposals in a move, 1 or more.
        num_moves: how many.
        mode: particles one after another ("map"), side by side ("vmap"), or as the device asks ("auto").

    Returns:
        The states and their accounts; acceptance is that of a single proposal, the step size NaN.
    """
    num, dimension = positions.shape
    started = standardized(root, positions - loc)

    def attempt(key, places, first):
        # z sqrt(df / chi2_df), the chi-squared a sum of squared normals; the last column decides
        normal = jax.random.normal(key, (num, dimension + FREEDOM + 1), positions.dtype)
        z, rest, last = normal[:, :dimension], normal[:, dimension:-1], normal[:, -1]
        z = jnp.where(first, started, z / jnp.sqrt(jnp.mean(rest**2, axis=1, keepdims=True)))
        proposed = jnp.where(first, positions, loc + jax.vmap(lambda z: push(root, z))(z))
        logdensity, log_ratio = over(density, mode, proposed)
        log_law = -(FREEDOM + dimension) / 2 * jnp.log1p(jnp.sum(z**2, axis=1) / FREEDOM)
        gain = logdensity - log_law - places.log_weight
        gain = jnp.where(jnp.isnan(gain), -jnp.inf, gain)
        taken = first | (jax.scipy.special.log_ndtr(last) < gain) | (log_ratio == jnp.inf)
        new = _Places(proposed, log_ratio, logdensity - log_law)
        chosen = jax.tree.map(
            lambda a, b: jnp.where(taken.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, places
        )
        return chosen, jnp.mean(jnp.exp(jnp.minimum(gain, 0)))

    def move(places, pack):
        key, index = pack
        # The first move has one try, which is the start and is taken: so starts are evaluated in the one place.
        count = jnp.where(index == 0, 1, tries)

        def once(i, carry):
            places, total = carry
            places, rate = attempt(jax.random.fold_in(key, i), places, index == 0)
            return places, total + rate

        places, total = lax.fori_loop(0, count, once, (places, jnp.zeros((), positions.dtype)))
        return places, (places.position, places.log_ratio, total / count.astype(total.dtype), count)

    nothing = jnp.zeros(num, positions.dtype)
    _, (states, log_ratios, rates, counts) = lax.scan(
        move,
        _Places(positions, nothing, nothing),
        (jax.random.split(key, num_moves + 1), jnp.arange(num_moves + 1)),
    )
    spent = num * jnp.sum(counts, dtype=jnp.int32)
    step_size = jnp.full((), jnp.nan, positions.dtype)
    return Moved(states, log_ratios, rates, step_size, jnp.zeros_like(spent), spent)
