"""Bidirectional Monte Carlo against the evidence of a conjugate Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from probinfer.checks.evidence import evidence_sandwich
from tests.reference import annealing

Y, S = 1.7, 0.4
LADDER = np.linspace(0, 1, 7) ** 3
EXACT = annealing.log_evidence(Y, S)


@pytest.fixture(scope="module")
def runs():
    rng = np.random.default_rng(0)
    forward, final = annealing.forward(rng, Y, S, LADDER, 4000)
    return forward, annealing.reverse(rng, Y, S, LADDER, 4000), final


def test_bounds_hold_the_evidence_between_them(runs):
    """A bound is on the wrong side by chance with z > 4.5: rate 7e-6; the gap is many standard errors wide."""
    sandwich = evidence_sandwich(runs[0], runs[1])
    assert sandwich.lower < EXACT + 4.5 * sandwich.lower_error
    assert sandwich.upper > EXACT - 4.5 * sandwich.upper_error
    assert sandwich.gap > 10 * sandwich.gap_error
    assert sandwich.lower <= sandwich.best_lower
    assert sandwich.best_upper <= sandwich.upper
    low, high = sandwich.interval
    assert low < EXACT < high
    assert not sandwich.contradiction
    assert "log evidence in [" in sandwich.verdict


def test_best_bounds_come_near_the_evidence(runs):
    """Means of weights over 4000 runs: 5 delta-method errors, rate 6e-7 if the weights have similar sizes."""
    sandwich = evidence_sandwich(runs[0], runs[1])
    for best, sign, values in ((sandwich.best_lower, 1, runs[0]), (sandwich.best_upper, -1, runs[1])):
        relative = np.exp(sign * (values - best))
        assert abs(best - EXACT) < 5 * relative.std() / np.sqrt(len(values))


def test_gap_bounds_the_error_of_the_final_states(runs):
    """Final states are nearly normal: KL both ways from their moments, which vary by at most 0.03 by chance (5 sd)."""
    m, v = annealing.moments(Y, S, 1.0)
    mean, var = runs[2].mean(), runs[2].var()
    symmetric = 0.5 * (var / v + v / var - 2) + 0.5 * (mean - m) ** 2 * (1 / v + 1 / var)
    assert 0.03 < symmetric < evidence_sandwich(runs[0], runs[1]).kl_bound


def test_finer_annealing_closes_the_gap():
    rng = np.random.default_rng(1)
    ladder = np.linspace(0, 1, 60) ** 2
    fine = evidence_sandwich(
        annealing.forward(rng, Y, S, ladder, 400)[0], annealing.reverse(rng, Y, S, ladder, 400)
    )
    assert fine.kl_bound < 0.5
    assert abs(fine.best_lower - EXACT) < 0.15  # 5 errors of about 0.02


def test_a_planted_fault_is_a_contradiction():
    """A likelihood that is counted twice raises the forward bound; 4000 runs detect it with z > 20."""
    rng = np.random.default_rng(2)
    ladder = np.linspace(0, 1, 60) ** 2
    low = annealing.forward(rng, Y, S, ladder, 400)[0] + 1.0
    sandwich = evidence_sandwich(low, annealing.reverse(rng, Y, S, ladder, 400))
    assert sandwich.contradiction
    assert "contradict" in sandwich.verdict


def test_the_interval_of_an_evidence_is_that_of_students_t():
    forward, reverse = np.array([0.0, 1.0, 2.0, 5.0]), np.array([6.0, 7.0, 9.0])
    sandwich = evidence_sandwich(forward, reverse, level=0.1)
    low = 2.0 - stats.t.ppf(0.95, 3) * forward.std(ddof=1) / 2
    high = 22 / 3 + stats.t.ppf(0.95, 2) * reverse.std(ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(sandwich.interval, (low, high), rtol=1e-12)


def test_equal_estimates_are_no_contradiction():
    assert not evidence_sandwich(np.zeros(5), np.zeros(5)).contradiction
    assert evidence_sandwich(np.full(5, 1e-3), np.zeros(5)).contradiction


def test_functions_of_a_key_traced_or_not(key):
    def exact(key):
        return jnp.asarray(EXACT) + 0.01 * jax.random.normal(key)

    def host(key):
        return float(exact(key))  # JAX cannot trace this

    sandwich = evidence_sandwich(exact, host, key=key, num_runs=20)
    assert sandwich.log_forward.shape == sandwich.log_reverse.shape == (20,)
    assert abs(sandwich.gap) < 0.02  # 5 errors of 0.01 √(2/20)


def test_bad_inputs_are_refused(key):
    good = np.zeros(5)
    with pytest.raises(TypeError, match="pass key"):
        evidence_sandwich(lambda k: jnp.zeros(()), good)
    with pytest.raises(ValueError, match="at least 3 runs"):
        evidence_sandwich(np.zeros(2), good)
    with pytest.raises(ValueError, match="1 of 5 estimates of forward_fn are not finite"):
        evidence_sandwich(np.asarray([0, 0, 0, 0, -np.inf]), good)
    with pytest.raises(ValueError, match="one number per run"):
        evidence_sandwich(lambda k: jnp.zeros(2), good, key=key)
