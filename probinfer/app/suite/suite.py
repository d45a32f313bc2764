"""The suite: which engines, samplers and transitions pass which checks on which targets.

Engines are plain callables, so the suite can test those of any library. Each engine declares the features that it
cannot represent (correlation, non-normal shape), and each target its features. An engine is expected to fail on a
target that it cannot represent; if no check detects that, the result is unexpected too. The level is divided among all
checks (Bonferroni), so that a run of correct engines raises a false alarm with probability ``level`` at most.

Most of the time is compilation, so two threads run side by side: one compares draws of engines with exact answers, the
other tests calibration and transitions.
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
from probinfer.app.suite.trials import Sampler, Subject, Transition
from probinfer.checks.calibration.rank_uniformity import OUTCOMES
from probinfer.core.arguments import check_key
from probinfer.core.errors import NumericalError
from probinfer.core.types import PRNGKey

__all__ = ["CheckResult", "Sampler", "Subject", "SuiteSize", "Transition", "run_suite", "unexpected"]


class SuiteSize(NamedTuple):
    """The amount of work of the suite.

    Attributes:
        num_exact: exact draws to compare with; engines should give about as many.
        num_simulations: simulated data sets for samplers; 0 skips the samplers.
        num_engine_simulations: simulated data sets for engines, which are called once for each; 0 skips this check.
        num_lanes: parallel chains of the joint tests.
        discrepancies: names of the checks that compare draws.
    """

    num_exact: int
    num_simulations: int
    num_engine_simulations: int
    num_lanes: int
    discrepancies: tuple[str, ...]


class CheckResult(NamedTuple):
    """The result of one check of one subject on one target.

    Attributes:
        subject: name of the engine, sampler or transition.
        target: name of the target or model.
        check: name of the check.
        report: report of the check; None if the check or the engine raised an error.
        passed: True, False, or None if the check cannot tell.
        verdict: the conclusion as text.
        reason: why the subject should fail here; "" if it should pass.
        remark: warnings of the engine; "" if there are none.
        seconds: wall time, including compilation.
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
    def short_verdict(self) -> str:
        """The verdict in two or three words, for a cell of a table."""
        if not self.reason or self.passed is None:
            return OUTCOMES[self.passed]
        return "not detected" if self.passed else "fails as expected"


class _PlannedCheck(NamedTuple):
    """A check to run.

    Attributes:
        subject: name of the engine, sampler or transition.
        target: name of the target or model.
        check: name of the check.
        run: ``(key, level)`` -> outcome.
        reason: why the subject should fail here; "" if it should pass.
        get_draws: returns the draws of the engine, whose warnings join the result; None if the check needs none.
        thread: 0 or 1, the thread that runs the check.
    """

    subject: str
    target: str
    check: str
    run: Callable[[PRNGKey, float], trials.Outcome]
    reason: str = ""
    get_draws: Callable[[], Any] | None = None
    thread: int = 0


def run_suite(
    key: PRNGKey,
    subjects: Sequence[Subject],
    *,
    samplers: Sequence[Sampler] = (),
    transitions: Sequence[Transition] = (),
    size: SuiteSize,
    level: float = 0.05,
    started: Callable[[int, int, str], None] = lambda number, total, description: None,
    done: Callable[[CheckResult], None] = lambda result: None,
) -> list[CheckResult]:
    """Run every check on every subject; a check or engine that fails to run gives a result too.

    Args:
        key: random key.
        subjects: engines, whose draws are compared with exact ones and whose calibration is tested on a linear model.
        samplers: procedures for many data sets, whose calibration is tested on eight schools.
        transitions: Markov transitions, tested by joint tests.
        size: amount of work.
        level: probability of at least one false alarm in the run if everything is correct.
        started: called with the index of each check, the number of checks, and a description; from two threads, but
            never at the same time.
        done: called with each result as soon as it is available, in the same way.

    Returns:
        The results, in the order of the plan.

    Raises:
        TypeError: ``key`` is not a key.
        ValueError: there is nothing to check, or the level is not between 0 and 0.5.
    """
    check_key(key)
    if not 0 < level < 0.5:
        raise ValueError(f"level is the probability of a false alarm, between 0 and 0.5; got {level}")
    key_plan, key_checks = jax.random.split(key)
    planned = _plan(key_plan, subjects, samplers, transitions, size)
    if not planned:
        raise ValueError("there is nothing to check: pass subjects, samplers or transitions")
    keys = jax.random.split(key_checks, len(planned))
    start_numbers, callback_lock = itertools.count(), threading.Lock()

    def run_thread(thread: int) -> dict[int, CheckResult]:
        results = {}
        for index, check in enumerate(planned):
            if check.thread != thread:
                continue
            with callback_lock:
                started(next(start_numbers), len(planned), f"{check.subject}, {check.target}: {check.check}")
            results[index] = _run_check(check, keys[index], level / len(planned))
            with callback_lock:
                done(results[index])
        return results

    with ThreadPoolExecutor(2) as pool:
        results = {index: result for part in pool.map(run_thread, (0, 1)) for index, result in part.items()}
    return [results[index] for index in range(len(planned))]


def unexpected(results: Sequence[CheckResult]) -> list[str]:
    """List the unexpected results: correct engines that fail, and wrong engines that pass every check."""
    sentences = [
        f"{result.subject} on {result.target} fails {result.check}: {result.verdict}"
        for result in results
        if result.passed is False and not result.reason
    ]
    for pair in dict.fromkeys((result.subject, result.target) for result in results if result.reason):
        of_pair = [result for result in results if (result.subject, result.target) == pair and result.reason]
        if all(result.passed is not False for result in of_pair):
            sentences.append(
                f"no check detected what is wrong with {pair[0]} on {pair[1]}: it {of_pair[0].reason}"
            )
    return sentences


