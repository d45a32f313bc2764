"""Annealed importance sampling against the exact evidence, forward and in reverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import smc
from probinfer.base import Status
from probinfer.checks import evidence_sandwich
from probinfer.errors import ConvergenceWarning, NumericalError
from probinfer.smc import tempered
from tests.smc import tempered_cases as cases

RUNS = 256


@pytest.fixture(scope="module")
def frozen():
    return smc.annealing(
        jax.random.key(1), cases.target_of(cases.NORMAL), num_particles=RUNS, refine=4, progress=False
    )


def exact_draws(num):
    _, mean, covariance = cases.conjugate()
    draws = np.random.default_rng(5).multivariate_normal(mean, covariance, num)
    return jnp.asarray(draws, jnp.result_type(float))


@pytest.mark.f32
def test_the_sandwich_holds_the_evidence(frozen):
    log_evidence = cases.conjugate()[0]
    forward = np.asarray(frozen.forward_all(jax.random.key(2), RUNS), float)
    reverse = np.asarray(frozen.reverse_all(jax.random.key(3), exact_draws(RUNS)), float)
    report = evidence_sandwich(forward, reverse, level=0.001)
    low, high = report.interval
    assert low < log_evidence < high  # .001
    assert not report.contradiction
    assert 0 < report.gap < 4  # nats
    for logs, sign in ((forward, 1), (reverse, -1)):  # E w = Z, E 1/w = 1/Z: 4.5 errors are 7e-6
        ratio = np.exp(sign * (logs - log_evidence))
        assert abs(ratio.mean() - 1) < 4.5 * ratio.std(ddof=1) / np.sqrt(RUNS)


def test_single_runs_are_what_the_check_takes(frozen):
    report = evidence_sandwich(
        frozen.forward, frozen.reverse(exact_draws(50)), key=jax.random.key(4), num_runs=40, level=0.001
    )
    low, high = report.interval
    assert low < cases.conjugate()[0] < high  # .001
    assert report.gap < 6


@pytest.mark.f32
def test_anneal_draws_and_weighs(dtype):
    log_evidence, mean, covariance = cases.conjugate()
    posterior = smc.anneal(
        jax.random.key(6), cases.target_of(cases.NORMAL), num_particles=RUNS, refine=4, progress=False
    )
    info = posterior.info
    assert info.status == Status.OK
    assert info.start == "prior"
    assert posterior.log_weights.shape == (1, RUNS)
    assert posterior.log_weights.dtype == dtype
    assert abs(posterior.log_evidence - log_evidence) < 4 * info.log_evidence_error  # 6e-5
    found = jax.tree.leaves(posterior.expectation(lambda draw: draw))[0]
    assert np.all(np.abs(found - mean) < 4 * np.sqrt(np.diag(covariance) / info.ess))  # 6e-5 each
    assert info.num_gradients > RUNS


def test_undefined_likelihoods_weigh_nothing():
    case = cases.NORMAL._replace(cut=1.5, bad=np.nan)
    posterior = smc.anneal(
        jax.random.key(7), cases.target_of(case), num_particles=RUNS, refine=4, progress=False
    )
    dead = posterior.log_weights == -jnp.inf
    assert np.sum(dead) == posterior.info.num_undefined > 0
    log_evidence = cases.log_evidence_below(1.5)
    assert abs(posterior.log_evidence - log_evidence) < 4 * posterior.info.log_evidence_error  # 6e-5


def test_bad_input(monkeypatch):
    target, key = cases.target_of(cases.NORMAL), jax.random.key(0)
    with pytest.raises(ValueError, match="refine must be 1"):
        smc.annealing(key, target, refine=0)
    with pytest.raises(TypeError, match="refine"):
        smc.anneal(key, target, refine=2.5)
    with pytest.raises(TypeError, match="needs a Target"):
        smc.annealing(key, lambda u: -jnp.sum(u**2))
    monkeypatch.setattr(tempered, "_MAX_LEVELS", 1)
    with pytest.raises(NumericalError, match="only reached") as caught:
        smc.annealing(key, target, num_particles=RUNS, refine=4, progress=False)
    assert caught.value.status == Status.MAX_ITERATIONS


def test_weights_on_few_runs_are_warned_of():
    narrow = cases.bumps([1.0, 0.0], [[4.0, -9.0]] * 2, [np.eye(2) * 1e-6] * 2, [1.0, 3.0])
    with pytest.warns(ConvergenceWarning, match="carry the weight; raise refine"):
        posterior = smc.anneal(
            jax.random.key(8), cases.target_of(narrow), num_particles=RUNS, refine=4, progress=False
        )
    assert posterior.info.status == Status.POOR_APPROXIMATION
