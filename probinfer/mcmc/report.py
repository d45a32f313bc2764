"""Reports of runs of chains: convergence diagnostics, and the texts of warnings."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Bool, Float, Int
from probinfer.inference import diagnostics, engine
from probinfer.mcmc.adaptation import metric as metrics
from probinfer.mcmc.adaptation import starts

__all__ = ["BlackjaxInfo", "Convergence", "MCMCInfo", "convergence", "explain", "with_divergences"]

_MAX_DIVERGENT_SHARE = 1e-3  # of the transitions: fewer divergences are reported in ``info`` only
_FALSE_ALARM_RATE = 1e-4  # of populations that agree

_DIVERGENCE_ADVICE = "raise target_acceptance, or reparametrize"


class Convergence(NamedTuple):
    """Convergence diagnostics.

    Attributes:
        rhat: R-hat of every unconstrained coordinate, a tree shaped like one position.
        ess: bulk effective sample size, likewise.
        ess_tail: tail effective sample size, likewise.
        status: the verdict.
    """

    rhat: ArrayTree
    ess: ArrayTree
    ess_tail: ArrayTree
    status: Int[Array, ""] | Status


class MCMCInfo(NamedTuple):
    """Report of a Hamiltonian sampler.

    Attributes:
        diverging: whether the energy error exceeded 1000 nats.
        acceptance_rate: mean over the trajectory (NUTS), or of its end (HMC).
        num_leapfrogs: gradient evaluations.
        energy: Hamiltonian at the draw, nats.
        tree_depth: doublings; zero for HMC.
        step_size: after warm-up.
        metric: the inverse mass matrix, in blackjax's low-rank form.
        chosen: index of the name of the metric: diagonal, low-rank, dense.
        metric_divergences: held-out Fisher divergence per dimension of each of the three.
        num_warmup: steps of the warm-up.
        num_warmup_gradients: of all chains before their first draw, the ascents to the typical set included.
        num_dropped_starts: candidates, of 4 per chain, whose ascent ended in a region of negligible mass.
        num_shared_starts: chains that start where another one does, because too few candidates remained.
        num_restarts: how often the warm-up moved a chain of negligible mass to the position of another.
        deficits: how far its mean log density then lay below that of the heaviest chain, nats.
        rhat: R-hat of every unconstrained coordinate, a tree shaped like one position.
        ess: bulk effective sample size, likewise.
        ess_tail: tail effective sample size, likewise.
        status: ``OK`` if every R-hat is below 1.01, bulk and tail ESS reach 100 per chain, less than one transition in
            a thousand diverged, E-BFMI is above 0.3 (judged from 100 draws on) and less than one trajectory in twenty
            was cut off.
    """

    diverging: Bool[Array, "chain draw"]
    acceptance_rate: Float[Array, "chain draw"]
    num_leapfrogs: Int[Array, "chain draw"]
    energy: Float[Array, "chain draw"]
    tree_depth: Int[Array, "chain draw"]
    step_size: Float[Array, ""]
    metric: metrics.LowRankInverseMassMatrix
    chosen: Int[Array, ""]
    metric_divergences: Float[Array, "3"]
    num_warmup: Int[Array, ""]
    num_warmup_gradients: Int[Array, ""]
    num_dropped_starts: Int[Array, ""]
    num_shared_starts: Int[Array, ""]
    num_restarts: Int[Array, " chain"]
    deficits: Float[Array, " chain"]
    rhat: ArrayTree
    ess: ArrayTree
    ess_tail: ArrayTree
    status: Int[Array, ""] | Status

    @property
    def metric_name(self) -> str:
        """Diagonal, low-rank or dense."""
        return metrics.NAMES[int(self.chosen)]

    @property
    def inverse_mass_matrix(self) -> Float[Array, "d d"]:
        """The metric as a dense matrix."""
        # ``whiten`` maps the identity to L^{-T}, row by row, and the inverse mass matrix is L L^T.
        root = metrics.whiten(self.metric, jnp.eye(self.metric.sigma.shape[0], dtype=self.metric.sigma.dtype))
        return jnp.linalg.inv(root @ root.T)

    @property
    def metric_reason(self) -> str:
        """Why this metric was chosen, in one sentence."""
        divergences = ", ".join(
            f"{name} {float(value):.2g}"
            for name, value in zip(metrics.NAMES, self.metric_divergences, strict=True)
        )
        return f"{self.metric_name}: the simplest metric near the lowest held-out Fisher divergence ({divergences})"

    @property
    def starts_reason(self) -> str:
        """Which starting points were dropped, which chains were restarted, and why, in one sentence."""
        num_chains, dimension = len(self.diverging), self.metric.sigma.shape[0]
        num_candidates = starts.CANDIDATES * num_chains
        num_dropped, num_shared = int(self.num_dropped_starts), int(self.num_shared_starts)
        text = f"none of {num_candidates} starts dropped"
        if num_dropped:
            text = (
                f"{num_dropped} of {num_candidates} starts dropped: log density more than "
                f"{starts.margin(dimension):.0f} (10 + d log 100) below the best"
            )
            if num_shared:
                text += f"; {num_shared} of {num_chains} chains start where another one does"
        restarted = [
            f"chain {i + 1} ({float(self.deficits[i]):.0f} nats below)"
            for i in np.flatnonzero(self.num_restarts)
        ]
        if restarted:
            text += (
                f"; restarted in the warm-up from another chain, for negligible mass: {', '.join(restarted)}"
            )
        return text


class BlackjaxInfo(NamedTuple):
    """Report of a blackjax algorithm.

    Attributes:
        sampler: the scalar fields of its info by name, each (chain, draw).
        rhat: R-hat of every unconstrained coordinate, a tree shaped like one position.
        ess: bulk effective sample size, likewise.
        ess_tail: tail effective sample size, likewise.
        status: ``OK`` if R-hat and ESS are as for :class:`MCMCInfo`.
    """

    sampler: dict[str, Array]
    rhat: ArrayTree
    ess: ArrayTree
    ess_tail: ArrayTree
    status: Int[Array, ""] | Status


def convergence(positions: ArrayTree, *, populations: bool = False) -> Convergence:
    r"""Judge whether chains have converged.

    Chains are judged by the rule of ``diagnostics.convergence_status``. Populations of particles do not grow by running
    longer, and few of them are compared. R-hat may therefore be as large as agreeing populations exceed once in 10^4
    runs, :math:`\hat R^2 < 1 + q / n`, with the quantile q of :math:`\chi^2_{2R-1} / (2R-1)` and n effective draws in
    each of 2 R halves; and a quarter of the draws must be effective, or 100 per population.

    Args:
        positions: leaves (chain, draw, ...).
        populations: whether the chains are populations of particles.

    Returns:
        The diagnostics; the status is ``OK`` or ``CHAINS_DISAGREE``.
    """
    draws = engine.flat_position(positions)
    num_chains, num_draws, dimension = draws.shape
    if num_draws < 4:
        rhat = ess = ess_tail = jnp.full(dimension, jnp.nan, draws.dtype)
    else:
        rhat, ess, ess_tail = diagnostics.rhat(draws), diagnostics.ess(draws), diagnostics.ess_tail(draws)
    # The rule of diagnostics.convergence_status, on numbers that are reported anyway
    min_ess = np.minimum(ess, ess_tail)
    max_rhat, required_ess = 1.01, 100 * num_chains
    if populations:
        max_rhat = np.maximum(max_rhat, _largest_rhat(min_ess, 2 * num_chains))
        required_ess = min(required_ess, num_chains * num_draws / 4)
    mixed = bool(num_chains == 1 or np.all(np.asarray(rhat) < max_rhat))
    converged = mixed and bool(np.all(min_ess >= required_ess))
    status = jnp.asarray(int(Status.OK if converged else Status.CHAINS_DISAGREE), jnp.int32)
    template = jax.tree.map(lambda x: x[0, 0], positions)
    return Convergence(
        _unflatten(rhat, template), _unflatten(ess, template), _unflatten(ess_tail, template), status
    )


def _largest_rhat(ess: np.ndarray, num_halves: int) -> np.ndarray:
    """Return the R-hat (d,) that agreeing halves exceed in one of the d coordinates once in 10^4 runs."""
    degrees = num_halves - 1
    # Twice the number of coordinates: the larger of bulk and folded R-hat is judged
    quantile = stats.chi2.ppf(1 - _FALSE_ALARM_RATE / (2 * len(ess)), degrees) / degrees
    return np.sqrt(1 + quantile * num_halves / np.maximum(ess, 1))


def with_divergences(verdict: Convergence, diverging: Array) -> Convergence:
    """Make divergent transitions part of the verdict (outside jit).

    Args:
        verdict: on the draws.
        diverging: (chain, draw), which transitions diverged.
    """
    if np.mean(diverging) < _MAX_DIVERGENT_SHARE:
        return verdict
    status = jnp.maximum(verdict.status, jnp.int32(Status.DIVERGENT_TRANSITIONS))
    return verdict._replace(status=status)


def explain(
    verdict: Convergence,
    num_chains: int,
    num_draws: int,
    diverging: Array | None = None,
    *,
    plural: str = "chains",
) -> str:
    """Say which coordinate is worst and how bad it is, and how many transitions diverged (outside jit).

    Args:
        verdict: on the run.
        num_chains: number of chains.
        num_draws: of each chain.
        diverging: (chain, draw), which transitions diverged; None: not known.
        plural: what the chains are called in the message.
    """
    names = engine.coordinate_names(verdict.rhat)
    rhat, ess, ess_tail = (np.asarray(_flatten(tree)) for tree in verdict[:3])
    clauses = []
    num_divergences = 0 if diverging is None else int(np.sum(diverging))
    if diverging is not None and num_divergences:
        # If divergences alone decide the status, the warning carries the advice of the status
        decisive = int(verdict.status) == Status.DIVERGENT_TRANSITIONS
        advice = "" if decisive else f" ({_DIVERGENCE_ADVICE})"
        clauses.append(f"{num_divergences} of {np.size(diverging)} transitions diverged{advice}")
    if int(verdict.status) < Status.CHAINS_DISAGREE:
        return ", ".join(clauses)
    if num_draws < 4:
        return ", ".join([*clauses, f"{num_draws} draws per chain are too few to judge"])
    constant = np.isnan(rhat) & np.isnan(ess)
    if constant.any():
        name = names[int(np.argmax(constant))]
        return ", ".join([*clauses, f"the draws of {name} do not move, or are too few to judge"])
    if num_chains > 1 and not np.all(rhat <= 1.01):
        worst = int(np.argmax(np.where(np.isnan(rhat), np.inf, rhat)))
        clauses.append(f"the {plural} disagree most on {names[worst]} (R-hat {rhat[worst]:.3f})")
    min_ess = np.fmin(ess, ess_tail)
    worst = int(np.argmin(np.where(np.isnan(min_ess), -np.inf, min_ess)))
    clauses.append(f"{names[worst]} has the fewest effective draws ({min_ess[worst]:.0f})")
    return ", ".join(clauses)


def _flatten(tree: ArrayTree) -> Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _unflatten(values: Array, template: ArrayTree) -> ArrayTree:
    leaves, structure = jax.tree.flatten(template)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    pieces = jnp.split(values, ends)
    shaped = [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)
