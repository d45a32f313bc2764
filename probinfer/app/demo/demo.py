"""The demo: several engines or approximations on four real data sets, a language model, and a report."""

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
from probinfer.app.demo.calibration import calibration_section, calibration_table, check_calibration
from probinfer.app.demo.classification import METHODS as CLASSIFICATION_METHODS
from probinfer.app.demo.classification import (
    ClassificationResult,
    classification_section,
    classification_table,
    classify,
)
from probinfer.app.demo.kernel_choice import (
    KERNELS,
    KernelEvidence,
    estimate_evidence,
    evidence_section,
    evidence_table,
)
from probinfer.app.demo.language_model import lm_section, lm_table, solve_problems
from probinfer.app.demo.particles import coin_section, coin_table, compare_particles
from probinfer.app.pages import sections as page_sections
from probinfer.app.pages.engines import ENGINES
from probinfer.app.pages.methods import (
    MethodResult,
    RegressionProblem,
    chains_table,
    methods_table,
    run_methods,
)
from probinfer.app.pages.run_facts import provenance
from probinfer.app.pages.units import most_relevant
from probinfer.core.errors import MissingExtraError, import_extra
from probinfer.report.html import Paragraph, Section, check_folder, page, write_page
from probinfer.report.tables import seconds, to_rich

__all__ = ["FULL", "SMALL", "DemoSize", "co2_problem", "diabetes_problem", "run_demo"]


class DemoSize(NamedTuple):
    """The amount of work of the demo.

    Attributes:
        num_draws: number of draws per chain.
        num_patients: training rows of the diabetes data.
        co2_stride: months between two used rows of the CO2 series.
        num_tumors: training rows of the breast cancer data.
        num_simulations: simulated data sets of the calibration checks.
        num_particles: particles of each island of tempered SMC.
        num_years: rows of the Nile data; None uses all.
        max_steps: maximum number of steps of coin SVGD.
        num_problems: problems for the language model.
    """

    num_draws: int
    num_patients: int
    co2_stride: int
    num_tumors: int
    num_simulations: int
    num_particles: int = 1024
    num_years: int | None = None
    max_steps: int = 2048
    num_problems: int = 40


FULL = DemoSize(num_draws=500, num_patients=200, co2_stride=3, num_tumors=250, num_simulations=300)
SMALL = DemoSize(
    num_draws=100,
    num_patients=80,
    co2_stride=6,
    num_tumors=60,
    num_simulations=100,
    num_particles=128,
    max_steps=128,
    num_problems=12,
)


def diabetes_problem(size: DemoSize, *, seed: int) -> RegressionProblem:
    """Return the diabetes problem: ten measurements with one lengthscale each, 70 % of the patients for training."""
    table = data.diabetes()
    train, test = data.random_split(len(table.y), 0.7, seed=seed)
    X = table.X[train[: size.num_patients]]
    num_columns = X.shape[1]
    kernel = gp.kernels.Matern52(
        variance=1.0, lengthscale=jnp.full(num_columns, 2.0 * float(np.sqrt(num_columns)))
    )
    model = gp.Model(kernel, gp.likelihoods.Gaussian(variance=0.5))
    prior = gp.default_prior(model, (X - X.mean(0)) / X.std(0))
    return RegressionProblem(
        data=table,
        train=train[: size.num_patients],
        test=test,
        model=model,
        prior=prior,
        parts={"kernel": "function", "likelihood": ""},
    )


