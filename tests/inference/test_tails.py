"""Improper densities are found, proper ones are not called improper: two tables, and the words."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.inference import tails


def normal(x):
    return -0.5 * jnp.sum(x**2)


def student(x, freedom):
    """Independent coordinates."""
    return -(freedom + 1) / 2 * jnp.sum(jnp.log1p(x**2 / freedom))


def multivariate_student(x, freedom):
    return -(freedom + len(x)) / 2 * jnp.log1p(jnp.sum(x**2) / freedom)


def half_cauchy_scale(x):
    """A scale and what it scales, on the log scale: overflows far away."""
    scale = jnp.exp(x[0])
    return x[0] - jnp.log1p(scale**2) - 0.5 * (x[1] / scale) ** 2 - x[0] - 0.5 * x[2] ** 2


def inverse_gamma(x, shape):
    return jnp.sum(-shape * x - shape * jnp.exp(-x))


def separable(x, penalty):
    """Logistic regression on classes that a line separates."""
    return jnp.sum(
        jax.nn.log_sigmoid(jnp.array([[1.0, 0.5, 2.0], [2.0, -0.1, 1.0]]) @ x)
    ) - penalty * jnp.sum(x**2)


def wide_and_narrow(x):
    return -0.5 * jnp.sum((x / jnp.array([1e6, 1.0, 1e-4])) ** 2)


PROPER = {
    "normal": normal,
    "Cauchy": partial(student, freedom=1.0),
    "Student-t, 2 degrees": partial(student, freedom=2.0),
    "multivariate Student-t": partial(multivariate_student, freedom=1.0),
    "Laplace": lambda x: -jnp.sum(jnp.abs(x)),
    "wide and narrow": wide_and_narrow,
    "half-Cauchy scale": half_cauchy_scale,
    "vague inverse gamma": partial(inverse_gamma, shape=0.001),
    "separable, with a prior": partial(separable, penalty=1e-3),
    "a floor where a transform clips": lambda x: jnp.maximum(-jnp.sum(jnp.abs(x)), -87.0),
}

IMPROPER = {
    "flat": lambda x: 0.0 * jnp.sum(x),
    "flat in one": lambda x: normal(x[1:]),
    "a sum is known": lambda x: -0.5 * (x[0] + x[1] - 3.0) ** 2 - 0.5 * x[2] ** 2,
    "1/x": lambda x: -jnp.sum(jnp.log1p(jnp.abs(x))),
    "too slow for three dimensions": lambda x: -jnp.log1p(jnp.sum(x**2)),
    "periodic": lambda x: jnp.cos(x[0]) + normal(x[1:]),
    "flat log scale": lambda x: normal(x[1:]) - 1e-3 * jnp.exp(-2 * x[0]),
    "separable, without a prior": partial(separable, penalty=0.0),
    "a floor that matters": lambda x: jnp.maximum(-jnp.sum(jnp.abs(x)), -40.0),
    "growing": lambda x: x[0] + normal(x[1:]),
}


@pytest.fixture
def places(dtype):
    return jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)) * [3.0, 1.0, 0.2], dtype)


@pytest.mark.f32
@pytest.mark.parametrize("name", PROPER)
def test_proper_densities_pass(name, places):
    assert tails.improper(PROPER[name], places) == ""


@pytest.mark.f32
@pytest.mark.parametrize("name", IMPROPER)
def test_improper_densities_are_found(name, places):
    assert tails.improper(IMPROPER[name], places) != ""


def test_the_direction_is_named(dtype):
    def logdensity(values):
        return -0.5 * (values["a"] + 2 * values["b"][1]) ** 2 - 0.5 * values["b"][0] ** 2

    rng = np.random.default_rng(0)
    places = {"a": jnp.asarray(rng.normal(size=4), dtype), "b": jnp.asarray(rng.normal(size=(4, 2)), dtype)}
    said = tails.improper(logdensity, places)
    assert said.endswith(("along a - 0.5 b[1]", "along -a + 0.5 b[1]"))
    assert "away the log density " in said


def test_places_that_are_not_finite_are_left_out(places):
    broken = places.at[0].set(jnp.nan)
    assert tails.improper(IMPROPER["flat"], broken) != ""
    assert tails.improper(IMPROPER["flat"], broken[:1]) == ""
