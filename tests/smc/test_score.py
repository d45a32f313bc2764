"""Composed score-based samplers against the Fokker-Planck equation, exact normals and mixtures on a grid."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from probinfer import smc
from probinfer.core.status import Status
from probinfer.smc.diffusion import correctors
from tests.params import quick
from tests.reference import mixtures as reference

EXPLODING = (0.02, 200.0)
STEPS, PARTICLES, RUNS = 80, 256, 64
evaluate = jax.jit(correctors.drift_and_rate)
EDGES = np.array([-1.5, 0.0, 1.5])
ROUND = np.eye(2)
TWO = reference.mixture([0.3, 0.7], [[-2.0, 0.0], [2.0, 0.5]], [0.6 * ROUND, [[0.3, 0.1], [0.1, 0.5]]])
WIDE = reference.mixture([0.5, 0.5], [[-2.0, 0.0], [2.0, 0.5]], [1.0 * ROUND, [[1.2, 0.2], [0.2, 1.0]]])
OTHER = reference.mixture([0.5, 0.5], [[-2.0, 1.0], [1.0, -1.0]], [0.8 * ROUND, [[1.0, -0.4], [-0.4, 0.9]]])
CASES = {
    "power": ([TWO, TWO], [2.0, 0.0]),
    "product": ([TWO, OTHER], [1.0, 1.0]),
    "guidance": ([WIDE, TWO], [-0.5, 1.5]),
}


def mixture_score(weights, locs, covariances, diffusion, x, t):
    """Score of the noised mixture, in the coordinates and at the times of the diffusion."""
    signal = diffusion.signal(t)
    noise = t**2 if isinstance(diffusion, smc.VarianceExploding) else 1 - signal**2
    spread = signal**2 * covariances + noise * jnp.eye(2, dtype=x.dtype)
    (a, b), (_, c) = jnp.moveaxis(spread, 0, -1)
    determinant = a * c - b**2
    precision = jnp.moveaxis(jnp.stack([jnp.stack([c, -b]), jnp.stack([-b, a])]) / determinant, -1, 0)
    centered = x - signal * locs
    pull = jnp.einsum("kij,kj->ki", precision, centered)
    logs = jnp.log(weights) - 0.5 * jnp.sum(centered * pull, -1) - 0.5 * jnp.log(determinant)
    return -jax.nn.softmax(logs) @ pull


def score_of(mixture, diffusion):
    dtype = jnp.result_type(float)
    return Partial(mixture_score, *(jnp.asarray(part, dtype) for part in mixture), diffusion)


def model_of(mixtures, exponents, num_steps=STEPS, diffusion=None, corrected=True):
    diffusion = smc.VarianceExploding(*EXPLODING) if diffusion is None else diffusion
    scores = [score_of(mixture, diffusion) for mixture in mixtures]
    return smc.composed(diffusion, scores, exponents, (2,), num_steps, corrected=corrected)


@jax.jit
def runs(model, keys):
    """Results of independent runs; the number of steps is that of the levels."""
    num_steps = model.init.args[0].noise_levels.shape[0]
    return jax.lax.map(lambda key: smc.particle_filter(key, model, num_steps, PARTICLES, store="none"), keys)


def estimates(model, fn, seed=0):
    """Estimates of the integrals of fn(points, weights) under the product and of its own, one per run; results."""
    results = runs(model, jax.random.split(jax.random.key(seed), RUNS))
    weights = np.exp(np.asarray(results.log_weights, float)) / PARTICLES
    values = np.stack([fn(x, w) for x, w in zip(np.asarray(results.particles, float), weights)])
    return values, np.exp(np.asarray(results.log_evidence, float)), results


def largest_z(values, expected):
    """Largest |z| over the numbers, of means over runs."""
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return np.max(np.abs(values.mean(axis=0) - expected) / error)


def masses(points, weights):
    return reference.cells(points, weights, EDGES).ravel()


def common(values, exact):
    """Cells with more than two in a hundred of the mass, and all others merged into one."""
    often = exact.masses.ravel() > 0.02
    together = [
        np.append(x[..., often], x[..., ~often].sum(-1, keepdims=True), -1)
        for x in (values, exact.masses.ravel()[None])
    ]
    return together[0], together[1][0]


@pytest.mark.parametrize("name", CASES)
def test_drift_and_rate_solve_the_fokker_planck_equation(name):
    mixtures, exponents = CASES[name]
    model = model_of(mixtures, exponents, 50).init.args[0]
    rng, largest = np.random.default_rng(1), 0.0
    for noise in (0.4, 1.0, 3.0):
        for point in rng.normal(size=(3, 2)) * 1.5:
            rate = float(evaluate(model, jnp.asarray(point), jnp.asarray(noise))[1])
            residual = reference.fokker_planck_residual(
                mixtures,
                exponents,
                point,
                noise,
                lambda x, noise=noise: np.asarray(evaluate(model, jnp.asarray(x), jnp.asarray(noise))[0]),
                rate,
            )
            assert abs(residual) < 1e-6 * (1 + abs(rate))  # differences of fourth order, rounding / step^2
            largest = max(largest, abs(rate))
    assert largest > 0.05  # the rate is no trifle there


@pytest.mark.parametrize("name", quick(CASES, "product"))
def test_the_distribution_of_the_particles_is_the_product(name):
    mixtures, exponents = CASES[name]
    exact = reference.law(mixtures, exponents, EDGES, EXPLODING[0])
    values, evidences, results = estimates(model_of(mixtures, exponents), masses)
    assert np.all(results.status == Status.OK)
    z = np.exp(exact.log_integral)
    # 17 z-scores of 64 runs a case, t_63: 6.5 is exceeded with probability 17 * 1.5e-8
    assert largest_z(evidences[:, None], z) < 6.5
    estimate, mass = common(values, exact)
    assert len(mass) > 5
    assert largest_z(estimate, z * mass) < 6.5
    assert evidences.std() < 0.5 * z  # so that the test can fail


@pytest.mark.slow
def test_without_weights_the_modes_are_wrong():
    mixtures, exponents = CASES["power"]
    exact = reference.law(mixtures, exponents, EDGES, EXPLODING[0])
    values, evidences, _ = estimates(model_of(mixtures, exponents, corrected=False), masses)
    np.testing.assert_allclose(evidences, 1, rtol=1e-10)
    left, exact_left = values[:, :8].sum(axis=1), exact.masses[:2].sum()
    error = left.std(ddof=1) / np.sqrt(len(left))
    assert left.mean() - exact_left > 0.05  # the smaller mode gets too much
    assert left.mean() - exact_left > 10 * error


@pytest.mark.slow
def test_powers_of_a_normal_distribution_are_normal():
    loc, covariance = np.array([1.0, -2.0]), np.array([[1.0, 0.6], [0.6, 0.8]])
    one = reference.mixture([0.5, 0.5], [loc] * 2, [covariance] * 2)
    other = reference.mixture([0.5, 0.5], [[0.0, 0.0]] * 2, [ROUND] * 2)
    noise = EXPLODING[0] ** 2 * ROUND
    precisions = [1.5 * np.linalg.inv(covariance + noise), 0.5 * np.linalg.inv(ROUND + noise)]
    spread = np.linalg.inv(sum(precisions))
    mean = spread @ precisions[0] @ loc
    exact = reference.law([one, other], [1.5, 0.5], EDGES, EXPLODING[0])
    np.testing.assert_allclose(exact.mean, mean, rtol=1e-9)  # the grid is right
    np.testing.assert_allclose(exact.covariance, spread, rtol=1e-9, atol=1e-12)

    def moments(x, w):
        return np.concatenate([w @ x, ((x - mean).T * w @ (x - mean)).ravel()])

    values, evidences, _ = estimates(model_of([one, other], [1.5, 0.5]), moments)
    z = np.exp(exact.log_integral)
    assert largest_z(values, z * np.concatenate([mean, spread.ravel()])) < 6.5  # five of t_63: 8e-8
    assert largest_z(evidences[:, None], z) < 6.5
    assert evidences.std() < 0.3 * z


def test_a_single_distribution_needs_no_weights():
    _, _, results = estimates(model_of([TWO, TWO], [1.0, 0.0]), masses)
    np.testing.assert_allclose(results.log_weights, 0, atol=1e-6)
    np.testing.assert_allclose(results.ess, PARTICLES, rtol=1e-6)
    assert not np.any(results.resampled)


def test_both_diffusions_are_one_process():
    preserving = smc.VariancePreserving()
    levels = [float(level) for level in preserving.noise_range()]
    time = preserving.time(jnp.asarray(0.7))
    signal = float(preserving.signal(time))
    np.testing.assert_allclose(np.sqrt(1 - signal**2) / signal, 0.7, rtol=1e-6)
    np.testing.assert_allclose(preserving.time(preserving.noise_range()[1]), 1, rtol=1e-6)
    for noise in (0.1, 3.0):
        results = [
            evaluate(model.init.args[0], jnp.asarray([0.3, -1.0]), jnp.asarray(noise))
            for model in (
                model_of(*CASES["product"], diffusion=diffusion)
                for diffusion in (preserving, smc.VarianceExploding(*levels))
            )
        ]
        np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
        np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-6)


@pytest.mark.slow
def test_the_error_falls_with_the_number_of_steps():
    mixtures, exponents = CASES["power"]
    z = np.exp(reference.law(mixtures, exponents, EDGES, EXPLODING[0]).log_integral)
    errors, spreads = [], []
    for num_steps in (20, STEPS):
        _, evidences, _ = estimates(model_of(mixtures, exponents, num_steps), masses)
        errors.append(evidences.mean() / z - 1)
        spreads.append(evidences.std(ddof=1) / z / np.sqrt(RUNS))
    assert max(spreads) < 0.025
    assert errors[0] > 6 * spreads[0]  # 0.23 +- 0.015
    assert errors[1] < errors[0] / 4  # 0.02 +- 0.012


def test_center_and_scale_are_found():
    loc = np.array([30.0, -20.0])
    model = model_of(
        [reference.mixture([0.5, 0.5], [loc] * 2, [2.25 * ROUND] * 2)] * 2, [2.0, 1.0]
    ).init.args[0]
    np.testing.assert_allclose(model.center, loc, rtol=1e-6)
    np.testing.assert_allclose(model.data_variance, 2.25, rtol=1e-6)
    apart = reference.mixture([0.5, 0.5], [[-5.0, 0.0], [5.0, 0.0]], [0.01 * ROUND] * 2)
    model = model_of([apart] * 2, [0.5, 0.5]).init.args[0]
    np.testing.assert_allclose(model.center, 0, atol=1e-6)
    assert 2 < model.data_variance < 30  # 25 along, 0.01 across


def test_new_data_of_the_same_shape_trace_nothing(count_compiles):
    def once(mixtures, exponents, seed):
        model = model_of(mixtures, exponents)
        return runs(model, jax.random.split(jax.random.key(seed), RUNS))

    once(*CASES["product"], 0)
    with count_compiles() as compiles:
        once(*CASES["guidance"], 1)
    assert compiles.count == 0


def broken(x, t):
    return jnp.where(t < 1, jnp.nan, -x / (1 + t**2))


def standard(x, t):
    return -x / (1 + t**2)


def test_a_broken_score_is_reported():
    result = smc.sample_composed(
        jax.random.key(0), smc.VarianceExploding(0.1, 10.0), [broken], [2.0], (1,), 20, 16
    )
    assert int(result.status) == Status.NON_FINITE
    assert np.isnan(result.log_evidence)
    assert 0 < int(result.stopped_at) < 20
    assert np.all(np.isfinite(result.particles))


def test_bad_input():
    diffusion = smc.VarianceExploding(0.1, 10.0)
    make = partial(smc.composed, diffusion)
    with pytest.raises(TypeError, match=r"or smc\.VariancePreserving, got float"):
        smc.composed(3.0, [standard], [1.0], (1,), 20)
    with pytest.raises(TypeError, match="functions"):
        make([3.0], [1.0], (1,), 20)
    with pytest.raises(TypeError, match="num_steps must be a Python int"):
        make([standard], [1.0], (1,), 20.0)
    with pytest.raises(TypeError, match="key must be one typed key"):
        smc.sample_composed(0, diffusion, [standard], [1.0], (1,), 20, 16)
    with pytest.raises(ValueError, match="num_particles must be at least 1"):
        smc.sample_composed(jax.random.key(0), diffusion, [standard], [1.0], (1,), 20, 0)
    with pytest.raises(ValueError, match="one exponent for each"):
        make([standard], [1.0, 2.0], (1,), 20)
    with pytest.raises(ValueError, match="got 0 scores"):
        make([], [], (1,), 20)
    for exponents in ([1.0, -1.0], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="sum positive"):
            make([standard, standard], exponents, (1,), 20)
    with pytest.raises(ValueError, match="score 0 must have the shape of a position"):
        make([lambda x, t: jnp.sum(x)], [1.0], (2,), 20)
    with pytest.raises(ValueError, match="num_steps must be at least 43"):
        make([standard], [10.0], (1,), 42)
    make([standard], [10.0], (1,), 43)
    with pytest.raises(ValueError, match="cannot follow a reference"):
        make([standard], [1.0], (1,), 20).init(jax.random.key(0), 3, jnp.zeros(1))
    with pytest.raises(ValueError, match="0 < noise_min < noise_max"):
        smc.VarianceExploding(2.0, 1.0)
    with pytest.raises(ValueError, match="0 < beta_min < beta_max"):
        smc.VariancePreserving(0.0, 1.0)
    with pytest.raises(ValueError, match="time_min must lie between"):
        smc.VariancePreserving(time_min=1.0)
    with pytest.raises(ValueError, match="noise_min must be a number"):
        smc.VarianceExploding("a", 1.0)
