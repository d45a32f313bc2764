"""The suite: which engines, samplers and kernels pass which checks on which targets.

Engines come as plain callables, so the suite judges any library's. Each says what it *cannot* represent (correlation, a
shape that is not normal) and each target what it *is*: an engine that fails where it cannot succeed fails as it should,
and if no check saw it fail, the checks are at fault. The level is shared among all findings, so that a whole
run of right engines raises a false alarm with probability ``level`` at most.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.checks import known
from probinfer.checks.c2st import c2st
from probinfer.checks.energy import energy_distance
from probinfer.checks.evidence import evidence_sandwich
from probinfer.checks.identity import stein_identity
from probinfer.checks.joint import joint_test
from probinfer.checks.ksd import ksd
from probinfer.checks.mmd import mmd
from probinfer.checks.ranks import rank_table
from probinfer.checks.sliced import sliced_wasserstein
from probinfer.checks.tarp import tarp
from probinfer.checks.uniformity import WORDS, uniformity
from probinfer.errors import NumericalError, check_key
from probinfer.logdensity import LogDensity
from probinfer.run_many import run_many
from probinfer.types import PRNGKey

__all__ = ["Finding", "Kernel", "Sampler", "Size", "Subject", "run_suite", "unexpected"]

_DRAWS_OF_LOOPS = 100  # ranked against, in calibration of engines that are called data set by data set
_PROJECTIONS = 5


class Subject(NamedTuple):
    """An engine.

    Attributes:
        name: in tables.
        sample_fn: ``(key, target)`` -> a posterior whose ``unconstrained`` has leaves (chain, draw, ...).
        cannot: feature of a target (``known.CORRELATED``, ``known.NOT_NORMAL``) -> why the engine must miss it.
        log_density_fn: ``posterior -> (position -> log q)``, normalised, for approximations that have one: then the
            evidence is bounded by its importance weights from both sides.
        quick: cheap enough to be called for every data set of a calibration.
    """

    name: str
    sample_fn: Callable
    cannot: Mapping[str, str] = {}
    log_density_fn: Callable | None = None
    quick: bool = True


class Sampler(NamedTuple):
    """A procedure for many data sets: ``make(logdensity_fn, init_fn, num_draws=...)`` -> ``infer_fn(key, x)``."""

    name: str
    make: Callable


class Kernel(NamedTuple):
    """A Markov kernel with a state of its own.

    Attributes:
        name: in tables.
        init_fn: ``(logdensity_fn, position)`` -> state.
        step_fn: ``(logdensity_fn, key, state)`` -> (state, info); it does not adapt and is reversible.
        position_fn: state -> position.
    """

    name: str
    init_fn: Callable
    step_fn: Callable
    position_fn: Callable


class Size(NamedTuple):
    """How much work.

    Attributes:
        exact: exact draws to compare with; engines should give about as many.
        simulations: data sets for samplers.
        loops: data sets for engines, one after the other.
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
            return WORDS[self.passed]
        return "does not see it" if self.passed else "fails, as it should"


class _Task(NamedTuple):
    subject: str
    target: str
    check: str
    run: Callable[[PRNGKey, float], tuple[Any, bool | None, str]]  # (report, passed, verdict)
    reason: str = ""
    drawn: Callable[[], Any] | None = None


class _Drawn(NamedTuple):
    posterior: Any
    remark: str


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
        started: called with the number of each check, how many there are, and what it is.
        done: called with each finding.

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
    findings = []
    for number, (task, task_key) in enumerate(zip(tasks, jax.random.split(key_checks, len(tasks)))):
        started(number, len(tasks), f"{task.subject}, {task.target}: {task.check}")
        findings.append(_finding(task, task_key, level / len(tasks)))
        done(findings[-1])
    return findings


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
    for index, target in enumerate((known.correlated_normal(), known.skewed())):
        exact = target.exact(jax.random.fold_in(keys[0], index), size.exact)
        for number, subject in enumerate(subjects):
            drawn = _once(subject, jax.random.fold_in(keys[1], 100 * index + number), target.target)
            tasks += _of_draws(subject, target, drawn, exact, size)
    for number, subject in enumerate(subject for subject in subjects if subject.quick):
        tasks += _of_loops(subject, known.linear_regression(), jax.random.fold_in(keys[2], number), size.loops)
    for number, sampler in enumerate(samplers):
        tasks += _of_sampler(
            sampler, known.eight_schools(), jax.random.fold_in(keys[3], number), size.simulations
        )
    return tasks + [_of_kernel(kernel, known.location_and_scale(), size.lanes) for kernel in kernels]