def co2_problem(size: DemoSize) -> RegressionProblem:
    """Return the CO2 problem: a rising trend, a yearly cycle, irregular changes over a few years, and noise.

    The first three quarters of the series are for training, the rest is to be forecast.

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, section 5.4.3.
    """
    table = data.co2()
    table = table.take(np.arange(0, len(table.y), size.co2_stride))
    train, test = data.ordered_split(len(table.y), 0.75)
    year = 1 / float(table.X[train].std())  # one year in the units of the model
    trend = gp.kernels.RBF(variance=4.0, lengthscale=40 * year)
    cycle = gp.kernels.Periodic(variance=0.1, lengthscale=1.0, period=year)
    irregular = gp.kernels.RationalQuadratic(variance=0.01, lengthscale=year, alpha=1.0)
    model = gp.Model(trend + cycle + irregular, gp.likelihoods.Gaussian(variance=0.001))
    prior = gp.default_prior(model, table.X[train] * year)
    priors: dict[str, Any] = {
        "kernel.terms.0.variance": dist.LogNormal(0.0, 2.0),
        "kernel.terms.0.lengthscale": dist.LogNormal(np.log(40 * year), 1.0),
        "kernel.terms.1.variance": dist.LogNormal(np.log(0.1), 1.5),
        "kernel.terms.1.lengthscale": dist.LogNormal(0.0, 1.0),
        "kernel.terms.1.period": gp.fixed,
        "kernel.terms.2.variance": dist.LogNormal(np.log(0.01), 1.5),
        # A lengthscale below the time between two observations would make this term a second noise term.
        "kernel.terms.2.lengthscale": dist.LogNormal(np.log(1.5 * year), 0.5),
    }
    parts = {"kernel.terms.0": "trend", "kernel.terms.1": "yearly cycle", "kernel.terms.2": "irregular"}
    return RegressionProblem(
        data=table,
        train=train,
        test=test,
        model=model,
        prior=gp.replace(prior, priors),
        parts=parts,
        block=max(12 // size.co2_stride, 1),  # one year
    )


def run_demo(out: str, size: DemoSize, *, seed: int, command: str, console: Console) -> Path:
    """Run all sections of the demo, print their tables, and write the report.

    Args:
        out: folder of the report.
        size: the amount of work.
        seed: seed of the data splits and of all random keys.
        command: the command line, recorded in the report.
        console: console of progress and warnings.

    Returns:
        The path of the page.
    """
    start = time.perf_counter()
    check_folder(out)
    import_extra("matplotlib", "plots")
    sections = [Section("How to read the tables", (Paragraph(page_sections.READING),))]
    tables, sources = [], {}
    regressions = _regressions(size, seed)
    last_key, *keys = jax.random.split(jax.random.key(seed), len(regressions) + 1)
    check_key = jax.random.fold_in(last_key, 1)
    for key, (name, (problem, make_section)) in zip(keys, regressions.items()):
        text = f"{name}: training on {len(problem.train)} points, predicting {len(problem.test)}"
        console.print(f"[bold]{text}[/bold]")
        entries = [entry for entry in ENGINES if entry.in_demo]
        methods = run_methods(
            key, problem, entries, draws=size.num_draws, done=partial(_print_method, console)
        )
        tables.append(_tables(name, problem, methods))
        sections.append(make_section(problem, methods, tables[-1]))
        sources[f"data: {name}"] = f"{problem.data.source}; license: {problem.data.license}"
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
    path = write_page(out, page("probinfer: inference on real data", _LEAD, sections, facts))
    for group in tables:
        for table in group:
            console.print(to_rich(table))
    return path


_LEAD = (
    "A Gaussian process predicts with error bars, but its hyperparameters (smoothness, amplitude, noise) must be "
    "learned from the data. One can use a point estimate (ML-II, MAP) or the posterior of the hyperparameters "
    "(mean-field, full-rank, NUTS). This page does both on real data and compares the predictions on held-out data."
)


def _regressions(size, seed):
    """Return the problem of each data set, and the function that makes its section."""
    return {
        "Diabetes": (diabetes_problem(size, seed=seed), _diabetes_section),
        "CO2": (co2_problem(size), _co2_section),
    }


def _print_method(console: Console, method: MethodResult) -> None:
    console.print(f"  {method.entry.label:<14} {seconds(method.seconds):>9}   {method.entry.about}")
    if method.remark:
        console.print(f"    [yellow]{escape(method.remark)}[/yellow]", highlight=False)


def _classification(key, size, console):
    console.print(f"[bold]Breast cancer: training on {size.num_tumors} tumors, predicting the others[/bold]")
    table, results, labels = classify(
        key, size.num_tumors, methods=CLASSIFICATION_METHODS, done=partial(_print_classification, console)
    )
    scores = classification_table(results, labels, title=f"Breast cancer: {len(labels)} held-out tumors")
    section = classification_section(table, results, labels, scores, rows=size.num_tumors)
    return section, scores, f"{table.source}; license: {table.license}"


def _kernels(key, size, console):
    console.print("[bold]Nile: evidence of three kernels by tempered sequential Monte Carlo[/bold]")
    table, results = estimate_evidence(
        key, size.num_particles, kernels=KERNELS, rows=size.num_years, done=partial(_print_kernel, console)
    )
    scores = evidence_table(results)
    return evidence_section(table, results, scores), scores, f"{table.source}; license: {table.license}"


def _particles(key, size, console):
    text = f"Breast cancer: coin SVGD without a learning rate, compared with NUTS, {size.num_tumors} tumors"
    console.print(f"[bold]{text}[/bold]")
    table, comparison = compare_particles(
        key, size.num_tumors, draws=size.num_draws, max_steps=size.max_steps
    )
    for label, wall_time in zip(("coin SVGD", "NUTS"), comparison.seconds):
        console.print(f"  {label:<14} {seconds(wall_time):>9}")
    for remark in comparison.remarks:
        console.print(f"    [yellow]{escape(remark)}[/yellow]", highlight=False)
    scores = coin_table(comparison)
    return coin_section(table, comparison, scores), scores


def _language(key, size, seed, console):
    console.print("[bold]A language model: one problem solved live by 16 particles, then many[/bold]")
    try:
        model = lm.reasoner.model()
    except (MissingExtraError, FileNotFoundError) as error:
        console.print(f"    [yellow]{escape(str(error))}[/yellow]", highlight=False)
        return Section("Sampling from a language model", (Paragraph(f"Left out: {error}", "remark"),)), []
    results = solve_problems(key, size.num_problems, seed=seed, console=console, model=model)
    for method in results.methods:
        accuracy = f"{method.is_correct.mean():.0%} correct"
        console.print(f"  {method.label:<19} {seconds(method.seconds):>9}   {accuracy}")
    table = lm_table(results)
    return lm_section(results, table), [table]


def _print_kernel(console: Console, result: KernelEvidence) -> None:
    candidate = result.candidate
    console.print(f"  {candidate.label:<19} {seconds(result.seconds):>9}   {candidate.assumption}")
    if result.remark:
        console.print(f"    [yellow]{escape(result.remark)}[/yellow]", highlight=False)


def _calibration(key, size, console):
    text = f"Calibration: hyperparameters learned on {size.num_simulations} simulated data sets with known parameters"
    console.print(f"[bold]{text}[/bold]")
    start = time.perf_counter()
    results = check_calibration(key, size.num_simulations)
    console.print(f"  {'checked':<14} {seconds(time.perf_counter() - start):>9}   {len(results)} verdicts")
    table = calibration_table(results)
    return calibration_section(results, table), table


def _print_classification(console: Console, result: ClassificationResult) -> None:
    console.print(f"  {result.method.label:<14} {seconds(result.seconds):>9}   {result.method.about}")
    if result.remark:
        console.print(f"    [yellow]{escape(result.remark)}[/yellow]", highlight=False)


def _tables(name, problem, methods):
    scored = methods_table(problem, methods, title=f"{name}: {len(problem.test)} held-out points")
    scored = scored._replace(note=page_sections.verdict(problem, methods))
    chains = chains_table(methods)
    return [scored, chains._replace(title=f"{name}: convergence of the chains")] if chains.rows else [scored]


def _diabetes_section(problem, methods, tables):
    introduction = (
        f"{problem.data.description} The model is trained on {len(problem.train)} patients, with one lengthscale "
        f"for each measurement, and predicts {len(problem.test)} others."
    )
    blocks = [Paragraph(introduction), *_result_blocks(problem, methods, tables)]
    blocks.append(page_sections.gallery(page_sections.score_pictures(problem, methods, unit="progression")))
    blocks += _hyperparameter_blocks(problem, methods)
    reference = next((method for method in methods if method.fit is not None), None)
    if reference is not None:
        X, features = problem.data.X[problem.train], problem.data.feature_names
        chosen = most_relevant(reference.fit, 3)
        pictures = page_sections.effects(reference.fit, X, features, chosen=chosen)
        blocks += [
            Paragraph(
                f"Effects of the three most relevant measurements on the prediction of {reference.entry.label}, with "
                "the others fixed at their medians. The bands are predictive intervals of a new patient; the ticks at "
                "the bottom mark the training data."
            ),
            page_sections.gallery(pictures),
        ]
    return Section("Diabetes: predicting patients", tuple(blocks))


def _co2_section(problem, methods, tables):
    ends = problem.data.X[[problem.train[0], problem.train[-1], problem.test[-1]], 0]
    introduction = (
        f"{problem.data.description} The model is a sum of a rising trend, a yearly cycle, irregular changes over a "
        f"few years, and noise. It is trained on {ends[0]:.0f} to {ends[1]:.0f} and forecasts until {ends[2]:.0f}. Far "
        "from the data, the forecast depends strongly on the hyperparameters, so that here it matters whether a point "
        "estimate or the posterior is used. The standard errors treat years, not months, as independent; forecast "
        "errors are correlated over longer times, so the standard errors are lower limits."
    )
    blocks = [Paragraph(introduction), *_result_blocks(problem, methods, tables)]
    succeeded = [method for method in methods if method.predicted is not None]
    if succeeded:
        first_and_last = [succeeded[0], succeeded[-1]] if len(succeeded) > 1 else succeeded
        pictures = [
            page_sections.series_picture(problem, succeeded[0]),
            *page_sections.error_pictures(problem, first_and_last),
        ]
        blocks.append(
            page_sections.gallery(
                [*pictures, *page_sections.score_pictures(problem, methods, unit="ppm")[2:]]
            )
        )
    blocks += _hyperparameter_blocks(problem, methods)
    return Section("CO2: forecasting a series", tuple(blocks))


def _result_blocks(problem, methods, tables):
    first, *others = tables
    conclusion = Paragraph(page_sections.verdict(problem, methods), "finding")
    return [conclusion, first._replace(note=""), *others, *page_sections.remarks(methods)]


def _hyperparameter_blocks(problem, methods):
    return [
        Paragraph(
            "Learned hyperparameters, in the units of the data. Densities: posteriors. Vertical lines: point "
            "estimates; an arrow at an edge marks a point estimate beyond it."
        ),
        page_sections.legend(methods),
        page_sections.gallery(page_sections.hyperparameters(problem, methods)),
    ]
