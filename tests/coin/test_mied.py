"""Repelling particles under inequality constraints: energy by loops, projections by a solver, walls that hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import probinfer as pi
from probinfer import coin
from probinfer.coin.constrained.barrier import nearest_move
from probinfer.coin.constrained.repulsion import riesz_direction
from probinfer.core.binding import LogDensity

RNG = np.random.default_rng(0)


def log_energy(particles, log_density_fn, nearest):
    """The sum over all pairs, one at a time; distances of the diagonal are given."""
    num, dims = particles.shape
    total = 0.0
    for i in range(num):
        for j in range(num):
            square = nearest[i] if i == j else jnp.sum((particles[i] - particles[j]) ** 2)
            weight = jnp.exp(-0.5 * (log_density_fn(particles[i]) + log_density_fn(particles[j])))
            total += square ** (-(dims + 1e-4) / 2) * weight
    return jnp.log(total)


def skewed(x):
    return -jnp.sum(jnp.exp(x) - 2 * x) - 0.3 * x[0] * x[1]


def test_the_direction_is_the_gradient_of_the_energy():
    particles = jnp.asarray(RNG.normal(size=(5, 2)))
    squares = np.array([[np.sum((a - b) ** 2) for b in particles] for a in particles])
    nearest = np.min(squares + np.where(np.eye(5), np.inf, 0), axis=1) / (1.3 * 2) ** (2 / 2)
    value, gradient = jax.value_and_grad(log_energy)(particles, skewed, nearest)
    values, scores = jax.vmap(jax.value_and_grad(skewed))(particles)
    direction, result = jax.jit(riesz_direction)(particles, values, scores, jnp.ones(5, bool))
    np.testing.assert_allclose(direction, -gradient, rtol=1e-9)
    assert float(result) == pytest.approx(float(value), rel=1e-12)


def test_particles_that_are_not_kept_do_not_matter():
    particles = jnp.asarray(RNG.normal(size=(6, 2)))
    values, scores = jax.vmap(jax.value_and_grad(skewed))(particles)
    mask = jnp.arange(6) != 3
    direct = jax.jit(riesz_direction)
    result, energy = direct(particles, values.at[3].set(jnp.nan), scores.at[3].set(0.0), mask)
    expected, alone = direct(particles[mask], values[mask], scores[mask], mask[mask])
    np.testing.assert_allclose(result[mask], expected, rtol=1e-12)
    np.testing.assert_array_equal(result[3], 0)
    assert float(energy) == pytest.approx(float(alone))


@pytest.mark.parametrize("seed", range(4))
def test_the_nearest_move_solves_its_quadratic_program(seed):
    rng = np.random.default_rng(seed)
    slopes, limits, move = rng.normal(size=(3, 4)), rng.uniform(-0.5, 1, 3), 2 * rng.normal(size=4)
    cuts = {"type": "ineq", "fun": lambda v: limits - slopes @ v, "jac": lambda v: -slopes}
    expected = minimize(
        lambda v: np.sum((v - move) ** 2),
        np.zeros(4),
        jac=lambda v: 2 * (v - move),
        constraints=cuts,
        options={"ftol": 1e-14, "maxiter": 500},
    )
    result = nearest_move(jnp.asarray(move), jnp.asarray(slopes), jnp.asarray(limits), 2000)
    np.testing.assert_allclose(result, expected.x, atol=1e-5)
    once = nearest_move(jnp.asarray(move), jnp.asarray(slopes[:1]), jnp.asarray(limits[:1]), 1)
    excess = max(slopes[0] @ move - limits[0], 0) / np.sum(slopes[0] ** 2)
    np.testing.assert_allclose(once, move - excess * slopes[0], rtol=1e-12)
    np.testing.assert_array_equal(nearest_move(jnp.asarray(move), jnp.zeros((1, 4)), jnp.zeros(1)), move)


def gaussian(scale, x):
    return -0.5 * jnp.sum((x / scale) ** 2)


@pytest.mark.f32
def test_without_constraints_an_ill_scaled_normal(key, dtype):
    """100 particles from 3 sd off and at 0.03 sd: means within 0.05 sd; the cloud is a little narrow, 0.8 to 1."""
    algorithm = coin.mied(LogDensity(gaussian, jnp.array([1.0, 100.0], dtype)))
    start = jnp.asarray(np.random.default_rng(1).normal(size=(100, 2)) + 3, dtype)
    state, (_, info) = pi.run(key, algorithm, algorithm.init(start), 300)
    np.testing.assert_allclose(np.mean(np.asarray(state.positions), axis=0) / [1, 100], 0, atol=0.05)
    spread = np.std(np.asarray(state.positions), axis=0) / [1, 100]
    assert np.all((spread > 0.8) & (spread < 1.05))
    assert state.positions.dtype == dtype
    assert float(info.feasible[-1]) == 1.0
    assert float(info.violation[-1]) == -np.inf


def walls(low, high, x):
    return jnp.concatenate([low - x, x - high])


def flat(x):
    return 0.0 * jnp.sum(x)


@pytest.mark.slow
def test_a_start_outside_a_box_is_brought_in(key, count_compiles):
    """A badly scaled box: three quarters start outside, none is outside after 60 steps, and the box is filled."""
    low, high = jnp.array([-1e-3, -1e3]), jnp.array([1e-3, 1e3])
    algorithm = coin.mied(flat, LogDensity(walls, low, high))
    start = jnp.asarray(np.random.default_rng(2).normal(size=(40, 2)) * 2) * high
    state, (_, info) = pi.run(key, algorithm, algorithm.init(start), 200)
    assert float(info.feasible[0]) < 0.6
    assert float(jnp.min(info.feasible[60:])) == 1.0
    assert float(info.violation[-1]) <= 1e-6 * 1e3
    filled = np.asarray(state.positions / high)
    np.testing.assert_allclose(np.mean(filled, axis=0), 0, atol=0.15)
    # uniform: 0.577; the particles that lean on the walls make it larger
    assert np.all((np.std(filled, axis=0) > 0.55) & (np.std(filled, axis=0) < 0.8))
    other = coin.mied(flat, LogDensity(walls, 2 * low, high))
    with count_compiles() as compiles:
        pi.run(key, other, other.init(start), 200)
    assert compiles.count == 0


def test_a_curved_constraint_holds_in_the_end(key):
    """Half a normal density on a disc, from outside the disc."""
    algorithm = coin.mied(LogDensity(gaussian, jnp.ones(2)), lambda x: jnp.sum(x**2) - 1.0)
    start = jnp.asarray(np.random.default_rng(3).normal(size=(40, 2)) + 2)
    state, (_, info) = pi.run(key, algorithm, algorithm.init(start), 500)
    assert float(info.violation[0]) > 1
    assert float(jnp.max(info.violation[-50:])) < 0.1
    assert float(jnp.mean(info.feasible[-50:])) > 0.9
    np.testing.assert_allclose(np.mean(state.positions, axis=0), 0, atol=0.1)


def hole(x):
    return jnp.where(x[0] > 5, jnp.nan, -0.5 * jnp.sum(x**2))


def test_particles_without_a_score_stand_still_and_are_counted(key):
    algorithm = coin.mied(hole)
    start = jnp.asarray(np.random.default_rng(4).normal(size=(10, 2))).at[3, 0].set(9.0)
    state, (_, info) = pi.run(key, algorithm, algorithm.init(start), 10)
    np.testing.assert_allclose(state.positions[3], start[3], rtol=1e-12)
    assert int(info.num_nonfinite[0]) == 1
    assert np.all(np.isfinite(state.positions))
    assert int(info.status[-1]) == pi.Status.OK


def test_two_particles_in_one_place_stay_finite(key):
    """Their mutual energy is unbounded; the others keep moving, and nothing becomes infinite."""
    start = jnp.asarray(np.random.default_rng(4).normal(size=(10, 2)) + 4)
    algorithm = coin.mied(LogDensity(gaussian, jnp.ones(2)))
    state, _ = pi.run(key, algorithm, algorithm.init(start.at[1].set(start[0])), 10)
    assert np.all(np.isfinite(state.positions))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: coin.mied(0.0), TypeError, "logdensity_fn must be a function"),
        (lambda: coin.mied(flat, "x > 0"), TypeError, "constraint_fn must be a function"),
        (
            lambda: coin.mied(flat, lambda x: jnp.outer(x, x)).init(jnp.eye(2)),
            ValueError,
            r"must return a vector \(m,\) or a scalar",
        ),
        (lambda: coin.mied(flat).init(jnp.ones((4, 2))), ValueError, "identical"),
        (lambda: coin.mied(flat).init(jnp.arange(4)), TypeError, "floating point"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
