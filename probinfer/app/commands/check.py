"""``probinfer check``: the library judges its own engines, samplers and kernels, and says what it could have seen."""

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
from probinfer.app.pages.engines import ENGINES, PLANE_ENGINES, STATE_SPACE_ENGINES, Entry
from probinfer.app.pages.run_facts import provenance
from probinfer.app.suite import known_targets
from probinfer.app.suite.known_states import noisy_autoregression
from probinfer.app.suite.state_space_engines import state_space_subjects
from probinfer.app.suite.suite import Finding, Kernel, Sampler, Size, Subject, run_suite, unexpected
from probinfer.core.errors import import_extra
from probinfer.report.check_pages import could_have_seen, numbers, picture
from probinfer.report.html import Gallery, Paragraph, Section, check_folder, page, write_page
from probinfer.report.tables import TextTable, seconds, to_rich
from probinfer.running import progress as bars
from probinfer.vi import gaussian

__all__ = ["FULL", "KERNELS", "QUICK", "Effort", "findings_page", "run_check", "subjects", "tables_of"]


class Effort(NamedTuple):
    """How much work the command does.

    Attributes:
        size: of the suite.
        draws: of a chain.
        everything: engines that the demo leaves out too, and engines with chains called data set by data set too.
        warmup: transitions of the sampler's warm-up.
        sampler_draws: of each data set.
        kernels: names of the kernels.
    """

    size: Size
    draws: int
    everything: bool
    warmup: int
    sampler_draws: int
    kernels: tuple[str, ...]


# Numbers of draws that are powers of two: blocks of correlated draws fill them, so that shapes are compiled once.
QUICK = Effort(Size(1024, 300, 200, 300, ("Stein", "KSD", "MMD")), 256, False, 300, 300, ())
FULL = Effort(
    Size(2048, 1000, 300, 1000, ("Stein", "KSD", "MMD", "energy", "sliced", "C2ST")),
    512,
    True,
    500,
    500,
    ("NUTS", "HMC"),
)

_REASONS = {
    known_targets.NOT_NORMAL: "fits a normal",
    known_targets.CORRELATED: "ignores correlations, which weights mend only where they are weak",
}

# The transitions of the chains of mcmc.NUTS and mcmc.HMC, with a step size that is given.
_FIXED = mcmc.WarmupConfig(jnp.asarray([True, False, False]), jnp.asarray(0.8), 0, 1)
_DEPTH = 4


def _kernel(name: str, kind: str) -> Kernel:
    trajectories = mcmc.Trajectories(kind, max_tree_depth=_DEPTH, mode="vmap")

    def init(logdensity_fn, position):
        return mcmc.chains(logdensity_fn, trajectories, _FIXED).init(position[None])

    def step(logdensity_fn, key, state):
        return mcmc.chains(logdensity_fn, trajectories, _FIXED).step(key, state)

    return Kernel(name, init, step, lambda state: state.chains.position[0])


KERNELS = {name: functools.partial(_kernel, name, kind) for name, kind in (("NUTS", "nuts"), ("HMC", "hmc"))}


def subjects(
    entries: Sequence[Entry], effort: Effort, target: known_targets.Known | None = None
) -> list[Subject]:
    """The engines of a table that give a posterior, and what is known of each.

    Args:
        entries: as in ``report.engines``.
        effort: how many draws.
        target: of engines that do not take any; None: only those that do.
    """
    found = []
    for entry in entries:
        fits = entry.any_target or target is not None
        if entry.is_point or not fits or not (entry.in_demo or effort.everything):
            continue
        found.append(
            Subject(
                entry.label,
                functools.partial(_quiet, entry.make(effort.draws)),
                {feature: entry.because or _REASONS[feature] for feature in entry.cannot},
                _normal_density if entry.fits_normal else None,
                (entry.fits_normal or effort.everything) and not entry.keeps_apart,
                functools.partial(_annealed, effort.draws) if entry.gives_evidence else None,
                target,
            )
        )
    return found


def _quiet(engine: Any, key: Any, target: Any) -> Any:
    return engine.sample(key, target, progress=False)


