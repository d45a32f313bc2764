r"""Are the posteriors centered? A test of the symmetry of ranks that does not depend on their widths.

An approximation whose point estimates are unbiased has :math:`p_s = \Pr_q(\theta < \theta^*_s)` symmetric about 1/2,
however wide it is. Sorted by :math:`|p_s - 1/2|`, the signs of :math:`p_s - 1/2` are then fair coins, and the
Kolmogorov-Smirnov distance between {p} and {1 - p} is the largest excursion of their walk from the outside inwards,
over S. Its distribution is that of the maximum of a simple random walk: exact, without permutations.

References:
    Yao, Vehtari, Simpson and Gelman (2018), "Yes, but did it work?: evaluating variational inference", section 3.2
    (there with the two-sample test, which takes {p} and {1 - p} for independent).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy.special import bdtr, betaincinv, ndtr, ndtri

from probinfer.checks.calibration.rank_uniformity import OUTCOMES, holm
from probinfer.checks.calibration.ranks import RankTable, rank_table
from probinfer.core.types import ArrayTree, PRNGKey
from probinfer.plots.ranks import axes_or_new, ink

__all__ = ["VSBCReport", "symmetry_pvalue", "vsbc"]

_MAX_BIAS = 1.0  # posterior sd; a check that cannot detect it cannot tell
_POWER = 0.9


@dataclass(frozen=True)
class VSBCReport:
    """Symmetry of the ranks of every scalar parameter.

    Attributes:
        ranks: table of ranks.
        probabilities: p_s by parameter, without failed simulations.
        pvalues: by parameter, adjusted by Holm's rule; parameters that never vary are left out.
        directions: by parameter, the mean of p_s - 1/2; positive if the draws are too low.
        bias: smallest bias of a normal posterior, in its standard deviations, that is detected with probability at
            least 0.9; infinite if none.
        critical: smallest excursion of the walk that is rejected; this many failed simulations may hide one.
        level: probability of a false alarm of the whole report.
    """

    ranks: RankTable
    probabilities: dict[str, Float[np.ndarray, "..."]]
    pvalues: dict[str, float]
    directions: dict[str, float]
    bias: float
    critical: int
    level: float

    @property
    def rejected(self) -> tuple[str, ...]:
        """Parameters whose posteriors are not centered."""
        return tuple(name for name, value in self.pvalues.items() if value <= self.level)

    @property
    def passed(self) -> bool | None:
        """True, False, or None if the check cannot tell."""
        if self.rejected:
            return False
        num_failed = int(np.max(np.sum(self.ranks.ranks < 0, axis=0)))
        return None if self.bias > _MAX_BIAS or num_failed >= self.critical else True

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        power = (
            f"a bias of {self.bias:.2f} sd of a normal posterior is detected with probability at least {_POWER}; "
            "widths and correlations are not tested"
        )
        if self.bias == np.inf or not self.pvalues:
            power = "no bias could have been detected: run more simulations"
        smallest = sorted(self.rejected, key=lambda name: self.pvalues[name])[:5]
        rejections = [
            f"{name} too {'low' if self.directions[name] > 0 else 'high'} (p = {self.pvalues[name]:.2g})"
            for name in smallest
        ]
        parts = [", ".join(rejections)] if rejections else []
        return f"{OUTCOMES[self.passed]}: " + "; ".join([*parts, power, *self.ranks.remarks])

    def plot(self, axes: Any = None) -> Any:
        """Draw the distribution function of p minus that of 1 - p, for every parameter.

        Args:
            axes: matplotlib axes; None: those of a new figure.

        Returns:
            The axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        axes = axes_or_new(axes)
        grid = np.linspace(0, 0.5, 201)
        for name, values in self.probabilities.items():
            below = np.searchsorted(np.sort(values), grid, side="right")
            mirrored = np.searchsorted(np.sort(1 - values), grid, side="right")
            rejected = name in self.rejected
            style = (
                {"linewidth": 1.4, "label": name}
                if rejected
                else {"color": ink(), "alpha": 0.6, "linewidth": 0.7}
            )
            axes.plot(grid, (below - mirrored) / len(values), **style)
        axes.axhline(0, color=ink(), linewidth=0.8)
        axes.set_xlabel("t")
        axes.set_ylabel("share of p below t - share above 1 - t")
        if self.rejected:
            axes.legend(frameon=False, fontsize="small")
        return axes

    def __str__(self) -> str:
        return self.verdict


