"""The forms of draws that the checks accept, and the draws that they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.checks import draws as check_draws

RNG = np.random.default_rng(0)
ROWS = jnp.asarray(RNG.normal(size=(240, 2)))


def normal(x):
    return -0.5 * jnp.sum(x**2)


def test_arrays_and_trees():
    assert check_draws.collect("draws", ROWS).values.shape == (1, 240, 2)
    assert check_draws.collect("draws", ROWS).independent
    chains = check_draws.collect("draws", ROWS.reshape(4, 60, 2))
    assert chains.values.shape == (4, 60, 2)
    assert not chains.independent
    tree = check_draws.collect(
        "draws", {"mu": ROWS[:, 0].reshape(4, 60), "w": jnp.asarray(RNG.normal(size=(4, 60, 2, 2)))}
    )
    assert tree.values.shape == (4, 60, 5)
    position = tree.unravel(tree.rows[0])
    assert position["mu"].shape == ()
    assert position["w"].shape == (2, 2)
    scores = check_draws.gradients(lambda p: normal(p["mu"]) + 3 * normal(p["w"]), tree)
    np.testing.assert_allclose(scores, -tree.rows * jnp.asarray([1, 3, 3, 3, 3]), rtol=1e-10)


def test_correlation_time_of_a_chain():
    noise, chain = RNG.normal(size=(2000,)), np.zeros(2000)
    for t in range(1, 2000):
        chain[t] = 0.8 * chain[t - 1] + noise[t]
    time = check_draws.correlation_time(check_draws.collect("draws", jnp.asarray(chain.reshape(1, -1, 1))))
    assert (
        5 < time < 16
    )  # (1 + 0.8)/(1 − 0.8) = 9; the error of the estimate is about 1.5: rate 1e-2, fixed seed
    with pytest.raises(ValueError, match="they are autocorrelated"):
        check_draws.collect("draws", jnp.asarray(chain[:, None]))


@pytest.mark.parametrize(
    ("draws", "error", "text"),
    [
        (ROWS.at[3, 1].set(jnp.nan), ValueError, "NaN or infinite, at \\(0, 3, 1\\)"),
        (ROWS[:, 0], ValueError, "add \\[:, None\\]"),
        (ROWS[:5], ValueError, "5 draws; a verdict needs at least 20"),
        (ROWS.at[:, 1].set(2.0), ValueError, "coordinates \\[1\\] of draws never change"),
        (jnp.ones((30, 2), int), TypeError, "floating point"),
        ({}, TypeError, "must hold arrays"),
        ({"a": ROWS, "b": ROWS[:100]}, ValueError, "must all begin with"),
    ],
)
def test_bad_draws_are_refused(draws, error, text):
    with pytest.raises(error, match=text):
        check_draws.collect("draws", draws)


def test_mismatched_pairs_are_refused():
    with pytest.raises(ValueError, match="same coordinates, got 2 and 1"):
        check_draws.collect_pair(ROWS, ROWS[:, :1])


@pytest.mark.parametrize(
    ("fn", "error", "text"),
    [
        (3.0, TypeError, "must be a function"),
        (lambda x: x, ValueError, "must return one floating-point number"),
        (lambda x: jnp.sum(x > 0), ValueError, "must return one floating-point number"),
        (lambda x: -0.5 * float(x[0]) ** 2, TypeError, "written in JAX"),
        (lambda x: jax.pure_callback(np.sum, jnp.zeros(()), x), TypeError, "cannot be differentiated"),
        (lambda x: jax.lax.stop_gradient(normal(x)), ValueError, "zero at every draw"),
        (lambda x: jnp.sum(jnp.sqrt(x)), ValueError, "NaN or infinite at"),
    ],
)
def test_bad_log_densities_are_refused(fn, error, text):
    with pytest.raises(error, match=text):
        check_draws.gradients(fn, check_draws.collect("draws", ROWS))
