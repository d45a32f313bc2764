"""Joint tests of kernels: correct kernels pass, inserted faults are detected, kernels that do not move are reported.

theta ~ N(0, I) in two dimensions, x ~ N(a.theta, NOISE^2): a narrow, correlated posterior.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import mcmc
from probinfer.checks import joint_test
from probinfer.core.binding import LogDensity

A, NOISE = np.array([1.0, 0.8]), 0.5


def prior_sample(key):
    return jax.random.normal(key, (2,))


def simulate(key, theta):
    return theta @ jnp.asarray(A, theta.dtype) + NOISE * jax.random.normal(key, (), theta.dtype)


def log_prior(theta):
    return -0.5 * jnp.sum(theta**2)


def log_likelihood(theta, x):
    return -0.5 * ((x - theta @ jnp.asarray(A, theta.dtype)) / NOISE) ** 2


def log_joint(x, theta):
    return log_prior(theta) + log_likelihood(theta, x)


def walk(key, theta, x, tempered=1.0, drift=0.0):
    key_move, key_accept = jax.random.split(key)
    new = theta + drift + 0.6 * jax.random.normal(key_move, theta.shape, theta.dtype)
    log_ratio = tempered * (log_joint(x, new) - log_joint(x, theta))
    return jnp.where(jnp.log(jax.random.uniform(key_accept, (), theta.dtype)) < log_ratio, new, theta)


def wrong_ratio(key, theta, x):
    return walk(key, theta, x, tempered=0.5)


def forgotten_proposal(key, theta, x):
    """An asymmetric proposal that the acceptance ratio ignores."""
    return walk(key, theta, x, drift=0.3)


def ignores_data(key, theta, x):
    """A fresh draw from the prior: invariant for the prior, but not for any posterior."""
    return prior_sample(key)


class Cached(NamedTuple):
    position: jax.Array
    gradient: jax.Array


def cached_init(theta, x):
    return Cached(theta, jax.grad(log_joint, 1)(x, theta))


def cached_step(key, state, x, stale=False):
    """HMC that keeps the gradient from step to step; the stale one keeps that of a rejected end."""
    key_momentum, key_accept = jax.random.split(key)
    start = jax.random.normal(key_momentum, (2,), state.position.dtype)
    q, p, g = state.position, start, state.gradient
    for _ in range(3):
        p = p + 0.35 * g
        q = q + 0.7 * p
        g = jax.grad(log_joint, 1)(x, q)
        p = p + 0.35 * g
    log_ratio = log_joint(x, q) - 0.5 * p @ p - log_joint(x, state.position) + 0.5 * start @ start
    accepted = jnp.log(jax.random.uniform(key_accept, (), q.dtype)) < log_ratio
    gradient = g if stale else jnp.where(accepted, g, state.gradient)
    return Cached(jnp.where(accepted, q, state.position), gradient), {"accepted": accepted}


def stale_step(key, state, x):
    return cached_step(key, state, x, stale=True)


def conditional(key, theta, x, i):
    a, b = A[i], A[1 - i]
    precision = 1 + a**2 / NOISE**2
    mean = a * (x - b * theta[1 - i]) / NOISE**2 / precision
    noise = jax.random.normal(key, (), theta.dtype)
    return theta.at[i].set(mean + noise / np.sqrt(precision))


def sweep(key, theta, x):
    keys = jax.random.split(key)
    return conditional(keys[1], conditional(keys[0], theta, x, 0), x, 1)


def sweep_back(key, theta, x):
    keys = jax.random.split(key)
    return conditional(keys[1], conditional(keys[0], theta, x, 1), x, 0)


def identity(key, theta, x):
    return theta


RARE = 1e-4  # the level at which what is right is judged: the rate of false alarms


def judge(key, kernel, num_simulations=300, **kwargs):
    settings = {"log_prior_fn": log_prior, "log_likelihood_fn": log_likelihood, "num_steps": 3} | kwargs
    return joint_test(
        key, prior_sample, simulate, kernel, num_simulations=num_simulations, num_draws=15, **settings
    )


@pytest.mark.f32(slow=True)
def test_a_right_kernel_passes(key):
    report = judge(key, walk, level=RARE)
    assert report.passed
    assert set(report.pvalues) == {
        f"{test}.{name}"
        for test in ("chain", "end")
        for name in ("value[0]", "value[1]", "log_prior", "log_likelihood", "log_joint")
    }
    assert report.transitions == 45
    assert min(report.moved.values()) > 0.95
    assert 0.2 < report.traveled["value[0]"] < 1.5
    assert "prior sd or more" in report.verdict


@pytest.mark.slow
def test_size(key):
    # 30 tests at level .05: 9 false alarms or more have probability 3e-5.
    alarms = sum(bool(judge(k, walk, 60, num_steps=1).rejected) for k in jax.random.split(key, 30))
    assert alarms < 9


@pytest.mark.parametrize("kernel", [wrong_ratio, forgotten_proposal])
def test_faults_are_caught(key, kernel):
    report = judge(key, kernel)
    assert report.passed is False
    assert min(report.pvalues.values()) < 1e-3
    assert "does not leave the posterior invariant" in report.verdict


@pytest.mark.slow
def test_a_stale_gradient_is_caught_in_the_state(key):
    right = judge(key, cached_step, init_fn=cached_init, level=RARE)
    assert right.passed
    stale = judge(key, stale_step, init_fn=cached_init)
    assert stale.passed is False
    assert min(stale.pvalues.values()) < 1e-3


@pytest.mark.slow
def test_a_kernel_that_ignores_the_data(key):
    blind = judge(key, ignores_data, log_prior_fn=None, log_likelihood_fn=None, level=RARE)
    assert blind.passed  # parameters alone cannot see it, and the report says so
    assert "ignores the data is not detected" in blind.verdict
    assert "chain.log_likelihood" in judge(key, ignores_data).rejected


def test_a_kernel_that_stands_still_is_told(key):
    report = judge(key, identity, level=RARE)
    assert report.passed is None
    assert report.stuck_parameters == ("value[0]", "value[1]")
    assert "hardly moves value[0]: it changed in 0.0% of the lanes" in report.verdict
    half = judge(key, lambda key, theta, x: conditional(key, theta, x, 0), level=RARE)
    assert half.passed is None
    assert half.stuck_parameters == ("value[1]",)


@pytest.mark.slow
def test_kernels_that_are_not_reversible(key):
    for reverse in (sweep_back, None):
        report = judge(key, sweep, reverse=reverse, num_steps=1, level=RARE)
        assert report.passed
    assert all(name.startswith("end.") for name in report.pvalues)
    wrong = judge(key, lambda key, theta, x: 0.5 * sweep(key, theta, x), reverse=None)
    assert wrong.passed is False
    assert "the sd that of its prior" in wrong.verdict  # an end is ranked among draws of the prior


@pytest.mark.parametrize("kind", [pytest.param("nuts", marks=pytest.mark.slow), "hmc"])
def test_the_transitions_of_this_library(key, kind):
    config = mcmc.WarmupConfig(jnp.asarray([True, False, False]), jnp.asarray(0.8), 0, 1)
    trajectories = mcmc.Trajectories(kind, max_tree_depth=4, mode="vmap")

    def chains(x):
        return mcmc.chains(LogDensity(log_joint, x), trajectories, config)

    def init(theta, x):
        return chains(x).init(theta[None])

    def step(key, state, x):
        return chains(x).step(key, state)

    def position(state):
        return state.chains.position[0]

    report = judge(key, step, 150, init_fn=init, position_fn=position, num_steps=1, level=RARE)
    assert not report.rejected
    assert min(report.traveled.values()) > 0.4


def test_trees_counts_and_user_quantities(key):
    """A count and a rate: exact draws from a discrete posterior are a kernel too."""
    rates = jnp.asarray([0.2, 0.7])

    def prior(key):
        return {"which": jax.random.bernoulli(key).astype(jnp.int32)}

    def toss(key, theta):
        return jax.random.bernoulli(key, rates[theta["which"]], (3,)).sum()

    def redraw(key, theta, x):
        log_odds = x * jnp.log(rates[1] / rates[0]) + (3 - x) * jnp.log((1 - rates[1]) / (1 - rates[0]))
        return {"which": jax.random.bernoulli(key, jax.nn.sigmoid(log_odds)).astype(jnp.int32)}

    fit = {"fit": lambda theta, x: (x - 3 * rates[theta["which"]]) ** 2}
    settings = {"quantities": fit, "num_simulations": 300, "num_draws": 15}
    report = joint_test(key, prior, toss, redraw, level=RARE, **settings)
    assert report.passed
    assert set(report.pvalues) == {"chain.which", "chain.fit", "end.which", "end.fit"}
    flipped = lambda key, theta, x: redraw(key, theta, 3 - x)  # noqa: E731
    wrong = joint_test(key, prior, toss, flipped, **settings)
    assert "chain.fit" in wrong.rejected


def test_lanes_that_fail_and_too_few_of_them(key):
    report = judge(key, lambda key, theta, x: walk(key, theta, x) + jnp.where(theta[0] > 2, jnp.nan, 0.0))
    assert "lanes failed: a draw is NaN or infinite" in report.verdict
    few = judge(key, walk, 10, level=RARE)
    assert few.passed is None
    assert "simulations are needed" in few.verdict


def test_plot(key):
    report = judge(key, wrong_ratio)
    labels = [text.get_text() for text in report.plot().get_legend().get_texts()]
    assert set(labels) & set(report.rejected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"key": 3}, TypeError, "key"),
        ({"num_simulations": 0}, ValueError, "num_simulations must be"),
        ({"num_draws": 0}, ValueError, "num_draws must be"),
        ({"num_steps": -1}, ValueError, "num_steps must be"),
        ({"reverse": "backwards"}, ValueError, "reverse must be"),
        ({"transition_fn": lambda key, theta, x: theta[0]}, TypeError, "structure, shapes and dtypes"),
        ({"transition_fn": lambda key, theta, x: (theta, {})}, TypeError, "init_fn"),
        ({"reverse": lambda key, theta, x: theta[:1]}, TypeError, "structure, shapes and dtypes"),
        ({"quantities": [lambda theta, x: theta]}, ValueError, "must be a scalar"),
        ({"quantities": {"value[0]": lambda theta, x: x}}, ValueError, "two test quantities"),
        ({"level": 0.95}, ValueError, "false alarm"),
    ],
)
def test_bad_input(key, change, error, words):
    arguments = {"key": key, "transition_fn": walk, "num_simulations": 20, "num_draws": 3} | change
    key, kernel = arguments.pop("key"), arguments.pop("transition_fn")
    with pytest.raises(error, match=words):
        joint_test(key, prior_sample, simulate, kernel, **arguments)