def _reason(subject: Subject, features: Sequence[str]) -> str:
    return "; ".join(subject.cannot[name] for name in features if name in subject.cannot)


def _once(subject: Subject, key: PRNGKey, target: Any) -> Callable[[], _Drawn]:
    """The posterior, computed when it is first asked for."""

    @functools.cache
    def drawn() -> _Drawn:
        return _sample(subject, key, target)

    return drawn


def _sample(subject: Subject, key: PRNGKey, target: Any) -> _Drawn:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = subject.sample_fn(key, target)
    texts = [str(item.message) for item in caught if issubclass(item.category, UserWarning)]
    return _Drawn(posterior, "; ".join(dict.fromkeys(texts)))


def _of_draws(subject: Subject, target: known.Known, drawn: Callable, exact: Any, size: Size) -> list[_Task]:
    reason = _reason(subject, target.features)
    tasks = [
        _Task(
            subject.name,
            target.name,
            name,
            functools.partial(_discrepancy, name, drawn, target, exact),
            reason,
            drawn,
        )
        for name in size.discrepancies
    ]
    if subject.log_density_fn is not None:
        run = functools.partial(_evidence, subject.log_density_fn, drawn, target, exact)
        tasks.append(_Task(subject.name, target.name, "evidence", run, "", drawn))
    return tasks


def _of_loops(subject: Subject, model: known.Model, key: PRNGKey, num: int) -> list[_Task]:
    simulated = functools.cache(functools.partial(_simulate_and_loop, key, model, subject, num))
    reason = _reason(subject, model.features)
    return [
        _Task(subject.name, model.name, name, functools.partial(check, model, simulated), reason)
        for name, check in (("SBC", _ranks), ("TARP", _tarp))
    ]


def _of_sampler(sampler: Sampler, model: known.Model, key: PRNGKey, num: int) -> list[_Task]:
    simulated = functools.cache(functools.partial(_simulate_and_run, key, model, sampler, num))
    return [
        _Task(sampler.name, model.name, name, functools.partial(check, model, simulated))
        for name, check in (("SBC", _ranks), ("TARP", _tarp))
    ]


def _of_kernel(kernel: Kernel, model: known.Model, lanes: int) -> _Task:
    return _Task(kernel.name, model.name, "joint test", functools.partial(_joint, kernel, model, lanes))


# How


def _finding(task: _Task, key: PRNGKey, level: float) -> Finding:
    start = time.perf_counter()
    report, passed, remark = None, None, ""
    try:
        if task.drawn is not None:
            remark = task.drawn().remark
        report, passed, verdict = task.run(key, level)
    except NumericalError as error:
        passed, verdict = False, f"the engine failed: {error}"
    except ValueError as error:  # what a check refuses: too few draws, chains too short for their correlation
        verdict = str(error) if str(error).startswith("cannot tell") else f"cannot tell: {error}"
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


def _judged(report: Any) -> tuple[Any, bool | None, str]:
    return report, report.passed, report.verdict


def _discrepancy(name: str, drawn: Callable, target: known.Known, exact: Any, key: PRNGKey, level: float):
    values = drawn().posterior.unconstrained
    if values.shape[0] == 1:
        values = values[0]  # one chain is an approximation's independent draws
    num = max(99, math.ceil(2 / level))  # relabellings: twice as many as the level needs
    log_density = target.target.logdensity_fn
    if name == "Stein":
        return _judged(stein_identity(values, log_density, level=level))
    if name == "KSD":
        return _judged(ksd(values, log_density, key=key, num_bootstrap=num, level=level))
    if name == "C2ST":
        return _judged(c2st(key, values, exact, num_permutations=4 * num, level=level))
    distance = {"MMD": mmd, "energy": energy_distance, "sliced": sliced_wasserstein}[name]
    return _judged(distance(values, exact, key=key, num_permutations=num, level=level))


