r"""Does a cloud stay where it is? Short trajectories from its particles, and places that earlier particles saw.

Identities of the scores hold nearly for a cloud that has no particle in the tails or in the neck of a funnel, and the
force on it vanishes. Trajectories of Hamiltonian Monte Carlo leave the density invariant: from a cloud that stands for
it, means and spreads stay; from one that does not, they leave, by what they are wrong by or a part of it. Each particle
takes 16 of them in the coordinates of the cloud, of 8 leapfrogs and of random step sizes over a factor of ten, for
densities whose scales vary. The second half counts.

Trajectories do not find another mode. Two more questions are cheap: whether some particles rest where the density is
hopelessly low beside the others, and whether an early particle stood where density is high, with a gorge between it and
all particles that there are. Whether the modes that the particles are in hold the right shares is asked by ``modes``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.coin.cloud import table as cloud
from probinfer.coin.cloud.views import logdensity_in_cloud
from probinfer.coin.cloud_descent import CloudState, geometry_of
from probinfer.coin.engine.modes import Shares, shares_of_modes, unseen
from probinfer.core.algorithms import Algorithm
from probinfer.core.types import Array, Bool, Float, Int, PRNGKey, Scalar
from probinfer.mcmc.hamiltonian import IntegratorState
from probinfer.mcmc.lanes.hmc import hmc_transition

__all__ = ["Trial", "blank", "complaint", "findings", "tried", "vouches"]

_MOVES, _LEAPFROGS = 16, 8
_SMALLEST, _LARGEST = 0.15, 1.5  # of the step sizes, in units of the one that is adapted
_ACCEPTANCE = 0.7
_SHIFT, _GROWTH, _OVERALL = 0.15, 1.2, 1.12  # what a cloud is not blamed for, beside
_ERRORS = 2.5  # standard errors
_CLOSE, _STEADY, _ACCEPTED = (
    0.3,
    1.3,
    0.3,
)  # the largest shift and growth, the least acceptance, that vouch for a cloud
_NEAR, _POINTS, _GORGE = 4, 7, 10.0  # final particles that an early one is joined to, places on the way, nats
_FACTOR = 1.5  # by which the shares of two modes may be off, beside
_AS_HIGH = 5.0  # nats below the median of the cloud


class Trial(NamedTuple):
    """What trajectories did to a cloud.

    Attributes:
        shift: (d,) what they moved the mean by, in standard deviations; 0 where the cloud is right.
        growth: (d,) the ratio of mean distances from the mean after and before; 1 where it is right.
        errors: (2, d) standard errors of both.
        overall: (2,) the mean growth over coordinates, and its standard error.
        acceptance: of the last moves.
        num_lost: particles that rest where the density is e^-(10 + 2 d) of the others' at most.
        depth: nats that the highest of them lies below the median; 0 without them.
        num_forsaken: early particles that saw high density where no particle is.
        shares: what the modes hold and what they should.
        num_gradients: spent.
    """

    shift: Float[Array, " d"]
    growth: Float[Array, " d"]
    errors: Float[Array, "2 d"]
    overall: Float[Array, "2"]
    acceptance: Scalar
    num_lost: Int[Array, ""]
    depth: Scalar
    num_forsaken: Int[Array, ""]
    shares: Shares
    num_gradients: Int[Array, ""]


def blank(dims: int, dtype: Any) -> Trial:
    """Return the trial that was not made: not a number, and nothing found."""
    nothing, none = jnp.full(dims, jnp.nan, dtype), jnp.zeros((), jnp.int32)
    zero = jnp.zeros((), dtype)
    twice = jnp.stack([nothing, nothing])
    return Trial(
        nothing,
        nothing,
        twice,
        zero + jnp.full(2, jnp.nan),
        zero + jnp.nan,
        none,
        zero,
        none,
        unseen(dtype),
        none,
    )


def complaint(trial: Trial, names: list[str]) -> str:
    """Say in words what trajectories found wrong; nothing if nothing is, or none was made.

    Args:
        trial: of a cloud.
        names: of the coordinates, (d,).
    """
    said = []
    shift, growth, errors = (np.asarray(a, float) for a in (trial.shift, trial.growth, trial.errors))
    away = np.abs(shift) - _SHIFT - _ERRORS * errors[0]
    wider = np.maximum(growth - _GROWTH, 1 / _GROWTH - growth) - _ERRORS * errors[1]
    if np.any(away > 0):
        worst = int(np.nanargmax(away))
        said.append(f"the mean of {names[worst]} by {shift[worst]:+.2g} standard deviations")
    whole, error = (float(value) for value in trial.overall)
    if np.any(wider > 0):
        worst = int(np.nanargmax(wider))
        said.append(f"the spread of {names[worst]} by a factor of {growth[worst]:.2g}")
    elif whole - _OVERALL - _ERRORS * error > 0:
        said.append(f"the spread of all coordinates by a factor of {whole:.2g}")
    parts = []
    if said:
        parts.append(
            f"trajectories from the particles move {' and '.join(said)}: the cloud does not stand for its density"
        )
    if int(trial.num_lost):
        depth = f"e^-{float(trial.depth):.0f}"
        parts.append(
            f"{int(trial.num_lost)} of the particles rest where the density is {depth} of the others'"
        )
    if int(trial.num_forsaken):
        parts.append(
            f"{int(trial.num_forsaken)} early particles stood in a mode that has none now (smc.Tempered() weighs modes)"
        )
    parts += _misplaced(trial.shares)
    mend = ", or polish='nuts', which may mend it" if said else ""
    return "; ".join(parts) + (f"; compare with mcmc.NUTS(){mend}" if parts else "")


def _misplaced(shares: Shares) -> list[str]:
    """Say which mode holds a share of the particles that its density does not ask for."""
    found, asked, error = (np.asarray(a, float) for a in shares)
    told = asked > 0
    if np.sum(told) < 2:
        return []
    off = np.where(told, np.log(np.where(told, found, 1) / np.where(told, asked, 1)), 0)
    wide = np.abs(off[:, None] - off) - error[:, None] - error
    if not np.max(wide[np.ix_(told, told)]) > math.log(_FACTOR):
        return []
    worst = int(np.argmax(np.abs(off)))
    return [
        f"particles stand in {int(np.sum(found > 0))} modes apart, and one of these holds {found[worst]:.0%} of them "
        f"where its density asks for about {asked[worst]:.0%} (smc.Tempered() weighs modes)"
    ]


def findings(trial: Trial) -> str:
    """Say, as the end of a sentence, what a trial found that did not decide; nothing if none was made.

    Args:
        trial: of a cloud.
    """
    if not np.isfinite(float(trial.acceptance)):
        return ""
    shift, growth = (float(np.max(np.abs(np.asarray(a, float)))) for a in (trial.shift, trial.growth))
    return (
        f", and trajectories cannot tell whether it is right (means move by {shift:.2g} standard deviations at most, "
        f"spreads grow {growth:.2g} times, {float(trial.acceptance):.0%} accepted)"
    )


def vouches(trial: Trial) -> bool:
    """Whether a trial without a complaint is sharp enough to call the cloud right, settled or not.

    Args:
        trial: of a cloud.
    """
    shift, growth = (np.asarray(a, float) for a in (trial.shift, trial.growth))
    steady = np.all(np.abs(shift) < _CLOSE) and np.all(np.abs(np.log(growth)) < math.log(_STEADY))
    return bool(steady and float(trial.acceptance) > _ACCEPTED)


def tried(
    key: PRNGKey,
    algorithm: Algorithm,
    state: CloudState,
    z: Float[Array, "N d"],
    keep: Bool[Array, " N"],
    early: tuple[Float[Array, "M d"], ...],
) -> Trial:
    """Try a cloud by trajectories from its particles.

    Args:
        key: random key.
        algorithm: from ``descent``, of an exact density.
        state: whose metric gives the coordinates.
        z: the particles there.
        keep: which of them count.
        early: tables of clouds of the same run at earlier times.
    """
    rule, logdensity_fn = algorithm.step.args  # type: ignore[attr-defined]
    to_table = partial(geometry_of(rule, state.z).from_z, state.metric)
    before = to_table(z)
    centre = cloud.masked_mean(keep, before)
    first, moved = _trajectories(
        key, jax.tree_util.Partial(logdensity_in_cloud, algorithm, state), z, keep, to_table, centre
    )
    middle = jnp.nanmedian(jnp.where(keep, moved.best, jnp.nan))
    lost = keep & (moved.best < middle - 10.0 - 2.0 * z.shape[1])
    like = cloud.like_one(state.positions)

    def density(row):
        return logdensity_fn(cloud.unravel(like, row)).astype(row.dtype)

    finite = keep & jnp.isfinite(first)
    return Trial(
        *_drift(before, centre, moved, keep),
        acceptance=moved.rate,
        num_lost=jnp.sum(lost, dtype=jnp.int32),
        depth=jnp.where(jnp.any(lost), middle - jnp.max(jnp.where(lost, moved.best, -jnp.inf)), 0),
        num_forsaken=_forsaken(density, jnp.concatenate(early), before, keep, first, middle),
        shares=shares_of_modes(density, before, finite, jnp.where(finite, first, 0)),
        num_gradients=jnp.int32(len(z) * (1 + _MOVES * _LEAPFROGS)),
    )


class _Moved(NamedTuple):
    """Sums over the second half of the moves, the best value of each particle, and the last acceptance."""

    place: Array
    square: Array
    distance: Array
    best: Array
    rate: Array


def _trajectories(
    key: PRNGKey, density: Any, z: Array, keep: Array, to_table: Any, centre: Array
) -> tuple[Array, _Moved]:
    """Log densities at the start, and what the moves did."""
    size, dims = z.shape
    ones, none = jnp.ones(dims, z.dtype), jnp.zeros_like(z)
    both = jax.value_and_grad(density)
    values, gradients = jax.vmap(both)(z)

    def one(uniforms, place, step_size):
        return hmc_transition(uniforms, place, both, step_size, ones, _LEAPFROGS)

    def move(carry, xs):
        places, step_size, old = carry
        counts, key = xs
        uniforms = jax.random.uniform(key, (size, dims + 3), z.dtype)
        spread = _SMALLEST * (_LARGEST / _SMALLEST) ** uniforms[:, -1]
        moved, gains = jax.vmap(one)(uniforms[:, :-1], places, step_size * spread)
        rate = cloud.masked_mean(keep, jnp.exp(jnp.minimum(gains, 0))[:, None])[0]
        off = jnp.where(counts, to_table(moved.position) - centre, 0)
        new = _Moved(
            old.place + off,
            old.square + off**2,
            old.distance + jnp.abs(off),
            jnp.maximum(old.best, moved.logdensity),
            rate,
        )
        return (moved, step_size * jnp.exp(rate - _ACCEPTANCE), new), None

    first = jnp.asarray(math.pi / 8 * min(1.0, 2 * dims**-0.25), z.dtype)
    start = (
        IntegratorState(z, values, gradients),
        first,
        _Moved(none, none, none, values, jnp.zeros((), z.dtype)),
    )
    counts = jnp.arange(_MOVES) >= _MOVES // 2
    (_, _, moved), _ = jax.lax.scan(move, start, (counts, jax.random.split(key, _MOVES)))
    return values, moved


def _drift(before: Array, centre: Array, moved: _Moved, keep: Array) -> tuple[Array, Array, Array, Array]:
    """Shift and growth with their standard errors, particle by particle, and the growth of all coordinates."""
    number = _MOVES - _MOVES // 2
    count = jnp.maximum(jnp.sum(keep.astype(before.dtype)), 1)
    mean = partial(cloud.masked_mean, keep)

    def error(values):  # of few particles it is itself uncertain
        return jnp.sqrt(mean((values - mean(values)) ** 2) / count) * (1 + 8 / count)

    near, after = before - centre, moved.place / number
    shift = mean(after)
    spread = jnp.sqrt(jnp.maximum(mean(moved.square / number) - shift**2, 0))
    width = mean(jnp.abs(near))
    spread, width = (jnp.where(a > 0, a, 1) for a in (spread, width))
    growth = mean(moved.distance / number) / width
    grown = (moved.distance / number - growth * jnp.abs(near)) / width
    overall = jnp.stack([jnp.mean(growth), error(jnp.mean(grown, axis=1, keepdims=True))[0]])
    return shift / spread, growth, jnp.stack([error(after - near) / spread, error(grown)]), overall


def _forsaken(density: Any, early: Array, table: Array, keep: Array, values: Array, middle: Array) -> Array:
    """How many early particles of high density have a gorge between them and the particles that are nearest."""
    heights = jax.vmap(density)(early)
    spread = jnp.sqrt(cloud.masked_mean(keep, (table - cloud.masked_mean(keep, table)) ** 2))
    unit = jnp.where(spread > 0, spread, 1)
    along = jnp.linspace(0, 1, _POINTS + 2, dtype=table.dtype)[1:-1, None]

    def gorge(pack):
        row, height = pack
        distances = jnp.sum(((table - row) / unit) ** 2, axis=1)
        _, nearest = jax.lax.top_k(-jnp.where(keep, distances, jnp.inf), min(_NEAR, len(table)))
        path = row + along[None] * (table[nearest][:, None] - row)
        lowest = jnp.min(jax.vmap(jax.vmap(density))(path), axis=1)
        return jnp.all(lowest < jnp.minimum(height, values[nearest]) - _GORGE)

    apart = jax.lax.map(gorge, (early, heights))
    return jnp.sum(apart & (heights > middle - _AS_HIGH), dtype=jnp.int32)
