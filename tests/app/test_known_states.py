"""The noisy autoregression: density, evidence and exact draws, against a reference filter and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from probinfer.app.suite import known_states
from probinfer.app.suite.suite import Subject, SuiteSize, run_suite
from probinfer.inference.posterior import Posterior
from tests.reference.kalman import kalman

MODEL = known_states.noisy_autoregression()
SIZE = SuiteSize(
    num_exact=1000, num_simulations=0, num_engine_simulations=50, num_lanes=0, discrepancies=("Stein",)
)


def log_density(log_scale, slope):
    y = np.asarray(MODEL.y, float)
    log_likelihood = kalman(y, slope=slope, process=np.exp(2 * log_scale), noise=1.0, start=1.0)[0]
    return log_likelihood + stats.norm.logpdf(log_scale, -0.5, 0.7) + stats.norm.logpdf(slope, 0.5, 0.5)


@pytest.mark.f32
@pytest.mark.parametrize("position", [(-0.3, 0.8), (-2.0, 0.1), (1.0, -0.4)])
def test_density(position):
    value = float(MODEL.known.target.logdensity_fn(jnp.asarray(position)))
    assert value == pytest.approx(
        log_density(*position), rel=1e-5 if jnp.ones(()).dtype == "float32" else 1e-9
    )


def test_evidence():
    top = log_density(-0.25, 0.78)
    total, _ = integrate.dblquad(
        lambda s, a: np.exp(log_density(s, a) - top), -0.5, 1.8, -4.0, 2.0, epsabs=1e-4, epsrel=1e-4
    )
    assert MODEL.known.log_evidence == pytest.approx(np.log(total) + top, abs=1e-3)


def test_exact_draws_have_the_moments_of_quadrature():
    axes = [np.linspace(-3.0, 1.2, 61), np.linspace(-0.6, 1.8, 61)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    values = np.array([log_density(*row) for row in grid])
    mass = np.exp(values - np.logaddexp.reduce(values))
    mean = mass @ grid
    sd = np.sqrt(mass @ (grid - mean) ** 2)
    draws = np.asarray(MODEL.known.exact(jax.random.key(3), 4000))
    assert draws.shape == (4000, 2)
    # four z-tests at |z| < 5, false alarm 2e-6; the error of a standard deviation for a kurtosis up to 6
    assert np.all(np.abs(draws.mean(0) - mean) < 5 * sd / np.sqrt(4000))
    assert np.all(np.abs(draws.std(0) / sd - 1) < 5 * np.sqrt(5 / 4 / 4000))


def test_a_subject_with_its_own_target_is_tested_there_alone():
    def exact(key, target):
        draws = MODEL.known.exact(jax.random.fold_in(key, 1), 1000)[None]
        return Posterior(draws, unconstrained=draws)

    def prior(key, target):
        draws = jnp.asarray([-0.5, 0.5]) + jax.random.normal(key, (1, 1000, 2)) * jnp.asarray([0.7, 0.5])
        return Posterior(draws, unconstrained=draws)

    subjects = [Subject(name, fn, target=MODEL.known) for name, fn in (("exact", exact), ("prior", prior))]
    results = run_suite(jax.random.key(1), subjects, size=SIZE, level=1e-4)
    assert {f.target for f in results} == {"noisy autoregression"}
    assert [f.check for f in results] == ["Stein"] * 2
    assert [f.passed for f in results] == [True, False]  # false alarm 1e-4