def vsbc(
    key: PRNGKey, draws: ArrayTree, theta: ArrayTree, *, chain_axis: bool = False, level: float = 0.05
) -> VSBCReport:
    """Test for every scalar parameter whether its posteriors are centered.

    Args:
        key: random key (ties; the position of the true value between two draws).
        draws: posterior draws, leaves (S, L, ...), or (S, chain, draw, ...) with ``chain_axis``.
        theta: true values, leaves (S, ...).
        chain_axis: whether the draws have a chain axis before the draw axis.
        level: probability of a false alarm over all parameters.

    Raises:
        TypeError: ``key`` is not a key.
        ValueError: trees or leading axes differ, or the level is not between 0 and 0.5.

    References:
        Yao et al. (2018), algorithm 2.
    """
    if not 0 < level < 0.5:
        raise ValueError(f"level is the probability of a false alarm, between 0 and 0.5; got {level}")
    table = rank_table(key, draws, theta, num_projections=0, chain_axis=chain_axis)
    noise = np.asarray(jax.random.uniform(jax.random.fold_in(key, 1), table.ranks.shape), dtype=float)
    continuous = (table.ranks + noise) / (table.num_draws + 1)
    probabilities = {
        name: continuous[column >= 0, i]
        for i, (name, column) in enumerate(zip(table.names, table.ranks.T, strict=True))
        if name not in table.constant and (column >= 0).any()
    }
    raw = np.asarray([symmetry_pvalue(values) for values in probabilities.values()])
    num_simulations = min((len(values) for values in probabilities.values()), default=0)
    critical = _critical_height(num_simulations, level / max(len(probabilities), 1))
    return VSBCReport(
        ranks=table,
        probabilities=probabilities,
        pvalues=dict(zip(probabilities, holm(raw).tolist(), strict=True)),
        directions={name: float(np.mean(values) - 0.5) for name, values in probabilities.items()},
        bias=_detectable_bias(num_simulations, critical, table.num_draws),
        critical=critical,
        level=level,
    )


def symmetry_pvalue(probabilities: Float[np.ndarray, " S"]) -> float:
    r"""Return the probability that a random walk reaches at least the excursion of the signs of p - 1/2.

    Sorted by :math:`|p - 1/2|` from large to small, the walk is :math:`W_k = \sum_{s\le k} \mathrm{sign}(p_s - 1/2)`
    and the statistic :math:`\max_k |W_k|`. Given the distances from 1/2 the signs are fair coins: the sign-flip test,
    with all :math:`2^S` flips.

    Args:
        probabilities: values in [0, 1], without ties.

    Raises:
        ValueError: there are no values.
    """
    if not len(probabilities):
        raise ValueError("there are no ranks to judge; run more simulations")
    order = np.argsort(-np.abs(probabilities - 0.5), kind="stable")
    walk = np.cumsum(np.where(probabilities[order] > 0.5, 1, -1))
    return _excursion_tail(len(walk), int(np.max(np.abs(walk))))


def _excursion_tail(steps: int, height: int) -> float:
    r"""P(max |W| >= height) of a simple random walk, by reflection.

    :math:`P(\text{stay below}) = \sum_j (-1)^j P(|W_n - 2jm| < m)`, with m the height.
    """
    shifts = np.arange(-(steps // (2 * height) + 2), steps // (2 * height) + 3)
    center = 2 * shifts * height
    inside = _walk_cdf(steps, center + height - 1) - _walk_cdf(steps, center - height)
    return float(np.clip(1 - np.sum(np.where(shifts % 2, -1, 1) * inside), 0.5 ** (steps - 1), 1))


def _walk_cdf(steps: int, value: Int[np.ndarray, " K"]) -> np.ndarray:
    """P(W_n <= value)."""
    ups = np.floor((steps + value) / 2)
    return np.where(ups < 0, 0.0, bdtr(np.clip(ups, 0, steps), steps, 0.5))


def _critical_height(steps: int, level: float) -> int:
    """Return the smallest excursion whose probability is at most the level; steps + 1 if there is none."""
    heights = range(1, steps + 1)
    return next((height for height in heights if _excursion_tail(steps, height) <= level), steps + 1)


def _detectable_bias(steps: int, critical: int, num_draws: int) -> float:
    """Return the bias that the end of the walk detects: a bound, since the largest excursion is at least as large."""
    if critical > steps:
        return float("inf")
    biases = np.arange(1, 1001) / 200
    power = 1 - bdtr(np.ceil((steps + critical) / 2) - 1, steps, _share_above_half(biases, num_draws))
    detected = np.flatnonzero(power >= _POWER)
    return float(biases[detected[0]]) if len(detected) else float("inf")


def _share_above_half(bias: Float[np.ndarray, " B"], num_draws: int) -> Float[np.ndarray, " B"]:
    """Return P(p > 1/2) if the draws of a normal posterior are too low by ``bias`` of its standard deviations."""
    nodes, weights = np.polynomial.legendre.leggauss(32)
    shares = []
    # If the number of cells is odd, 1/2 cuts a cell: average over both of its edges.
    for edge in ((num_draws + 1) // 2, (num_draws + 2) // 2):
        # Normal score of the draw of order ``edge``
        order_statistic = ndtri(betaincinv(edge, num_draws + 1 - edge, (nodes + 1) / 2))
        shares.append(ndtr(bias[:, None] - order_statistic) @ weights / 2)
    return np.mean(shares, axis=0)
