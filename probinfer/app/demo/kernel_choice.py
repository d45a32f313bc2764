"""The demo's choice between kernels: their evidence by tempered SMC, with its error, and what follows from it."""

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
from probinfer.app.pages.units import learned_names, quantities
from probinfer.core.errors import NumericalError
from probinfer.core.types import Float, PRNGKey
from probinfer.data import Dataset
from probinfer.plots.style import Picture, draw
from probinfer.report.html import Gallery, Legend, Paragraph, Section
from probinfer.report.scoring import Estimate, predictions
from probinfer.report.tables import TextTable, seconds, with_error

__all__ = ["KERNELS", "Candidate", "Weighed", "evidence_section", "evidence_table", "probabilities", "weigh"]

_HALF, _THIRD = 5.05, 3.2
_ISLANDS = 4
_REPLICATES = 4000  # of the log evidences within their errors


class Candidate(NamedTuple):
    """A kernel: its name, where its hyperparameters start, and in one clause what it believes."""

    label: str
    kernel: Any
    about: str


class Weighed(NamedTuple):
    """What tempered SMC made of a kernel.

    Attributes:
        candidate: the kernel.
        fit: the fit; None if it failed.
        log_evidence: with its standard error, in the units of the data.
        seconds: wall time, compilation included.
        remark: what was warned of; "" if nothing.
    """

    candidate: Candidate
    fit: Any
    log_evidence: Estimate | None
    seconds: float
    remark: str = ""


KERNELS = (
    Candidate("squared exponential", gp.kernels.RBF(1.0, 1.0), "the flow changes smoothly"),
    Candidate("Matérn 5/2", gp.kernels.Matern52(1.0, 1.0), "it changes smoothly, with bends"),
    Candidate("Matérn 1/2", gp.kernels.Matern12(1.0, 1.0), "it jumps from year to year"),
)


def weigh(
    key: PRNGKey,
    num_particles: int,
    *,
    kernels: Sequence[Candidate] = KERNELS,
    rows: int | None = None,
    progress: bool | None = None,
    done: Callable[[Weighed], None] = lambda found: None,
) -> tuple[Dataset, list[Weighed]]:
    """Estimate the evidence of kernels for the flow of the Nile.

    Args:
        key: random key.
        num_particles: of each of the four islands.
        kernels: the candidates.
        rows: how many years; all by default.
        progress: a bar; None means on a terminal.
        done: called with each as soon as it is finished.

    Returns:
        The data, and what became of each kernel.
    """
    table = data.nile()
    table = table if rows is None else table.take(np.arange(rows))
    engine, found = smc.Tempered(num_particles, _ISLANDS, moves="independent"), []
    for kernel, kernel_key in zip(kernels, jax.random.split(key, len(kernels))):
        found.append(_run(kernel_key, kernel, table, engine, progress))
        done(found[-1])
    return table, found