def _evidence(log_density_fn: Callable, drawn: Callable, target: known.Known, exact: Any, key, level: float):
    """Importance weights at draws of the approximation bound the evidence from below, at exact ones from above."""
    del key
    posterior = drawn().posterior
    log_q, log_p = log_density_fn(posterior), target.target.logdensity_fn
    own = posterior.unconstrained.reshape(-1, exact.shape[-1])
    forward, reverse = (
        np.asarray(jax.vmap(lambda u: log_p(u) - log_q(u))(draws)) for draws in (own, exact)
    )
    report = evidence_sandwich(forward, reverse, level=level)
    low, high = report.interval
    right = not report.contradiction and low <= target.log_evidence <= high
    return report, right, f"{report.verdict}; exactly {target.log_evidence:.4g}"


def _simulate(key: PRNGKey, model: known.Model, num: int) -> tuple[Any, Any, Any]:
    key_theta, key_x, key_infer = jax.random.split(key, 3)
    theta = jax.vmap(model.prior_sample)(jax.random.split(key_theta, num))
    x = jax.vmap(model.simulate)(jax.random.split(key_x, num), theta)
    return theta, x, jax.random.split(key_infer, num)


def _simulate_and_loop(key: PRNGKey, model: known.Model, subject: Subject, num: int) -> tuple[Any, Any, Any]:
    """True values (S, d), data, and draws (S, L, d) of an engine that is called data set by data set."""
    theta, x, keys = _simulate(key, model, num)
    assert model.target_fn is not None
    draws = []
    for one, one_x in zip(keys, np.asarray(x)):
        values = _sample(subject, one, model.target_fn(one_x)).posterior.unconstrained
        chains, length = values.shape[:2]
        each = min(length, -(-_DRAWS_OF_LOOPS // chains))
        picked = np.linspace(0, length - 1, each).astype(int)  # far apart: nearly independent
        draws.append(np.asarray(values)[:, picked].reshape(-1, values.shape[-1]))
    return theta, x, jnp.asarray(np.stack(draws))


def _simulate_and_run(key: PRNGKey, model: known.Model, sampler: Sampler, num: int) -> tuple[Any, Any, Any]:
    theta, x, keys = _simulate(key, model, num)
    return theta, x, run_many(_procedure(model, sampler), keys, x, progress=False).draws


def _procedure(model: known.Model, sampler: Sampler) -> Callable:
    def init(key, x):
        del x
        return model.prior_sample(key)

    return sampler.make(model.log_joint, init)


def _ranks(model: known.Model, simulated: Callable, key: PRNGKey, level: float):
    theta, x, draws = simulated()
    densities = {"log_prior_fn": model.log_prior_fn, "log_likelihood_fn": model.log_likelihood_fn}
    table = rank_table(key, draws, theta, x, **densities, num_projections=_PROJECTIONS)
    return _judged(uniformity(table, level=level))


def _tarp(model: known.Model, simulated: Callable, key: PRNGKey, level: float):
    del model
    theta, x, draws = simulated()
    return _judged(tarp(key, draws, theta, x, level=level))


def _joint(kernel: Kernel, model: known.Model, lanes: int, key: PRNGKey, level: float):
    def init(theta, x):
        return kernel.init_fn(LogDensity(_swapped, model, x), theta)

    def step(key, state, x):
        return kernel.step_fn(LogDensity(_swapped, model, x), key, state)

    report = joint_test(
        key,
        model.prior_sample,
        model.simulate,
        step,
        init_fn=init,
        position_fn=kernel.position_fn,
        log_prior_fn=model.log_prior_fn,
        log_likelihood_fn=model.log_likelihood_fn,
        num_simulations=lanes,
        num_draws=15,
        level=level,
        mode="vmap",
        progress=False,
    )
    return _judged(report)


def _swapped(model: known.Model, x: Any, theta: Any):
    return model.log_joint(theta, x)