def _normal_density(posterior: Any) -> Any:
    """Log density of the law that variational inference drew from: its normal, widened where the draws have weights."""
    frame = gaussian.VariationalGaussian(posterior.info.loc, posterior.info.scale)
    log_q = gaussian.log_density if posterior.log_weights is None else gaussian.log_widened
    return lambda u: log_q(frame, u[None])[0]


def _annealed(num: int, key: Any, posterior: Any, target: Any, exact: Any) -> tuple:
    """The islands' log evidences, and those of runs annealed back from exact draws."""
    key_pilot, key_runs = jax.random.split(key)
    islands = posterior.info.log_evidences
    num_particles = posterior.unconstrained.shape[1]
    frozen = smc.annealing(key_pilot, target, num_particles=num_particles, progress=False)
    return islands, frozen.reverse_all(key_runs, exact[:num])


def run_check(
    out: str,
    effort: Effort,
    *,
    seed: int,
    command: str,
    console: Console,
    entries: Sequence[Entry] = ENGINES,
) -> tuple[Path, list[str]]:
    """Run the suite, print its tables, write its page.

    Args:
        out: folder of the page.
        effort: how much work.
        seed: of everything.
        command: what the user typed, for the page.
        console: where findings go as they come.
        entries: the engines.

    Returns:
        The path of the page, and what was not expected, in sentences.
    """
    start = time.perf_counter()
    check_folder(out)
    import_extra("matplotlib", "plots")
    sampler = Sampler(
        "HMC, many data sets",
        functools.partial(mcmc.posterior_sampler, num_warmup=effort.warmup, num_draws=effort.sampler_draws),
    )
    judged = subjects(entries, effort)
    if effort.everything:
        judged += subjects(PLANE_ENGINES, effort, noisy_autoregression().known)
        judged += state_space_subjects(effort.draws)
    names = ", ".join(subject.name for subject in judged)
    console.print(f"[bold]{names}: compiled first; each finding is printed as it comes[/bold]")
    with bars.task("checks", None, None) as bar:
        findings = run_suite(
            jax.random.key(seed),
            judged,
            samplers=[sampler],
            kernels=[KERNELS[name]() for name in effort.kernels],
            size=effort.size,
            started=lambda number, total, what: bar.update(number, f"{number + 1} of {total}: {what}"),
            done=functools.partial(_say, console),
        )
    surprises = unexpected(findings)
    facts = provenance(
        command,
        seed=seed,
        seconds=time.perf_counter() - start,
        extra={"not judged": _left_out(entries, effort)},
    )
    path = write_page(out, findings_page(findings, surprises, facts))
    for table in tables_of(findings):
        console.print(to_rich(table))
    console.print(_summary(findings, surprises), style="bold red" if surprises else "bold", highlight=False)
    return path, surprises


def _left_out(entries, effort):
    points = [entry.label for entry in entries if entry.is_point]
    others = [] if effort.everything else [e.label for e in entries if not (e.is_point or e.in_demo)]
    said = [f"{', '.join(points)} (single values, no posterior)"] if points else []
    if not effort.everything:
        said.append(
            ", ".join(
                [
                    *others,
                    *[e.label for e in (*PLANE_ENGINES, *STATE_SPACE_ENGINES)],
                    "kernels by joint tests",
                    "energy, sliced and C2ST",
                ]
            )
            + " (left out by --quick)"
        )
    return "; ".join(said) or "nothing"


def _say(console: Console, finding: Finding) -> None:
    what = f"{finding.subject}, {finding.target}: {finding.check}"
    style = "red" if finding.passed is False and not finding.reason else ""
    console.print(
        f"  {what:<56} {finding.word:<20} {seconds(finding.seconds):>7}", style=style, highlight=False
    )


def tables_of(findings: Sequence[Finding]) -> list[TextTable]:
    """Which engine passes which check on which target, and what each procedure could have shown."""
    by_name: dict[str, list[Finding]] = {}
    for finding in findings:
        by_name.setdefault(_kind(finding), []).append(finding)
    tables = []
    for title, group in by_name.items():
        checks = tuple(dict.fromkeys(finding.check for finding in group))
        rows = []
        for subject, target in dict.fromkeys((f.subject, f.target) for f in group):
            found = {f.check: f for f in group if (f.subject, f.target) == (subject, target)}
            reason = next((f.reason for f in found.values() if f.reason), "")
            cells = [found[name].word if name in found else "-" for name in checks]
            rows.append((subject, target, *cells, reason))
        columns = ("engine", "target", *checks, "why it should fail")
        tables.append(TextTable(title, columns, tuple(rows), text_columns=tuple(range(1, len(columns)))))
    return tables


