"""The suite: which engines, samplers and kernels pass which checks on which targets.

Engines come as plain callables, so the suite judges any library's. Each says what it *cannot* represent (correlation, a
shape that is not normal) and each target what it *is*: an engine that fails where it cannot succeed fails as it should,
and if no check saw it fail, the checks are at fault. The level is shared among all findings, so that a whole
run of right engines raises a false alarm with probability ``level`` at most.

Most of the time is compilation, so draws of engines on one side, calibration and kernels on the other run side by side.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from probinfer.app.suite import known_targets, trials
from probinfer.app.suite.trials import Kernel, Sampler, Subject
from probinfer.checks.calibration.rank_uniformity import OUTCOMES
from probinfer.core.errors import NumericalError, check_key
from probinfer.core.types import PRNGKey

__all__ = ["Finding", "Kernel", "Sampler", "Size", "Subject", "run_suite", "unexpected"]


class Size(NamedTuple):
    """How much work.

    Attributes:
        exact: exact draws to compare with; engines should give about as many.
        simulations: data sets for samplers; 0: none are judged.
        loops: data sets for engines, one after the other; 0: none.
        lanes: of joint tests.
        discrepancies: names of the checks of draws.
    """

    exact: int
    simulations: int
    loops: int
    lanes: int
    discrepancies: tuple[str, ...]


class Finding(NamedTuple):
    """What one check said.

    Attributes:
        subject: name of the engine, sampler or kernel.
        target: name of the target or model.
        check: name of the check.
        report: of the check; None if it or the engine refused.
        passed: True, False, or None where the check cannot tell.
        verdict: in words.
        reason: why the subject should fail here; "" if it should pass.
        remark: what the engine itself warned of; "" if nothing.
        seconds: wall time, compilation included.
    """

    subject: str
    target: str
    check: str
    report: Any
    passed: bool | None
    verdict: str
    reason: str = ""
    remark: str = ""
    seconds: float = 0.0

    @property
    def word(self) -> str:
        """The verdict in a cell of a table."""
        if not self.reason or self.passed is None:
            return OUTCOMES[self.passed]
        return "does not see it" if self.passed else "fails, as it should"


class _Task(NamedTuple):
    subject: str
    target: str
    check: str
    run: Callable[[PRNGKey, float], trials.Judged]
    reason: str = ""
    drawn: Callable[[], Any] | None = None
    lane: int = 0


def run_suite(
    key: PRNGKey,
    subjects: Sequence[Subject],
    *,
    samplers: Sequence[Sampler] = (),
    kernels: Sequence[Kernel] = (),
    size: Size,
    level: float = 0.05,
    started: Callable[[int, int, str], None] = lambda number, total, what: None,
    done: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """Run every check on every subject; what fails to run is a finding too.

    Args:
        key: random key.
        subjects: engines: their draws against exact ones, and their calibration on a conjugate model.
        samplers: procedures for many data sets: their calibration on eight schools.
        kernels: joint tests.
        size: how much work.
        level: probability of a false alarm in the whole run, if everything is right.
        started: called with the number of each check, how many there are, and what it is; from two threads in turn.
        done: called with each finding as it comes, in the same way.

    Returns:
        The findings in order.

    Raises:
        TypeError: ``key`` is not a key.
        ValueError: nothing to check, or a level not between 0 and 0.5.
    """
    check_key(key)
    if not 0 < level < 0.5:
        raise ValueError(f"level is the probability of a false alarm, between 0 and 0.5; got {level}")
    key_plan, key_checks = jax.random.split(key)
    tasks = _plan(key_plan, subjects, samplers, kernels, size)
    if not tasks:
        raise ValueError("there is nothing to check: pass subjects, samplers or kernels")
    keys, numbers, one_at_a_time = (
        jax.random.split(key_checks, len(tasks)),
        itertools.count(),
        threading.Lock(),
    )

    def lane(which: int) -> dict[int, Finding]:
        found = {}
        for place, task in enumerate(tasks):
            if task.lane != which:
                continue
            with one_at_a_time:
                started(next(numbers), len(tasks), f"{task.subject}, {task.target}: {task.check}")
            found[place] = _finding(task, keys[place], level / len(tasks))
            with one_at_a_time:
                done(found[place])
        return found

    with ThreadPoolExecutor(2) as pool:
        findings = {place: finding for part in pool.map(lane, (0, 1)) for place, finding in part.items()}
    return [findings[place] for place in range(len(tasks))]


def unexpected(findings: Sequence[Finding]) -> list[str]:
    """Say what should not have been found: right engines that fail, and wrong ones that every check let pass."""
    said = [
        f"{f.subject} on {f.target} fails {f.check}: {f.verdict}"
        for f in findings
        if f.passed is False and not f.reason
    ]
    for pair in dict.fromkeys((f.subject, f.target) for f in findings if f.reason):
        judged = [f for f in findings if (f.subject, f.target) == pair and f.reason]
        if all(f.passed is not False for f in judged):
            said.append(f"no check saw what is wrong with {pair[0]} on {pair[1]}: it {judged[0].reason}")
    return said


# What is checked


def _plan(key, subjects, samplers, kernels, size) -> list[_Task]:
    keys = jax.random.split(key, 4)
    tasks = []
    for index, (target, judged) in enumerate(_places(subjects)):
        exact = target.exact(jax.random.fold_in(keys[0], index), size.exact)
        for number, subject in enumerate(judged):
            drawn = _once(subject, jax.random.fold_in(keys[1], 100 * index + number), target.target)
            tasks += _of_draws(subject, target, drawn, exact, size)
    looped = [one for one in subjects if one.quick and one.target is None and size.loops]
    for number, subject in enumerate(looped):
        tasks += _of_loops(
            subject, known_targets.linear_regression(), jax.random.fold_in(keys[2], number), size.loops
        )
    for number, sampler in enumerate(samplers if size.simulations else ()):
        tasks += _of_sampler(
            sampler, known_targets.eight_schools(), jax.random.fold_in(keys[3], number), size.simulations
        )
    return tasks + [_of_kernel(kernel, known_targets.location_and_scale(), size.lanes) for kernel in kernels]


def _places(subjects: Sequence[Subject]) -> list[tuple[known_targets.Known, list[Subject]]]:
    """Every target and who is judged on it: the common targets first, then those of single engines."""
    common = [one for one in subjects if one.target is None]
    places = [
        (target, common) for target in (known_targets.correlated_normal(), known_targets.skewed()) if common
    ]
    own = {one.target.name: one.target for one in subjects if one.target is not None}
    return places + [
        (target, [one for one in subjects if one.target is not None and one.target.name == name])
        for name, target in own.items()
    ]


def _reason(subject: Subject, features: Sequence[str]) -> str:
    return "; ".join(subject.cannot[name] for name in features if name in subject.cannot)


def _once(subject: Subject, key: PRNGKey, target: Any) -> Callable[[], trials.Drawn]:
    """The posterior, computed when it is first asked for."""

    @functools.cache
    def drawn() -> trials.Drawn:
        return trials.sample(subject, key, target)

    return drawn


def _of_draws(
    subject: Subject, target: known_targets.Known, drawn: Callable, exact: Any, size: Size
) -> list[_Task]:
    reason = _reason(subject, target.features)
    tasks = [
        _Task(
            subject.name,
            target.name,
            name,
            functools.partial(trials.discrepancy, name, drawn, target, exact),
            reason,
            drawn,
        )
        for name in size.discrepancies
    ]
    if subject.bounds_fn is not None:
        run = functools.partial(trials.evidence, subject.bounds_fn, drawn, target, exact)
        tasks.append(_Task(subject.name, target.name, "evidence", run, "", drawn))
    return tasks


def _of_loops(subject: Subject, model: known_targets.Model, key: PRNGKey, num: int) -> list[_Task]:
    simulated = functools.cache(functools.partial(trials.infer_one_by_one, key, model, subject, num))
    reason = _reason(subject, model.features)
    return [
        _Task(
            subject.name,
            model.name,
            name,
            functools.partial(check, model, simulated),
            reason,
            simulated,
            lane=1,
        )
        for name, check in (("SBC", trials.ranks), ("TARP", trials.coverage))
    ]


def _of_sampler(sampler: Sampler, model: known_targets.Model, key: PRNGKey, num: int) -> list[_Task]:
    report = functools.cache(functools.partial(trials.calibrated, model, sampler, num, key))
    return [
        _Task(sampler.name, model.name, "SBC", lambda key, level: trials.judged(report(level)), lane=1),
        _Task(sampler.name, model.name, "TARP", functools.partial(trials.coverage_of, report), lane=1),
    ]


def _of_kernel(kernel: Kernel, model: known_targets.Model, lanes: int) -> _Task:
    return _Task(
        kernel.name, model.name, "joint test", functools.partial(trials.joint, kernel, model, lanes), lane=1
    )


# How


def _finding(task: _Task, key: PRNGKey, level: float) -> Finding:
    start = time.perf_counter()
    report, passed, remark = None, None, ""
    try:
        if task.drawn is not None:
            remark = getattr(task.drawn(), "remark", "")
        try:
            report, passed, verdict = task.run(key, level)
        except (
            ValueError
        ) as error:  # what a check refuses: too few draws, chains too short for their correlation
            verdict = str(error) if str(error).startswith("cannot tell") else f"cannot tell: {error}"
    except NumericalError as error:
        passed, verdict = False, f"the engine failed: {error}"
    return Finding(
        task.subject,
        task.target,
        task.check,
        report,
        passed,
        verdict,
        task.reason,
        remark,
        time.perf_counter() - start,
    )
