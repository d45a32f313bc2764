"""Standardization maps and mean functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import gp
from probinfer.gp.model.scaling import identity_scaling, standardization

X = np.random.default_rng(0).normal(size=(30, 3)) * np.array([1e-3, 1.0, 1e6]) + np.array([0.0, 50.0, -1e7])
Y = 1e4 + 3 * X[:, 1]


@pytest.mark.f32
def test_standardised_data_have_zero_mean_and_unit_sd(dtype):
    x, y = np.asarray(X, dtype), np.asarray(Y, dtype)
    scaling = standardization(x, y, outputs=True)
    tolerance = 1e-9 if dtype == jnp.float64 else 2e-3
    scaled = np.asarray(scaling.inputs(x))
    assert scaled.dtype == dtype
    np.testing.assert_allclose(scaled.mean(0), 0, atol=tolerance)
    np.testing.assert_allclose(scaled.std(0), 1, atol=tolerance)
    np.testing.assert_allclose(scaling.outputs(y).std(), 1, atol=tolerance)


def test_outputs_without_a_unit_stay(dtype):
    scaling = standardization(X, (Y.mean() < Y).astype(float), outputs=False)
    assert scaling.y_mean == 0
    assert scaling.y_scale == 1


def test_identity(dtype):
    scaling = identity_scaling(3, dtype)
    np.testing.assert_array_equal(scaling.inputs(X), X)
    np.testing.assert_array_equal(scaling.outputs(Y), Y)


@pytest.mark.f32
def test_means_match_their_formulas(dtype):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), dtype)
    np.testing.assert_array_equal(gp.means.Zero()(x), np.zeros(4))
    np.testing.assert_allclose(gp.means.Constant(1.5)(x), np.full(4, 1.5))
    linear = gp.means.Linear([1.0, -2.0, 0.5], 0.25)
    np.testing.assert_allclose(linear(x), np.asarray(x) @ [1.0, -2.0, 0.5] + 0.25, rtol=1e-5)
    np.testing.assert_allclose(gp.means.Linear(2.0)(x), 2 * np.asarray(x).sum(1), rtol=1e-5)
    for mean in (gp.means.Zero(), gp.means.Constant(1.5), linear):
        assert mean(x).dtype == dtype
        np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(mean, x), mean(x), rtol=1e-6)
