"""What a run of chains has to say about itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Float
from probinfer.inference import diagnostics, engine
from probinfer.mcmc.adaptation import metric as metrics
from probinfer.mcmc.adaptation import starts

__all__ = ["BlackjaxInfo", "Convergence", "MCMCInfo", "convergence", "explain", "with_divergences"]

_FEW = 1e-3  # of the transitions: so few divergences are mentioned in ``info`` only
_FALSE_ALARM = 1e-4  # of populations that agree

_AGAINST_DIVERGENCES = "raise target_acceptance, or reparametrise"


class Convergence(NamedTuple):
    """Diagnostics of every unconstrained coordinate, trees shaped like one position, and the verdict."""

    rhat: Any
    ess: Any
    ess_tail: Any
    status: Any


class MCMCInfo(NamedTuple):
    """Report of a Hamiltonian sampler.

    Fields (chain, draw): ``diverging`` (energy error above 1000), ``acceptance_rate``, ``num_leapfrogs`` (gradient
    evaluations), ``energy``, ``tree_depth`` (zero for HMC). Then what the warm-up settled on: ``step_size``,
    ``metric`` (blackjax's low-rank form of the inverse mass matrix), ``chosen`` (index of its name) and
    ``metric_divergences`` (3,), the held-out Fisher divergence of a diagonal, low-rank and dense metric a dimension.
    ``num_warmup`` counts its steps, ``num_warmup_gradients`` the gradients of all chains before their first draw, the
    climbs to the typical set included. Of the 4 candidates a chain that were climbed ``num_dropped_starts`` ended
    so far below the best that their mass is negligible; ``num_shared_starts`` chains start where another one does,
    because too few candidates were left. ``num_restarts`` (chain,) counts how often the warm-up put a chain where
    another one was, since its own mass was negligible, and ``deficits`` (chain,) by how many nats its mean log density
    lay below the heaviest chain then. ``rhat``, ``ess`` and ``ess_tail`` are trees shaped like one unconstrained
    position. ``status`` is ``OK`` if every R-hat is below 1.01, bulk and tail ESS reach 100 a chain, less than one
    transition in a thousand diverged, E-BFMI is above 0.3 (of 100 draws or more) and less than one trajectory in twenty
    was cut off.
    """

    diverging: Any
    acceptance_rate: Any
    num_leapfrogs: Any
    energy: Any
    tree_depth: Any
    step_size: Any
    metric: Any
    chosen: Any
    metric_divergences: Any
    num_warmup: Any
    num_warmup_gradients: Any
    num_dropped_starts: Any
    num_shared_starts: Any
    num_restarts: Any
    deficits: Any
    rhat: Any
    ess: Any
    ess_tail: Any
    status: Any

    @property
    def metric_name(self) -> str:
        """Diagonal, low-rank or dense."""
        return metrics.NAMES[int(self.chosen)]

    @property
    def inverse_mass_matrix(self) -> Float[Array, "d d"]:
        """The metric as a matrix."""
        root = metrics.whiten(self.metric, jnp.eye(self.metric.sigma.shape[0], dtype=self.metric.sigma.dtype))
        return jnp.linalg.inv(root @ root.T)

    @property
    def metric_reason(self) -> str:
        """Why this metric: one sentence."""
        found = ", ".join(
            f"{n} {float(d):.2g}" for n, d in zip(metrics.NAMES, self.metric_divergences, strict=True)
        )
        return (
            f"{self.metric_name}: the simplest of those near the least held-out Fisher divergence ({found})"
        )

    @property
    def starts_reason(self) -> str:
        """Which starting points were dropped, and why: one sentence."""
        num_chains, dimension = len(self.diverging), self.metric.sigma.shape[0]
        num, dropped, shared = starts.CANDIDATES * num_chains, self.num_dropped_starts, self.num_shared_starts
        text = f"none of {num} starts dropped"
        if int(dropped):
            far = f"more than {starts.margin(dimension):.0f} (10 + d log 100) below the best"
            text = f"{int(dropped)} of {num} starts dropped: log density {far}" + (
                f"; {int(shared)} of {num_chains} chains start where another one does" if int(shared) else ""
            )
        moved = [
            f"chain {i + 1} ({float(self.deficits[i]):.0f} nats below)"
            for i in np.flatnonzero(self.num_restarts)
        ]
        return text + (
            f"; put where another chain was in the warm-up, their mass negligible: {', '.join(moved)}"
            if moved
            else ""
        )


class BlackjaxInfo(NamedTuple):
    """Report of a blackjax algorithm: its scalar info fields, (chain, draw), and the diagnostics."""

    sampler: Any
    rhat: Any
    ess: Any
    ess_tail: Any
    status: Any


def convergence(positions: ArrayTree, *, populations: bool = False) -> Convergence:
    r"""Judge the chains.

    Chains are judged by the rule of ``diagnostics.convergence_status``. Populations of particles are not grown by
    running on, and few of them are compared: R-hat may be as large as it is once in 10^4 runs of populations that
    agree, :math:`\hat R^2 < 1 + q / n`, with the quantile q of :math:`\chi^2_{2R-1} / (2R-1)` and n effective draws in
    each of 2 R halves; of the draws a quarter must be effective, or 100 a population.

    Args:
        positions: leaves (chain, draw, ...).
        populations: whether the chains are populations of particles.
    """
    draws = engine.flat_position(positions)
    num_chains, num_draws, dimension = draws.shape
    if num_draws < 4:
        rhat = ess = ess_tail = jnp.full(dimension, jnp.nan, draws.dtype)
    else:
        rhat, ess, ess_tail = diagnostics.rhat(draws), diagnostics.ess(draws), diagnostics.ess_tail(draws)
    # the rule of diagnostics.convergence_status, on numbers that are reported anyway
    least = np.minimum(ess, ess_tail)
    most, enough = 1.01, 100 * num_chains
    if populations:
        most = np.maximum(most, _largest_rhat(least, 2 * num_chains))
        enough = min(enough, num_chains * num_draws / 4)
    mixed = bool(num_chains == 1 or np.all(np.asarray(rhat) < most))
    agreed = mixed and bool(np.all(least >= enough))
    status = jnp.asarray(int(Status.OK if agreed else Status.CHAINS_DISAGREE), jnp.int32)
    one = jax.tree.map(lambda x: x[0, 0], positions)
    return Convergence(_like(rhat, one), _like(ess, one), _like(ess_tail, one), status)


def _largest_rhat(ess: np.ndarray, num_halves: int) -> np.ndarray:
    """The R-hat (d,) that agreeing halves exceed in one of so many coordinates once in 10^4 runs."""
    free = num_halves - 1
    quantile = stats.chi2.ppf(1 - _FALSE_ALARM / (2 * len(ess)), free) / free  # of bulk and folded R-hat
    return np.sqrt(1 + quantile * num_halves / np.maximum(ess, 1))


def with_divergences(found: Convergence, diverging: Array) -> Convergence:
    """Make divergent transitions part of the verdict (outside jit).

    Args:
        found: the verdict on the draws.
        diverging: (chain, draw), which transitions diverged.
    """
    if np.mean(diverging) < _FEW:
        return found
    status = jnp.maximum(found.status, jnp.int32(Status.DIVERGENT_TRANSITIONS))
    return found._replace(status=status)


def explain(
    found: Convergence,
    num_chains: int,
    num_draws: int,
    diverging: Array | None = None,
    *,
    plural: str = "chains",
) -> str:
    """Say which coordinate is worst and how bad it is, and how many transitions diverged (outside jit).

    Args:
        found: the verdict.
        num_chains: how many.
        num_draws: of each.
        diverging: (chain, draw), which transitions diverged; None: not known.
        plural: what the chains are called.
    """
    names = engine.coordinate_names(found.rhat)
    rhat, ess, tail = (np.asarray(_flat(tree)) for tree in found[:3])
    text = []
    count = 0 if diverging is None else int(np.sum(diverging))
    if diverging is not None and count:
        advised = "" if int(found.status) == Status.DIVERGENT_TRANSITIONS else f" ({_AGAINST_DIVERGENCES})"
        text.append(f"{count} of {np.size(diverging)} transitions diverged{advised}")
    if int(found.status) < Status.CHAINS_DISAGREE:
        return ", ".join(text)
    if num_draws < 4:
        return ", ".join([*text, f"{num_draws} draws of a chain are too few to judge"])
    still = np.isnan(rhat) & np.isnan(ess)
    if still.any():
        return ", ".join(
            [*text, f"the draws of {names[int(np.argmax(still))]} do not move, or are too few to judge"]
        )
    if num_chains > 1 and not np.all(rhat <= 1.01):
        worst = int(np.argmax(np.where(np.isnan(rhat), np.inf, rhat)))
        text.append(f"the {plural} disagree most on {names[worst]} (R-hat {rhat[worst]:.3f})")
    least = np.fmin(ess, tail)
    worst = int(np.argmin(np.where(np.isnan(least), -np.inf, least)))
    text.append(f"{names[worst]} has the fewest effective draws ({least[worst]:.0f})")
    return ", ".join(text)


def _flat(tree: ArrayTree) -> Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _like(values: Array, tree: ArrayTree) -> ArrayTree:
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    pieces = jnp.split(values, ends)
    return jax.tree.unflatten(
        structure, [p.reshape(leaf.shape) for p, leaf in zip(pieces, leaves, strict=True)]
    )
