r"""Bidirectional Monte Carlo: a log evidence between a stochastic lower and a stochastic upper bound.

An estimator with :math:`E \hat Z = Z` has :math:`E \log \hat Z \le \log Z`. A reverse run that starts from an exact
posterior draw and reverses the same steps has :math:`E[1/\hat Z_{rev}] = 1/Z`, so :math:`E \log \hat Z_{rev} \ge
\log Z`. For simulated data, the parameters that generated the data are such a draw. The gap also bounds how far the
final states of the forward runs are from the posterior.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from scipy import special, stats

from probinfer.core.arguments import check_key
from probinfer.core.errors import shortened
from probinfer.core.types import PRNGKey
from probinfer.plots.ranks import axes_or_new

__all__ = ["EvidenceSandwich", "evidence_sandwich"]

_POWER = 0.9


@dataclasses.dataclass(frozen=True)
class EvidenceSandwich:
    r"""Bounds on a log evidence and on the error of the posterior.

    Attributes:
        lower: mean of the forward log estimates; its expectation is at most log Z.
        upper: mean of the reverse log estimates; its expectation is at least log Z.
        lower_error: standard error of ``lower``.
        upper_error: standard error of ``upper``.
        best_lower: log of the mean forward estimate; closer to log Z, and still below it in expectation.
        best_upper: minus the log of the mean inverse reverse estimate; closer to log Z, and still above it in
            expectation.
        gap: ``upper − lower``. Its expectation is at least KL(q | p) + KL(p | q), where q is the distribution of the
            final state of a forward run and p the posterior.
        gap_error: standard error of ``gap``.
        log_forward: ``(R,)`` forward estimates.
        log_reverse: ``(R',)`` reverse estimates.
        level: significance level of the verdict.
    """

    lower: float
    upper: float
    lower_error: float
    upper_error: float
    best_lower: float
    best_upper: float
    gap: float
    gap_error: float
    log_forward: Float[np.ndarray, " R"]
    log_reverse: Float[np.ndarray, " R2"]
    level: float

    @property
    def interval(self) -> tuple[float, float]:
        """Confidence interval of log Z with probability ``1 − level``, if the means are normal."""
        quantile_lower, quantile_upper = (
            stats.t.ppf(1 - self.level / 2, len(a) - 1) for a in (self.log_forward, self.log_reverse)
        )
        return self.lower - quantile_lower * self.lower_error, self.upper + quantile_upper * self.upper_error

    @property
    def kl_bound(self) -> float:
        """Upper confidence limit of KL(q | p) + KL(p | q), in nats."""
        runs = min(len(self.log_forward), len(self.log_reverse))
        return max(0.0, self.gap + float(stats.t.ppf(1 - self.level, runs - 1)) * self.gap_error)

    @property
    def detectable(self) -> float:
        """Error of one estimator, in nats toward the other, that causes a contradiction with probability 0.9."""
        runs = min(len(self.log_forward), len(self.log_reverse))
        # The gap that the error must bridge is known up to gap_error; a second run adds an error of the same size.
        margin = stats.t.ppf(1 - self.level, runs - 1) + np.sqrt(2) * stats.norm.ppf(_POWER)
        return max(0.0, self.gap) + float(margin) * self.gap_error

    @property
    def contradiction(self) -> bool:
        """Whether the lower bound exceeds the upper by more than chance allows, so that an estimator is wrong."""
        runs = min(len(self.log_forward), len(self.log_reverse))
        rounding = 1e-6 * max(1.0, abs(self.upper))
        return self.gap < -rounding - float(stats.t.ppf(1 - self.level, runs - 1)) * self.gap_error

    @property
    def passed(self) -> bool | None:
        """False if the bounds contradict each other, else None: bounds that agree prove nothing by themselves."""
        return False if self.contradiction else None

    @property
    def verdict(self) -> str:
        """The verdict in one sentence."""
        if self.contradiction:
            return (
                f"the estimators contradict each other: lower bound {self.lower:.4g} above upper bound "
                f"{self.upper:.4g} by {-self.gap / self.gap_error:.1f} standard errors; a transition is not invariant, "
                "the reverse run does not reverse the forward run, or it does not start from a posterior draw"
            )
        low, high = self.interval
        return (
            f"log evidence in [{low:.4g}, {high:.4g}] ({100 * (1 - self.level):.0f} %); the final states of a forward "
            f"run are within {self.kl_bound:.2g} nats of the posterior (KL both ways), if the reverse runs started "
            f"from exact draws of it. An estimator wrong by {self.detectable:.2g} nats toward the other would have "
            f"been detected (probability {_POWER:g}); smaller errors are not detected, nor is a mode that no run visits"
        )

    def plot(self, axes: Any = None) -> Any:
        """Draw both sets of estimates and their means; return the axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        axes = axes_or_new(axes)
        for values, mean, name, color in (
            (self.log_forward, self.lower, "forward", "C0"),
            (self.log_reverse, self.upper, "reverse", "C1"),
        ):
            axes.hist(values, bins=20, alpha=0.5, color=color, label=name)
            axes.axvline(mean, color=color)
        axes.set(xlabel="log evidence estimate", ylabel="runs")
        axes.legend()
        return axes


def evidence_sandwich(
    forward_fn: Any,
    reverse_fn: Any,
    *,
    key: PRNGKey | None = None,
    num_runs: int = 100,
    level: float = 0.05,
) -> EvidenceSandwich:
    """Bound a log evidence from below and from above, and the error of the posterior by the gap.

    Args:
        forward_fn: ``key -> log Ẑ`` with ``E Ẑ = Z``, such as annealed importance sampling or a particle filter; or
            ``(R,)`` log estimates of independent runs.
        reverse_fn: ``key -> log Ẑ`` with ``E 1/Ẑ = 1/Z``, the reverse run from an exact posterior draw; or ``(R',)``
            log estimates of independent runs (each from its own draw, or all from one draw if only one is known).
        key: random key of the runs; not needed with arrays.
        num_runs: runs of each function, sequential and compiled once; a function that JAX cannot trace is called once
            per run.
        level: significance level of the intervals and the verdict.

    Returns:
        The bounds, their gap, standard errors and the verdict.

    Raises:
        TypeError: a function is passed without a key.
        ValueError: there are fewer than 3 runs, or an estimate is not finite (a weight of zero or NaN gives no bound).

    References:
        Grosse, Ghahramani and Adams (2015), "Sandwiching the marginal likelihood using bidirectional Monte Carlo",
        section 3; Grosse, Ancha and Roy (2016), "Measuring the reliability of MCMC inference with bidirectional Monte
        Carlo", theorem 1 (the gap).
    """
    forward_key, reverse_key = (None, None) if key is None else jax.random.split(key)
    forward = _estimates("forward_fn", forward_fn, forward_key, num_runs)
    reverse = _estimates("reverse_fn", reverse_fn, reverse_key, num_runs)
    lower, upper = forward.mean(), reverse.mean()
    errors = [float(a.std(ddof=1) / np.sqrt(len(a))) for a in (forward, reverse)]
    return EvidenceSandwich(
        lower=float(lower),
        upper=float(upper),
        lower_error=errors[0],
        upper_error=errors[1],
        best_lower=float(special.logsumexp(forward) - np.log(len(forward))),
        best_upper=float(np.log(len(reverse)) - special.logsumexp(-reverse)),
        gap=float(upper - lower),
        gap_error=float(np.hypot(errors[0], errors[1])),
        log_forward=forward,
        log_reverse=reverse,
        level=float(level),
    )


def _estimates(name: str, source: Any, key: PRNGKey | None, num_runs: int) -> np.ndarray:
    if callable(source):
        if key is None:
            raise TypeError(f"{name} is a function of a key: pass key=jax.random.key(...)")
        check_key(key)
        keys = jax.random.split(key, num_runs)
        try:
            values = np.asarray(jax.lax.map(source, keys))
        except (jax.errors.JAXTypeError, TypeError):  # not traceable: call it run by run
            values = np.asarray([np.asarray(source(run_key)) for run_key in keys])
    else:
        values = np.asarray(source)
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 3:
        raise ValueError(
            f"{name} must give one number per run and at least 3 runs, got shape {values.shape} ({shortened(source)})"
        )
    num_invalid = int(np.sum(~np.isfinite(values)))
    if num_invalid:
        raise ValueError(
            f"{num_invalid} of {len(values)} estimates of {name} are not finite: a log estimate of minus infinity or "
            "NaN gives no bound; repair the estimator (more particles, a proposal that covers the target)"
        )
    return values