# The plan


def _plan(key, subjects, samplers, transitions, size) -> list[_PlannedCheck]:
    keys = jax.random.split(key, 4)
    planned = []
    for i, (target, target_subjects) in enumerate(_targets_with_subjects(subjects)):
        exact = target.exact(jax.random.fold_in(keys[0], i), size.num_exact)
        for j, subject in enumerate(target_subjects):
            get_draws = _cached_draws(subject, jax.random.fold_in(keys[1], 100 * i + j), target.target)
            planned += _checks_of_draws(subject, target, get_draws, exact, size)
    calibrated = [
        subject
        for subject in subjects
        if subject.quick and subject.target is None and size.num_engine_simulations
    ]
    for i, subject in enumerate(calibrated):
        model, key_subject = known_targets.linear_regression(), jax.random.fold_in(keys[2], i)
        planned += _calibration_of_engine(subject, model, key_subject, size.num_engine_simulations)
    for i, sampler in enumerate(samplers if size.num_simulations else ()):
        model, key_sampler = known_targets.eight_schools(), jax.random.fold_in(keys[3], i)
        planned += _calibration_of_sampler(sampler, model, key_sampler, size.num_simulations)
    model = known_targets.location_and_scale()
    return planned + [_joint_test(transition, model, size.num_lanes) for transition in transitions]


def _targets_with_subjects(
    subjects: Sequence[Subject],
) -> list[tuple[known_targets.KnownTarget, list[Subject]]]:
    """Return each target with the subjects tested on it: the common targets first, then those of single engines."""
    common = [subject for subject in subjects if subject.target is None]
    common_targets = (known_targets.correlated_normal(), known_targets.skewed())
    own_targets = {subject.target.name: subject.target for subject in subjects if subject.target is not None}
    return [(target, common) for target in common_targets if common] + [
        (
            target,
            [subject for subject in subjects if subject.target is not None and subject.target.name == name],
        )
        for name, target in own_targets.items()
    ]


def _reason(subject: Subject, features: Sequence[str]) -> str:
    return "; ".join(subject.limitations[name] for name in features if name in subject.limitations)


def _cached_draws(subject: Subject, key: PRNGKey, target: Any) -> Callable[[], trials.SubjectDraws]:
    """Return a function that computes the posterior at its first call."""

    @functools.cache
    def get_draws() -> trials.SubjectDraws:
        return trials.sample(subject, key, target)

    return get_draws


def _checks_of_draws(
    subject: Subject, target: known_targets.KnownTarget, get_draws: Callable, exact: Any, size: SuiteSize
) -> list[_PlannedCheck]:
    reason = _reason(subject, target.features)
    checks = [
        _PlannedCheck(
            subject=subject.name,
            target=target.name,
            check=name,
            run=functools.partial(trials.discrepancy, name, get_draws, target, exact),
            reason=reason,
            get_draws=get_draws,
        )
        for name in size.discrepancies
    ]
    if subject.bounds_fn is not None:
        # The bounds hold for wrong approximations too, so that no engine should fail this check.
        run = functools.partial(trials.evidence, subject.bounds_fn, get_draws, target, exact)
        checks.append(
            _PlannedCheck(
                subject=subject.name, target=target.name, check="evidence", run=run, get_draws=get_draws
            )
        )
    return checks


def _calibration_of_engine(
    subject: Subject, model: known_targets.SimulationModel, key: PRNGKey, num: int
) -> list[_PlannedCheck]:
    get_simulated = functools.cache(functools.partial(trials.infer_one_by_one, key, model, subject, num))
    reason = _reason(subject, model.features)
    return [
        _PlannedCheck(
            subject=subject.name,
            target=model.name,
            check=name,
            run=functools.partial(check_fn, model, get_simulated),
            reason=reason,
            get_draws=get_simulated,
            thread=1,
        )
        for name, check_fn in (("SBC", trials.ranks), ("TARP", trials.coverage))
    ]


def _calibration_of_sampler(
    sampler: Sampler, model: known_targets.SimulationModel, key: PRNGKey, num: int
) -> list[_PlannedCheck]:
    get_report = functools.cache(functools.partial(trials.calibrate, model, sampler, num, key))

    def run_sbc(key: PRNGKey, level: float) -> trials.Outcome:
        return trials.outcome_of(get_report(level))

    run_tarp = functools.partial(trials.coverage_of_report, get_report)
    return [
        _PlannedCheck(subject=sampler.name, target=model.name, check=name, run=run, thread=1)
        for name, run in (("SBC", run_sbc), ("TARP", run_tarp))
    ]


def _joint_test(
    transition: Transition, model: known_targets.SimulationModel, num_lanes: int
) -> _PlannedCheck:
    run = functools.partial(trials.joint, transition, model, num_lanes)
    return _PlannedCheck(subject=transition.name, target=model.name, check="joint test", run=run, thread=1)


# Execution


def _run_check(check: _PlannedCheck, key: PRNGKey, level: float) -> CheckResult:
    start = time.perf_counter()
    report, passed, remark = None, None, ""
    try:
        if check.get_draws is not None:
            remark = getattr(check.get_draws(), "remark", "")
        try:
            report, passed, verdict = check.run(key, level)
        except ValueError as error:
            # A check raises if it cannot be made: too few draws, or chains too short for their autocorrelation.
            verdict = str(error) if str(error).startswith("cannot tell") else f"cannot tell: {error}"
    except NumericalError as error:
        passed, verdict = False, f"the engine failed: {error}"
    return CheckResult(
        subject=check.subject,
        target=check.target,
        check=check.check,
        report=report,
        passed=passed,
        verdict=verdict,
        reason=check.reason,
        remark=remark,
        seconds=time.perf_counter() - start,
    )