def _kind(finding):
    if finding.check in ("SBC", "TARP"):
        return "Calibration on simulated data sets"
    if finding.check == "joint test":
        return "Kernels: do they leave the posterior alone?"
    return "Draws against exact answers"


def _summary(findings, surprises):
    if surprises:
        return f"{len(surprises)} of {len(findings)} findings are not as they should be: " + "; ".join(
            surprises
        )
    unsure = sum(finding.passed is None for finding in findings)
    known_faults = sum(bool(finding.reason) and finding.passed is False for finding in findings)
    text = f"Nothing unexpected in {len(findings)} findings: {known_faults} failures, all of them as they should be"
    return text + (f"; {unsure} could not tell." if unsure else ".")


_LEAD = (
    "The library judges its own engines: their draws against targets whose answer is known, their calibration on "
    "simulated data, and their Markov kernels by joint tests. An engine that cannot represent a target should fail on "
    "it, and is listed as failing. Beside each verdict stands the smallest error that would have been seen."
)
_EXPLAINED = (
    "Stein: mean and variance of every coordinate by gradients alone, no exact draws needed. KSD: the "
    "whole distribution by gradients. MMD, energy, sliced: distances to exact draws. C2ST: can a "
    "classifier tell them from exact draws? Evidence: bounds from below and above, by importance weights or by "
    "tempered runs and annealed ones back from exact draws; they hold for bad approximations too, and their gap "
    "says how bad. SBC and TARP: where are the true parameters of simulated data among the draws? (Not for "
    "particles that keep apart: their log densities are too even for ranks, as `make bench BENCH=coin_mutations` "
    "shows.) Joint test: does one transition leave parameters and data distributed as they were?"
)
_READING = (
    "“Passes” means: had there been an error of the size given below, it would have been found, and none was. “Fails, "
    "as it should” is the verdict on an approximation that cannot represent the target; “does not see it” is a check "
    "that lets such an approximation pass. “Cannot tell” is neither. The probability that this whole page holds "
    "a false alarm, if everything is right, is 5 % at most."
)


def findings_page(findings: Sequence[Finding], surprises: Sequence[str], facts: list[tuple[str, str]]) -> str:
    """The page: tables, then a section for every engine and target with the verdict, numbers and plot of each check.

    Args:
        findings: of the suite.
        surprises: what was not expected.
        facts: what was run.
    """
    head: list[Any] = [
        Paragraph(_summary(findings, surprises), "remark" if surprises else "finding"),
        Paragraph(_READING),
    ]
    sections = [Section("Verdicts", (*head, *tables_of(findings)))]
    for subject, target in dict.fromkeys((f.subject, f.target) for f in findings):
        group = [f for f in findings if (f.subject, f.target) == (subject, target)]
        sections.append(Section(f"{subject}: {target}", _blocks(group)))
    return page("probinfer check: is the library right?", _LEAD, sections, facts)


def _blocks(group: Sequence[Finding]) -> tuple[Any, ...]:
    rows = tuple((f.check, f.word, could_have_seen(f.report), seconds(f.seconds)) for f in group)
    columns = ("check", "verdict", "smallest error that it could have seen", "time")
    blocks: list[Any] = [TextTable("", columns, rows, text_columns=(1, 2))]
    reason = next((f.reason for f in group if f.reason), "")
    blocks += [Paragraph(f"It should fail here: it {reason}.", "finding")] if reason else []
    remarks = dict.fromkeys(f.remark for f in group if f.remark)
    blocks += [Paragraph(f"The engine itself says: {remark}", "remark") for remark in remarks]
    shown = [f for f in group if f.report is not None]
    blocks.append(Gallery(tuple(picture(f.check, f.report, width=3.9, height=2.9) for f in shown)))
    for f in group:
        blocks.append(
            Paragraph(f"{f.check}: {f.verdict}", "" if f.passed is not False or f.reason else "remark")
        )
        blocks += numbers(f.report)
    return tuple(blocks)