def _run(key, kernel, table, engine, progress):
    start = time.perf_counter()
    model = gp.Model(kernel.kernel, gp.likelihoods.Gaussian(0.5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit = gp.fit(key, model, table.X, table.y, learn=engine, standardize=True, progress=progress)
        except NumericalError as error:
            return Weighed(kernel, None, None, time.perf_counter() - start, f"failed: {error}")
    remark = "; ".join(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
    log_evidence = Estimate(float(fit.log_evidence), float(fit.info.log_evidence_error))
    return Weighed(kernel, fit, log_evidence, time.perf_counter() - start, remark)


def probabilities(found: Sequence[Weighed]) -> Float[np.ndarray, "kernel 3"]:
    """Posterior probabilities of kernels that are equally probable beforehand: estimate, and ends of 95 % intervals.

    The intervals hold the Monte Carlo error of the log evidences: each is moved by its standard error times a Student-t
    of as many degrees of freedom as islands less one.

    Args:
        found: kernels that did not fail.
    """
    logs = np.array([one.log_evidence.value for one in found if one.log_evidence])
    errors = np.array([one.log_evidence.error for one in found if one.log_evidence])
    freedom = min(len(one.fit.info.log_evidences) for one in found) - 1
    moves = stats.t(freedom).rvs((_REPLICATES, len(logs)), random_state=np.random.default_rng(0))
    moved = special.softmax(logs + errors * moves, axis=1)
    low, high = np.quantile(moved, [0.025, 0.975], axis=0)
    return np.stack([special.softmax(logs), low, high], axis=1)


def evidence_table(found: Sequence[Weighed]) -> TextTable:
    """One row a kernel."""
    worked = [one for one in found if one.fit is not None]
    shares = dict(zip([one.candidate.label for one in worked], probabilities(worked) if worked else ()))
    rows = []
    for one in found:
        label = one.candidate.label
        if one.fit is None:
            rows.append((label, one.candidate.about, "failed", *("-",) * 4, seconds(one.seconds)))
            continue
        middle, low, high = shares[label]
        info = one.fit.info
        rows.append(
            (
                label,
                one.candidate.about,
                with_error(one.log_evidence),
                f"{100 * middle:.0f} %",
                f"{100 * low:.0f} to {100 * high:.0f} %",
                str(len(info.temperatures)),
                str(int(info.num_gradients) + int(info.num_densities)),
                seconds(one.seconds),
            )
        )
    columns = (
        "kernel",
        "what it believes",
        "log evidence",
        "probability",
        "95 % interval",
        "levels",
        "evaluations",
        "time",
    )
    return TextTable("Nile: which kernel?", columns, tuple(rows), text_columns=(1,))


def evidence_section(table: Dataset, found: Sequence[Weighed], scores: TextTable) -> Section:
    """The story, the finding, the table and the pictures."""
    story = (
        f"{table.description} How does the flow change? Three kernels say different things, and their evidence, the "
        "probability of the data with the hyperparameters averaged over their prior, weighs them. Tempered sequential "
        "Monte Carlo estimates it: particles drawn from the prior are moved to the posterior step by step, four times "
        "over; the four estimates of one kernel tell the error of their mean. The probabilities take the kernels as "
        "equally probable before the data, and their intervals hold the Monte Carlo error alone. They depend on the "
        "priors of the hyperparameters, here the default ones."
    )
    remarks = [Paragraph(f"{one.candidate.label}: {one.remark}", "remark") for one in found if one.remark]
    worked = [one for one in found if one.fit is not None]
    if not worked:
        return Section("Nile: which kernel?", (Paragraph(story), scores._replace(title=""), *remarks))
    entries = tuple((one.candidate.label, _style(found, one)) for one in worked)
    pictures = [_shares(found, worked), _levels(found, worked), *_densities(found, worked, table)]
    return Section(
        "Nile: which kernel?",
        (
            Paragraph(story),
            Paragraph(finding(worked), "finding"),
            scores._replace(title=""),
            *remarks,
            Legend(entries),
            Gallery(tuple(pictures)),
            Gallery((_series(worked, table),)),
        ),
    )


def finding(worked: Sequence[Weighed]) -> str:
    """What the probabilities say, in a sentence."""
    shares = probabilities(worked)
    order = np.argsort(-shares[:, 0])
    best = worked[order[0]].candidate
    if len(worked) == 1:
        return f"Only the {best.label} kernel could be weighed."
    first, second = shares[order[0]], shares[order[1]]
    sure = "clearly " if first[1] > second[2] else ""
    strong = (
        "" if first[1] > 0.95 else " The data do not settle it: every kernel with some weight should vote."
    )
    return (
        f"The {best.label} kernel ({best.about}) is {sure}the most probable, {100 * first[0]:.0f} % "
        f"({100 * first[1]:.0f} to {100 * first[2]:.0f} %).{strong}"
    )


def _style(found, one):
    return [other.candidate.label for other in found].index(one.candidate.label)


def _shares(found, worked) -> Picture:
    shares = probabilities(worked)

    def fn(axes, theme):
        for i, (one, (middle, low, high)) in enumerate(zip(worked, shares)):
            color = theme.series[_style(found, one)]
            axes.barh(i, middle, height=0.55, color=color, alpha=0.35)
            axes.plot([low, high], [i, i], color=color, linewidth=2)
            axes.plot(middle, i, "o", color=color, markersize=6)
        axes.set(yticks=range(len(worked)), yticklabels=[one.candidate.label for one in worked])
        axes.set(xlim=(0, 1), ylim=(len(worked) - 0.4, -0.6), xlabel="posterior probability of the kernel")
        axes.grid(False, axis="y")

    caption = "Bars: the probability of each kernel. Lines: 95 % intervals from the error of the evidences."
    return draw("Which kernel is probable?", caption, fn, width=_HALF, height=2.6)


def _levels(found, worked) -> Picture:
    def fn(axes, theme):
        for one in worked:
            info, color = one.fit.info, theme.series[_style(found, one)]
            shares = np.asarray(info.particle_ess) / one.fit.posterior.num_draws
            temperatures = np.asarray(info.temperatures)
            axes.plot(temperatures, shares.T, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(temperatures, np.nanmean(shares, axis=0), "o-", color=color, markersize=4)
        axes.set_xscale("log")
        axes.set(xlabel="temperature reached (1: the posterior)", ylabel="share of effective particles")
        axes.set_ylim(0, 1.05)

    caption = (
        "Each dot is a level, chosen by a pilot so that half of the particles stay effective; thin lines are the four "
        "islands."
    )
    return draw("From prior to posterior", caption, fn, width=_HALF, height=2.6)


def _densities(found, worked, table):
    columns: dict[tuple[str, str], list[plots.Curve]] = {}
    for one in worked:
        fit = one.fit
        names = learned_names(jax.tree.map(lambda leaf: leaf[0], fit.models), _prior(fit))
        for item in quantities(fit, names, table.feature_names, target=table.target_name):
            curve = plots.Curve(one.candidate.label, _style(found, one), item.values)
            columns.setdefault((item.label, item.unit), []).append(curve)
    return [_density(label, unit, curves) for (label, unit), curves in columns.items()]


def _prior(fit):
    model = jax.tree.map(lambda leaf: leaf[0], fit.models)
    return gp.default_prior(model, fit.X)


def _density(label, unit, curves):
    return draw(
        label,
        "",
        lambda axes, theme: plots.densities(
            axes, theme, curves, label=unit or "a pure number", positive=True
        ),
        width=_THIRD,
        height=2.1,
    )


def _series(worked, table) -> Picture:
    best = worked[int(np.argmax(probabilities(worked)[:, 0]))]
    x = table.X[:, 0]
    grid = np.linspace(x.min(), x.max(), 200)
    predicted = predictions(best.fit, grid[:, None])
    nothing = (np.empty(0), np.empty(0))
    return draw(
        f"The flow, by the {best.candidate.label} kernel",
        "Dots: the data. The dark band holds half of what the most probable kernel expects of a year's flow, the light "
        "band 95 %, with the hyperparameters averaged over.",
        lambda axes, theme: plots.series(
            axes, theme, grid, predicted, (x, table.y), nothing, labels=("year", table.target_name)
        ),
        width=2 * _HALF,
        height=3.2,
    )
