"""The demo's section on kernel choice: the evidence of kernels by tempered SMC, with its Monte Carlo error."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import special, stats

from probinfer import data, gp, smc
from probinfer.app.pages import plots
from probinfer.app.pages.run_facts import user_warnings
from probinfer.app.pages.units import learned_names, quantities
from probinfer.core.errors import NumericalError
from probinfer.core.types import Float, PRNGKey
from probinfer.data import Dataset
from probinfer.plots.style import Picture, draw
from probinfer.report.html import Gallery, Legend, Paragraph, Section
from probinfer.report.scoring import Estimate, predictions
from probinfer.report.tables import TextTable, seconds, with_error

__all__ = [
    "KERNELS",
    "CandidateKernel",
    "KernelEvidence",
    "estimate_evidence",
    "evidence_section",
    "evidence_table",
    "probabilities",
]

_HALF, _THIRD = 5.05, 3.2
_NUM_ISLANDS = 4
_NUM_REPLICATES = 4000  # simulated errors of the log evidences


class CandidateKernel(NamedTuple):
    """A kernel: its name, the kernel with its initial hyperparameters, and the assumption that it makes."""

    label: str
    kernel: Any
    assumption: str


class KernelEvidence(NamedTuple):
    """The fit of a kernel by tempered SMC.

    Attributes:
        candidate: the kernel.
        fit: the fit; None if it failed.
        log_evidence: log evidence with its standard error, in the units of the data; None if the fit failed.
        seconds: wall time, including compilation.
        remark: warnings of the fit, or why it failed; "" if there are none.
    """

    candidate: CandidateKernel
    fit: Any
    log_evidence: Estimate | None
    seconds: float
    remark: str = ""


KERNELS = (
    CandidateKernel("squared exponential", gp.kernels.RBF(1.0, 1.0), "the flow changes smoothly"),
    CandidateKernel("Matérn 5/2", gp.kernels.Matern52(1.0, 1.0), "the flow changes less smoothly"),
    CandidateKernel(
        "Matérn 1/2", gp.kernels.Matern12(1.0, 1.0), "the flow changes abruptly from year to year"
    ),
)


def estimate_evidence(
    key: PRNGKey,
    num_particles: int,
    *,
    kernels: Sequence[CandidateKernel] = KERNELS,
    rows: int | None = None,
    progress: bool | None = None,
    done: Callable[[KernelEvidence], None] = lambda result: None,
) -> tuple[Dataset, list[KernelEvidence]]:
    """Estimate the evidence of kernels for the flow of the Nile.

    Args:
        key: random key.
        num_particles: number of particles of each of the four islands.
        kernels: the candidates.
        rows: number of years; None uses all.
        progress: whether to show progress; None shows it on a terminal.
        done: called with each result as soon as it is available.

    Returns:
        The data, and the result of each kernel.
    """
    table = data.nile()
    table = table if rows is None else table.take(np.arange(rows))
    engine, results = smc.Tempered(num_particles, _NUM_ISLANDS, moves="independent"), []
    for candidate, candidate_key in zip(kernels, jax.random.split(key, len(kernels))):
        results.append(_fit_kernel(candidate_key, candidate, table, engine, progress))
        done(results[-1])
    return table, results


def _fit_kernel(key, candidate, table, engine, progress):
    start = time.perf_counter()
    model = gp.Model(candidate.kernel, gp.likelihoods.Gaussian(0.5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit = gp.fit(key, model, table.X, table.y, learn=engine, standardize=True, progress=progress)
        except NumericalError as error:
            return KernelEvidence(
                candidate=candidate,
                fit=None,
                log_evidence=None,
                seconds=time.perf_counter() - start,
                remark=f"failed: {error}",
            )
    remark = "; ".join(user_warnings(caught))
    log_evidence = Estimate(float(fit.log_evidence), float(fit.info.log_evidence_error))
    return KernelEvidence(
        candidate=candidate,
        fit=fit,
        log_evidence=log_evidence,
        seconds=time.perf_counter() - start,
        remark=remark,
    )


def probabilities(results: Sequence[KernelEvidence]) -> Float[np.ndarray, "kernel 3"]:
    """Return posterior probabilities of kernels with equal prior probabilities: estimates, and ends of 95 % intervals.

    The intervals account for the Monte Carlo error of the log evidences: in each replicate, each log evidence changes
    by its standard error times a Student-t variable, with one degree of freedom less than the number of islands.

    Args:
        results: kernels whose fit succeeded.
    """
    log_evidences = np.array([result.log_evidence.value for result in results if result.log_evidence])
    errors = np.array([result.log_evidence.error for result in results if result.log_evidence])
    num_freedom = min(len(result.fit.info.log_evidences) for result in results) - 1
    t_values = stats.t(num_freedom).rvs(
        (_NUM_REPLICATES, len(log_evidences)), random_state=np.random.default_rng(0)
    )
    replicates = special.softmax(log_evidences + errors * t_values, axis=1)
    low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
    return np.stack([special.softmax(log_evidences), low, high], axis=1)


def evidence_table(results: Sequence[KernelEvidence]) -> TextTable:
    """Return one row for each kernel."""
    succeeded = [result for result in results if result.fit is not None]
    kernel_probabilities = dict(
        zip([result.candidate.label for result in succeeded], probabilities(succeeded) if succeeded else ())
    )
    rows = []
    for result in results:
        label = result.candidate.label
        if result.fit is None:
            rows.append((label, result.candidate.assumption, "failed", *("-",) * 4, seconds(result.seconds)))
            continue
        estimate, low, high = kernel_probabilities[label]
        info = result.fit.info
        rows.append(
            (
                label,
                result.candidate.assumption,
                with_error(result.log_evidence),
                f"{100 * estimate:.0f} %",
                f"{100 * low:.0f} to {100 * high:.0f} %",
                str(len(info.temperatures)),
                str(int(info.num_gradients) + int(info.num_densities)),
                seconds(result.seconds),
            )
        )
    columns = (
        "kernel",
        "assumption",
        "log evidence",
        "probability",
        "95 % interval",
        "levels",
        "evaluations",
        "time",
    )
    return TextTable("Nile: which kernel?", columns, tuple(rows), text_columns=(1,))


def evidence_section(table: Dataset, results: Sequence[KernelEvidence], scores: TextTable) -> Section:
    """Return the section: introduction, conclusion, table and plots."""
    introduction = (
        f"{table.description} How does the flow change? Three kernels make different assumptions. They are compared by "
        "their evidence, the probability of the data averaged over the prior of the hyperparameters. Tempered "
        "sequential Monte Carlo estimates it: particles drawn from the prior move to the posterior through a sequence "
        "of intermediate distributions. Four independent runs give the standard error of the estimate. The "
        "probabilities assume that all kernels are equally probable a priori; their intervals account for the Monte "
        "Carlo error only. The probabilities depend on the priors of the hyperparameters, here the default ones."
    )
    remarks = [
        Paragraph(f"{result.candidate.label}: {result.remark}", "remark")
        for result in results
        if result.remark
    ]
    succeeded = [result for result in results if result.fit is not None]
    if not succeeded:
        return Section("Nile: which kernel?", (Paragraph(introduction), scores._replace(title=""), *remarks))
    entries = tuple((result.candidate.label, _style(results, result)) for result in succeeded)
    pictures = [
        _probabilities_picture(results, succeeded),
        _ess_picture(results, succeeded),
        *_hyperparameter_pictures(results, succeeded, table),
    ]
    return Section(
        "Nile: which kernel?",
        (
            Paragraph(introduction),
            Paragraph(conclusion(succeeded), "finding"),
            scores._replace(title=""),
            *remarks,
            Legend(entries),
            Gallery(tuple(pictures)),
            Gallery((_series_picture(succeeded, table),)),
        ),
    )


def conclusion(succeeded: Sequence[KernelEvidence]) -> str:
    """Return the conclusion from the probabilities, in one or two sentences."""
    kernel_probabilities = probabilities(succeeded)
    order = np.argsort(-kernel_probabilities[:, 0])
    best = succeeded[order[0]].candidate
    if len(succeeded) == 1:
        return f"Only the {best.label} kernel has an estimate of its evidence."
    first, second = kernel_probabilities[order[0]], kernel_probabilities[order[1]]
    clearly = "clearly " if first[1] > second[2] else ""
    advice = (
        ""
        if first[1] > 0.95
        else " The data do not decide between the kernels: average their predictions by these probabilities."
    )
    return (
        f"The {best.label} kernel ({best.assumption}) is {clearly}the most probable, with probability "
        f"{100 * first[0]:.0f} % ({100 * first[1]:.0f} to {100 * first[2]:.0f} %).{advice}"
    )


def _style(results, result):
    return [other.candidate.label for other in results].index(result.candidate.label)


def _probabilities_picture(results, succeeded) -> Picture:
    kernel_probabilities = probabilities(succeeded)

    def fn(axes, theme):
        for i, (result, (middle, low, high)) in enumerate(zip(succeeded, kernel_probabilities)):
            color = theme.series[_style(results, result)]
            axes.barh(i, middle, height=0.55, color=color, alpha=0.35)
            axes.plot([low, high], [i, i], color=color, linewidth=2)
            axes.plot(middle, i, "o", color=color, markersize=6)
        axes.set(yticks=range(len(succeeded)), yticklabels=[result.candidate.label for result in succeeded])
        axes.set(xlim=(0, 1), ylim=(len(succeeded) - 0.4, -0.6), xlabel="posterior probability of the kernel")
        axes.grid(False, axis="y")

    caption = (
        "Bars: probability of each kernel. Lines: 95 % intervals from the standard errors of the evidences."
    )
    return draw("Posterior probabilities of the kernels", caption, fn, width=_HALF, height=2.6)


def _ess_picture(results, succeeded) -> Picture:
    def fn(axes, theme):
        for result in succeeded:
            info, color = result.fit.info, theme.series[_style(results, result)]
            ess_shares = np.asarray(info.particle_ess) / result.fit.posterior.num_draws
            temperatures = np.asarray(info.temperatures)
            axes.plot(temperatures, ess_shares.T, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(temperatures, np.nanmean(ess_shares, axis=0), "o-", color=color, markersize=4)
        axes.set_xscale("log")
        axes.set(xlabel="inverse temperature (1: the posterior)", ylabel="ESS / number of particles")
        axes.set_ylim(0, 1.05)

    caption = (
        "Each dot is one level of the schedule, which a pilot run chose such that the ESS is half the number of "
        "particles. Thin lines: the four islands."
    )
    return draw("From prior to posterior", caption, fn, width=_HALF, height=2.6)


def _hyperparameter_pictures(results, succeeded, table):
    columns: dict[tuple[str, str], list[plots.Curve]] = {}
    for result in succeeded:
        fit = result.fit
        names = learned_names(jax.tree.map(lambda leaf: leaf[0], fit.models), _prior(fit))
        for item in quantities(fit, names, table.feature_names, target=table.target_name):
            curve = plots.Curve(result.candidate.label, _style(results, result), item.values)
            columns.setdefault((item.label, item.unit), []).append(curve)
    return [_density_picture(label, unit, curves) for (label, unit), curves in columns.items()]


def _prior(fit):
    model = jax.tree.map(lambda leaf: leaf[0], fit.models)
    return gp.default_prior(model, fit.X)


def _density_picture(label, unit, curves):
    return draw(
        label,
        "",
        lambda axes, theme: plots.densities(
            axes, theme, curves, label=unit or "dimensionless", positive=True
        ),
        width=_THIRD,
        height=2.1,
    )


def _series_picture(succeeded, table) -> Picture:
    best = succeeded[int(np.argmax(probabilities(succeeded)[:, 0]))]
    x = table.X[:, 0]
    grid = np.linspace(x.min(), x.max(), 200)
    predicted = predictions(best.fit, grid[:, None])
    no_test_data = (np.empty(0), np.empty(0))
    return draw(
        f"Flow predicted by the {best.candidate.label} kernel",
        "Dots: the data. Bands: 50 and 95 % predictive intervals of a year's flow by the most probable kernel, "
        "averaged over the hyperparameters.",
        lambda axes, theme: plots.series(
            axes, theme, grid, predicted, (x, table.y), no_test_data, labels=("year", table.target_name)
        ),
        width=2 * _HALF,
        height=3.2,
    )
