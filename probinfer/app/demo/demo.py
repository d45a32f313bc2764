"""The demo: four real data sets, every engine or approximation on each, a language model, a report in plain words."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from rich.console import Console
from rich.markup import escape

from probinfer import data, gp, lm
from probinfer.app.demo.calibration import calibration_section, calibration_table, judge_learning
from probinfer.app.demo.classification import METHODS as WAYS
from probinfer.app.demo.classification import (
    Classified,
    classification_section,
    classification_table,
    classify,
)
from probinfer.app.demo.kernel_choice import KERNELS, Weighed, evidence_section, evidence_table, weigh
from probinfer.app.demo.language_model import lm_section, lm_table, solve
from probinfer.app.demo.particles import carry, coin_section, coin_table
from probinfer.app.pages import sections as sections_of
from probinfer.app.pages.engines import ENGINES
from probinfer.app.pages.methods import Method, Problem, chains_table, methods_table, run_methods
from probinfer.app.pages.run_facts import provenance
from probinfer.app.pages.units import most_relevant
from probinfer.core.errors import MissingExtraError, import_extra
from probinfer.report.html import Paragraph, Section, check_folder, page, write_page
from probinfer.report.tables import seconds, to_rich

__all__ = ["FULL", "SMALL", "Size", "co2_problem", "diabetes_problem", "run_demo"]


class Size(NamedTuple):
    """How much work the demo does.

    Attributes:
        draws: draws of a chain.
        patients: training rows of the diabetes data.
        every: every so many months of the CO2 series.
        tumours: training rows of the breast cancer data.
        simulations: simulated data sets that the learning is checked on.
        particles: of an island of tempered SMC.
        years: rows of the Nile; all by default.
        steps: the most steps of the particles of coin SVGD.
        questions: problems for the language model.
    """

    draws: int
    patients: int
    every: int
    tumours: int
    simulations: int
    particles: int = 1024
    years: int | None = None
    steps: int = 2048
    questions: int = 40


FULL = Size(draws=500, patients=200, every=3, tumours=250, simulations=300)
SMALL = Size(
    draws=100, patients=80, every=6, tumours=60, simulations=100, particles=128, steps=128, questions=12
)


def diabetes_problem(size: Size, *, seed: int) -> Problem:
    """Ten measurements of a patient, one lengthscale each; 70 % of the patients for training."""
    table = data.diabetes()
    train, test = data.random_split(len(table.y), 0.7, seed=seed)
    X = table.X[train[: size.patients]]
    num_columns = X.shape[1]
    kernel = gp.kernels.Matern52(
        variance=1.0, lengthscale=jnp.full(num_columns, 2.0 * float(np.sqrt(num_columns)))
    )
    model = gp.Model(kernel, gp.likelihoods.Gaussian(variance=0.5))
    prior = gp.default_prior(model, (X - X.mean(0)) / X.std(0))
    return Problem(
        table, train[: size.patients], test, model, prior, {"kernel": "function", "likelihood": ""}
    )


def co2_problem(size: Size) -> Problem:
    """A rising trend, a cycle of one year, irregular changes of a few years, and noise.

    Learns from the first three quarters of the series and forecasts the rest.

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, section 5.4.3.
    """
    table = data.co2()
    table = table.take(np.arange(0, len(table.y), size.every))
    train, test = data.ordered_split(len(table.y), 0.75)
    year = 1 / float(table.X[train].std())  # one year in the units of the model
    trend = gp.kernels.RBF(variance=4.0, lengthscale=40 * year)
    cycle = gp.kernels.Periodic(variance=0.1, lengthscale=1.0, period=year)
    wiggles = gp.kernels.RationalQuadratic(variance=0.01, lengthscale=year, alpha=1.0)
    model = gp.Model(trend + cycle + wiggles, gp.likelihoods.Gaussian(variance=0.001))
    prior = gp.default_prior(model, table.X[train] * year)
    own: dict[str, Any] = {
        "kernel.terms.0.variance": dist.LogNormal(0.0, 2.0),
        "kernel.terms.0.lengthscale": dist.LogNormal(np.log(40 * year), 1.0),
        "kernel.terms.1.variance": dist.LogNormal(np.log(0.1), 1.5),
        "kernel.terms.1.lengthscale": dist.LogNormal(0.0, 1.0),
        "kernel.terms.1.period": gp.fixed,
        "kernel.terms.2.variance": dist.LogNormal(np.log(0.01), 1.5),
        # Below the time between two observations it would be a second noise term.
        "kernel.terms.2.lengthscale": dist.LogNormal(np.log(1.5 * year), 0.5),
    }
    parts = {"kernel.terms.0": "trend", "kernel.terms.1": "yearly cycle", "kernel.terms.2": "irregular"}
    return Problem(table, train, test, model, gp.replace(prior, own), parts, block=max(12 // size.every, 1))


def run_demo(out: str, size: Size, *, seed: int, command: str, console: Console) -> Path:
    """Fit both data sets with every engine, print the tables, write the report.

    Args:
        out: folder of the report.
        size: how much work.
        seed: of the data split and of every engine.
        command: what the user typed, for the report.
        console: where progress and remarks go.

    Returns:
        The path of the page.
    """
    start = time.perf_counter()
    check_folder(out)
    import_extra("matplotlib", "plots")
    sections = [Section("How to read the tables", (Paragraph(sections_of.READING),))]
    tables, sources = [], {}
    regressions = _regressions(size, seed)
    last_key, *keys = jax.random.split(jax.random.key(seed), len(regressions) + 1)
    check_key = jax.random.fold_in(last_key, 1)
    for key, (name, (problem, build)) in zip(keys, regressions.items()):
        text = f"{name}: learning from {len(problem.train)} points, {len(problem.test)} to predict"
        console.print(f"[bold]{text}[/bold]")
        shown = [entry for entry in ENGINES if entry.in_demo]
        methods = run_methods(key, problem, shown, draws=size.draws, done=partial(_say, console))
        tables.append(_tables(name, problem, methods))
        sections.append(build(problem, methods, tables[-1]))
        sources[f"data: {name}"] = f"{problem.data.source}; licence: {problem.data.licence}"
    section, table, source = _classification(last_key, size, console)
    sections.append(section)
    tables.append([table])
    sources["data: breast cancer"] = source
    section, table, source = _kernels(jax.random.fold_in(last_key, 2), size, console)
    sections.append(section)
    tables.append([table])
    sources["data: Nile"] = source
    section, table = _particles(jax.random.fold_in(last_key, 3), size, console)
    sections.append(section)
    tables.append([table])
    section, group = _language(jax.random.fold_in(last_key, 4), size, seed, console)
    sections.append(section)
    tables.append(group)
    section, table = _calibration(check_key, size, console)
    sections.append(section)
    tables.append([table])
    facts = provenance(command, seed=seed, seconds=time.perf_counter() - start, extra=sources)
    path = write_page(out, page("probinfer: five ways to learn a Gaussian process", _LEAD, sections, facts))
    for group in tables:
        for table in group:
            console.print(to_rich(table))
    return path


_LEAD = (
    "A Gaussian process predicts with error bars, but how smooth, how large and how noisy must be learned "
    "from the data. One can pick the single best setting (ML-II, MAP), or keep every plausible setting with "
    "its weight (mean-field, full-rank, NUTS). This page does both on real data and asks which "
    "predictions held up on data that nobody had seen."
)


def _regressions(size, seed):
    """The problem of each data set, and what builds its section."""
    return {
        "Diabetes": (diabetes_problem(size, seed=seed), _diabetes_section),
        "CO2": (co2_problem(size), _co2_section),
    }


def _say(console: Console, method: Method) -> None:
    console.print(f"  {method.entry.label:<14} {seconds(method.seconds):>9}   {method.entry.about}")
    if method.remark:
        console.print(f"    [yellow]{escape(method.remark)}[/yellow]", highlight=False)


def _classification(key, size, console):
    console.print(f"[bold]Breast cancer: learning from {size.tumours} tumours, the others to predict[/bold]")
    table, found, labels = classify(key, size.tumours, ways=WAYS, done=partial(_say_way, console))
    scores = classification_table(found, labels, title=f"Breast cancer: {len(labels)} unseen tumours")
    section = classification_section(table, found, labels, scores, rows=size.tumours)
    return section, scores, f"{table.source}; licence: {table.licence}"


def _kernels(key, size, console):
    console.print("[bold]Nile: which kernel? Their evidence by tempered sequential Monte Carlo[/bold]")
    table, found = weigh(
        key, size.particles, kernels=KERNELS, rows=size.years, done=partial(_say_kernel, console)
    )
    scores = evidence_table(found)
    return evidence_section(table, found, scores), scores, f"{table.source}; licence: {table.licence}"


def _particles(key, size, console):
    text = f"Breast cancer: particles without a learning rate, {size.tumours} tumours, beside NUTS"
    console.print(f"[bold]{text}[/bold]")
    table, found = carry(key, size.tumours, draws=size.draws, max_steps=size.steps)
    for label, spent in zip(("coin SVGD", "NUTS"), found.seconds):
        console.print(f"  {label:<14} {seconds(spent):>9}")
    for remark in found.remarks:
        console.print(f"    [yellow]{escape(remark)}[/yellow]", highlight=False)
    scores = coin_table(found)
    return coin_section(table, found, scores), scores


def _language(key, size, seed, console):
    console.print("[bold]A language model: one problem solved live by 16 particles, then many[/bold]")
    try:
        model = lm.reasoner.model()
    except (MissingExtraError, FileNotFoundError) as error:
        console.print(f"    [yellow]{escape(str(error))}[/yellow]", highlight=False)
        return Section("A language model in particles", (Paragraph(f"Left out: {error}", "remark"),)), []
    found = solve(key, size.questions, seed=seed, console=console, model=model)
    for method in found.methods:
        console.print(f"  {method.label:<19} {seconds(method.seconds):>9}   {method.right.mean():.0%} right")
    table = lm_table(found)
    return lm_section(found, table), [table]


def _say_kernel(console: Console, one: Weighed) -> None:
    console.print(f"  {one.candidate.label:<19} {seconds(one.seconds):>9}   {one.candidate.about}")
    if one.remark:
        console.print(f"    [yellow]{escape(one.remark)}[/yellow]", highlight=False)


def _calibration(key, size, console):
    text = f"Is it right? The same learning on {size.simulations} simulated data sets, whose truth is known"
    console.print(f"[bold]{text}[/bold]")
    start = time.perf_counter()
    found = judge_learning(key, size.simulations)
    console.print(f"  {'checked':<14} {seconds(time.perf_counter() - start):>9}   {len(found)} verdicts")
    table = calibration_table(found)
    return calibration_section(found, table), table


def _say_way(console: Console, method: Classified) -> None:
    console.print(f"  {method.way.label:<14} {seconds(method.seconds):>9}   {method.way.about}")
    if method.remark:
        console.print(f"    [yellow]{escape(method.remark)}[/yellow]", highlight=False)


def _tables(name, problem, methods):
    scored = methods_table(problem, methods, title=f"{name}: {len(problem.test)} unseen points")
    scored = scored._replace(note=sections_of.verdict(problem, methods))
    chains = chains_table(methods)
    return [scored, chains._replace(title=f"{name}: have the chains mixed?")] if chains.rows else [scored]


def _diabetes_section(problem, methods, tables):
    story = (
        f"{problem.data.description} The model learns from {len(problem.train)} patients, with one lengthscale "
        f"for each measurement, and predicts {len(problem.test)} others."
    )
    blocks = [Paragraph(story), *_result_blocks(problem, methods, tables)]
    blocks.append(sections_of.gallery(sections_of.score_pictures(problem, methods, unit="progression")))
    blocks += _hyperparameter_blocks(problem, methods)
    reference = next((method for method in methods if method.fit is not None), None)
    if reference is not None:
        X, features = problem.data.X[problem.train], problem.data.feature_names
        chosen = most_relevant(reference.fit, 3)
        pictures = sections_of.effects(reference.fit, X, features, chosen=chosen)
        blocks += [
            Paragraph(
                f"How the prediction of {reference.entry.label} changes with the three measurements that "
                "matter most, the others held at their medians. The bands are for a new patient; ticks at the "
                "foot are the patients seen."
            ),
            sections_of.gallery(pictures),
        ]
    return Section("Diabetes: predicting patients", tuple(blocks))


def _co2_section(problem, methods, tables):
    ends = problem.data.X[[problem.train[0], problem.train[-1], problem.test[-1]], 0]
    story = (
        f"{problem.data.description} The model is a sum: a rising trend, a cycle of one year, irregular "
        f"changes of a few years, and noise. It learns from {ends[0]:.0f} to {ends[1]:.0f} and forecasts until "
        f"{ends[2]:.0f}. Far from the data the forecast is only as good as the settings, so here it matters "
        "whether one setting was picked or all were kept. Standard errors take years, not months, as "
        "independent; errors of a forecast drift together for longer, so read them as lower limits."
    )
    blocks = [Paragraph(story), *_result_blocks(problem, methods, tables)]
    worked = [method for method in methods if method.predicted is not None]
    if worked:
        ends_of_table = [worked[0], worked[-1]] if len(worked) > 1 else worked
        pictures = [
            sections_of.series_picture(problem, worked[0]),
            *sections_of.error_pictures(problem, ends_of_table),
        ]
        blocks.append(
            sections_of.gallery([*pictures, *sections_of.score_pictures(problem, methods, unit="ppm")[2:]])
        )
    blocks += _hyperparameter_blocks(problem, methods)
    return Section("CO2: forecasting a series", tuple(blocks))


def _result_blocks(problem, methods, tables):
    first, *rest = tables
    finding = Paragraph(sections_of.verdict(problem, methods), "finding")
    return [finding, first._replace(note=""), *rest, *sections_of.remarks(methods)]


def _hyperparameter_blocks(problem, methods):
    return [
        Paragraph(
            "What was learned, in the units of the data. Hills are methods that keep every plausible setting, "
            "lines those that pick one; an arrow at an edge is a pick that lies beyond it."
        ),
        sections_of.legend(methods),
        sections_of.gallery(sections_of.hyperparameters(problem, methods)),
    ]
