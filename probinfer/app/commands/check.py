"""``probinfer check``: test the library's engines, samplers and transitions, and report the detectable errors."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from probinfer import mcmc, smc
from probinfer.app.pages.engines import ENGINES, LOW_DIMENSIONAL_ENGINES, STATE_SPACE_ENGINES, EngineEntry
from probinfer.app.pages.run_facts import provenance
from probinfer.app.suite import known_targets
from probinfer.app.suite.known_states import noisy_autoregression
from probinfer.app.suite.state_space_engines import state_space_subjects
from probinfer.app.suite.suite import (
    CheckResult,
    Sampler,
    Subject,
    SuiteSize,
    Transition,
    run_suite,
    unexpected,
)
from probinfer.core.errors import import_extra
from probinfer.report.check_pages import could_have_seen, numbers, picture
from probinfer.report.html import Gallery, Paragraph, Section, check_folder, page, write_page
from probinfer.report.tables import TextTable, seconds, to_rich
from probinfer.running import progress as bars
from probinfer.vi import gaussian

__all__ = [
    "FULL",
    "QUICK",
    "TRANSITIONS",
    "Effort",
    "results_page",
    "run_check",
    "subjects",
    "verdict_tables",
]


class Effort(NamedTuple):
    """The amount of work of the command.

    Attributes:
        size: size of the suite.
        num_draws: number of draws per chain.
        is_complete: whether to include engines that the demo leaves out, and the calibration of engines with chains.
        num_warmup: transitions of the sampler's warm-up.
        num_sampler_draws: draws of the sampler for each data set.
        transitions: names of the transitions to test.
    """

    size: SuiteSize
    num_draws: int
    is_complete: bool
    num_warmup: int
    num_sampler_draws: int
    transitions: tuple[str, ...]


# Powers of two as numbers of draws: blocks of correlated draws fill them, so that each shape is compiled only once.
QUICK = Effort(
    size=SuiteSize(
        num_exact=1024,
        num_simulations=300,
        num_engine_simulations=200,
        num_lanes=300,
        discrepancies=("Stein", "KSD", "MMD"),
    ),
    num_draws=256,
    is_complete=False,
    num_warmup=300,
    num_sampler_draws=300,
    transitions=(),
)
FULL = Effort(
    size=SuiteSize(
        num_exact=2048,
        num_simulations=1000,
        num_engine_simulations=300,
        num_lanes=1000,
        discrepancies=("Stein", "KSD", "MMD", "energy", "sliced", "C2ST"),
    ),
    num_draws=512,
    is_complete=True,
    num_warmup=500,
    num_sampler_draws=500,
    transitions=("NUTS", "HMC"),
)

_REASONS = {
    known_targets.NOT_NORMAL: "fits a normal",
    known_targets.CORRELATED: "ignores correlations, and weights correct this only for weak ones",
}

# The transitions of the chains of mcmc.NUTS and mcmc.HMC, with a fixed step size.
_FIXED_STEP_SIZE = mcmc.WarmupConfig(jnp.asarray([True, False, False]), jnp.asarray(0.8), 0, 1)
_MAX_TREE_DEPTH = 4


def _transition(name: str, kind: str) -> Transition:
    trajectories = mcmc.Trajectories(kind, max_tree_depth=_MAX_TREE_DEPTH, mode="vmap")

    def init(logdensity_fn, position):
        return mcmc.chains(logdensity_fn, trajectories, _FIXED_STEP_SIZE).init(position[None])

    def step(logdensity_fn, key, state):
        return mcmc.chains(logdensity_fn, trajectories, _FIXED_STEP_SIZE).step(key, state)

    return Transition(
        name=name, init_fn=init, step_fn=step, position_fn=lambda state: state.chains.position[0]
    )


TRANSITIONS = {
    name: functools.partial(_transition, name, kind) for name, kind in (("NUTS", "nuts"), ("HMC", "hmc"))
}


def subjects(
    entries: Sequence[EngineEntry], effort: Effort, target: known_targets.KnownTarget | None = None
) -> list[Subject]:
    """Return the engines of a table that give a posterior, as subjects of the suite.

    Args:
        entries: as in ``pages.engines``.
        effort: the amount of work.
        target: the target of engines that do not take any target; None leaves these engines out.
    """
    result = []
    for entry in entries:
        has_target = entry.any_target or target is not None
        if entry.is_point or not has_target or not (entry.in_demo or effort.is_complete):
            continue
        evidence_fn = (
            functools.partial(_annealed_evidence, effort.num_draws) if entry.estimates_evidence else None
        )
        result.append(
            Subject(
                name=entry.label,
                sample_fn=functools.partial(_sample, entry.make(effort.num_draws)),
                limitations={
                    feature: entry.limitation_reason or _REASONS[feature] for feature in entry.limitations
                },
                log_density_fn=_normal_density if entry.fits_normal else None,
                quick=(entry.fits_normal or effort.is_complete) and not entry.repels,
                evidence_fn=evidence_fn,
                target=target,
            )
        )
    return result


def _sample(engine: Any, key: Any, target: Any) -> Any:
    return engine.sample(key, target, progress=False)


def _normal_density(posterior: Any) -> Any:
    """Return the log density of the draws of variational inference: a normal, widened if the draws have weights."""
    fitted = gaussian.VariationalGaussian(posterior.info.loc, posterior.info.scale)
    log_q = gaussian.log_density if posterior.log_weights is None else gaussian.log_widened
    return lambda u: log_q(fitted, u[None])[0]


def _annealed_evidence(num: int, key: Any, posterior: Any, target: Any, exact: Any) -> tuple:
    """Return the log evidences of the islands, and those of runs annealed back from exact draws."""
    key_pilot, key_runs = jax.random.split(key)
    islands = posterior.info.log_evidences
    num_particles = posterior.unconstrained.shape[1]
    schedule = smc.annealing(key_pilot, target, num_particles=num_particles, progress=False)
    return islands, schedule.reverse_all(key_runs, exact[:num])


def run_check(
    out: str,
    effort: Effort,
    *,
    seed: int,
    command: str,
    console: Console,
    entries: Sequence[EngineEntry] = ENGINES,
) -> tuple[Path, list[str]]:
    """Run the suite, print its tables, and write its page.

    Args:
        out: folder of the page.
        effort: the amount of work.
        seed: seed of the random key.
        command: the command line, recorded in the page.
        console: console of the results.
        entries: the engines.

    Returns:
        The path of the page, and one sentence for each unexpected result.
    """
    start = time.perf_counter()
    check_folder(out)
    import_extra("matplotlib", "plots")
    sampler = Sampler(
        "HMC, many data sets",
        functools.partial(
            mcmc.posterior_sampler, num_warmup=effort.num_warmup, num_draws=effort.num_sampler_draws
        ),
    )
    engines = subjects(entries, effort)
    if effort.is_complete:
        engines += subjects(LOW_DIMENSIONAL_ENGINES, effort, noisy_autoregression().known)
        engines += state_space_subjects(effort.num_draws)
    names = ", ".join(subject.name for subject in engines)
    console.print(
        f"[bold]{names}: compilation comes first; each result is printed when it is available[/bold]"
    )
    with bars.task("checks", None, None) as bar:
        results = run_suite(
            jax.random.key(seed),
            engines,
            samplers=[sampler],
            transitions=[TRANSITIONS[name]() for name in effort.transitions],
            size=effort.size,
            started=lambda number, total, description: bar.update(
                number, f"{number + 1} of {total}: {description}"
            ),
            done=functools.partial(_print_result, console),
        )
    unexpected_results = unexpected(results)
    facts = provenance(
        command,
        seed=seed,
        seconds=time.perf_counter() - start,
        extra={"not tested": _left_out(entries, effort)},
    )
    path = write_page(out, results_page(results, unexpected_results, facts))
    for table in verdict_tables(results):
        console.print(to_rich(table))
    style = "bold red" if unexpected_results else "bold"
    console.print(_summary(results, unexpected_results), style=style, highlight=False)
    return path, unexpected_results


def _left_out(entries, effort):
    points = [entry.label for entry in entries if entry.is_point]
    parts = [f"{', '.join(points)} (point estimates, no posterior)"] if points else []
    if not effort.is_complete:
        left_out = [
            *[entry.label for entry in entries if not (entry.is_point or entry.in_demo)],
            *[entry.label for entry in (*LOW_DIMENSIONAL_ENGINES, *STATE_SPACE_ENGINES)],
            "joint tests of transitions",
            "energy, sliced and C2ST",
        ]
        parts.append(f"{', '.join(left_out)} (left out by --quick)")
    return "; ".join(parts) or "nothing"


def _print_result(console: Console, result: CheckResult) -> None:
    check = f"{result.subject}, {result.target}: {result.check}"
    style = "red" if result.passed is False and not result.reason else ""
    console.print(
        f"  {check:<56} {result.short_verdict:<20} {seconds(result.seconds):>7}", style=style, highlight=False
    )


def verdict_tables(results: Sequence[CheckResult]) -> list[TextTable]:
    """Return one table for each kind of check, with a row for each engine and target."""
    by_title: dict[str, list[CheckResult]] = {}
    for result in results:
        by_title.setdefault(_title(result), []).append(result)
    tables = []
    for title, group in by_title.items():
        checks = tuple(dict.fromkeys(result.check for result in group))
        rows = []
        for subject, target in dict.fromkeys((result.subject, result.target) for result in group):
            by_check = {
                result.check: result
                for result in group
                if (result.subject, result.target) == (subject, target)
            }
            reason = next((result.reason for result in by_check.values() if result.reason), "")
            cells = [by_check[check].short_verdict if check in by_check else "-" for check in checks]
            rows.append((subject, target, *cells, reason))
        columns = ("engine", "target", *checks, "why it should fail")
        tables.append(TextTable(title, columns, tuple(rows), text_columns=tuple(range(1, len(columns)))))
    return tables


def _title(result):
    if result.check in ("SBC", "TARP"):
        return "Calibration on simulated data sets"
    if result.check == "joint test":
        return "Invariance of the Markov transitions"
    return "Draws compared with exact answers"


def _summary(results, unexpected_results):
    if unexpected_results:
        return f"{len(unexpected_results)} of {len(results)} results are unexpected: " + "; ".join(
            unexpected_results
        )
    num_undecided = sum(result.passed is None for result in results)
    num_expected = sum(bool(result.reason) and result.passed is False for result in results)
    text = f"Nothing unexpected in {len(results)} results: {num_expected} failures, all of them expected"
    return text + (f"; {num_undecided} checks cannot tell." if num_undecided else ".")


_LEAD = (
    "The library tests its own engines: it compares their draws with exact answers, tests their calibration on "
    "simulated data, and tests their Markov transitions by joint tests. An engine that cannot represent a target "
    "should fail on it, and is listed as failing. Each verdict is given with the smallest error that the check detects."
)
_EXPLAINED = (
    "Stein: mean and variance of each coordinate, from gradients alone, without exact draws. KSD: the full "
    "distribution, from gradients. MMD, energy, sliced: distances to exact draws. C2ST: whether a classifier can "
    "distinguish the draws from exact ones. Evidence: lower and upper bounds by importance weights, or by tempered "
    "runs and by annealed runs that start from exact draws; they hold for bad approximations too, and their gap "
    "measures the error. SBC and TARP: the ranks of the true parameters of simulated data among the draws. (Not for "
    "particles that repel each other: their log densities are too even for ranks, as `make bench BENCH=coin_mutations` "
    "shows.) Joint test: whether one transition leaves the joint distribution of parameters and data invariant."
)
_READING = (
    "“Passes” means that an error of the size given below would have been detected, and none was. “Fails as expected” "
    "is the verdict on an approximation that cannot represent the target; “not detected” means that the check passes "
    "such an approximation. “Cannot tell” is neither. The probability of at least one false alarm on this page, if "
    "everything is correct, is at most 5 %."
)


def results_page(
    results: Sequence[CheckResult], unexpected_results: Sequence[str], facts: list[tuple[str, str]]
) -> str:
    """Return the page: tables, then a section for each engine and target with the verdicts, numbers and plots.

    Args:
        results: results of the suite.
        unexpected_results: one sentence for each unexpected result.
        facts: command, versions and machine.
    """
    head: list[Any] = [
        Paragraph(_summary(results, unexpected_results), "remark" if unexpected_results else "finding"),
        Paragraph(_READING),
        Paragraph(_EXPLAINED),
    ]
    sections = [Section("Verdicts", (*head, *verdict_tables(results)))]
    for subject, target in dict.fromkeys((result.subject, result.target) for result in results):
        group = [result for result in results if (result.subject, result.target) == (subject, target)]
        sections.append(Section(f"{subject}: {target}", _blocks(group)))
    return page("probinfer check: tests of the library's engines", _LEAD, sections, facts)


def _blocks(group: Sequence[CheckResult]) -> tuple[Any, ...]:
    rows = tuple(
        (result.check, result.short_verdict, could_have_seen(result.report), seconds(result.seconds))
        for result in group
    )
    columns = ("check", "verdict", "smallest detectable error", "time")
    blocks: list[Any] = [TextTable("", columns, rows, text_columns=(1, 2))]
    reason = next((result.reason for result in group if result.reason), "")
    blocks += [Paragraph(f"It should fail here: it {reason}.", "finding")] if reason else []
    remarks = dict.fromkeys(result.remark for result in group if result.remark)
    blocks += [Paragraph(f"The engine warns: {remark}", "remark") for remark in remarks]
    reports = [(result.check, result.report) for result in group if result.report is not None]
    blocks.append(Gallery(tuple(picture(check, report, width=3.9, height=2.9) for check, report in reports)))
    for result in group:
        is_failure = result.passed is False and not result.reason
        blocks.append(Paragraph(f"{result.check}: {result.verdict}", "remark" if is_failure else ""))
        blocks += numbers(result.report)
    return tuple(blocks)
