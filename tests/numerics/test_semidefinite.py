"""Semi-definite matrices: factors of any rank, and differences cleared of the rounding of their terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.numerics.semidefinite import clear_rounding, semidefinite_factor

ROOT = np.random.default_rng(0).normal(size=(12, 3))


@pytest.mark.f32
@pytest.mark.parametrize("kind", ["definite", "low rank", "zero", "duplicates"])
def test_the_factor_gives_the_matrix_back(kind, dtype):
    root = ROOT if kind != "duplicates" else np.repeat(ROOT[:4], 3, axis=0)
    C = root @ root.T * (kind != "zero") + np.eye(12) * (kind == "definite")
    factor = np.asarray(jax.jit(semidefinite_factor)(jnp.asarray(C, dtype)))
    assert factor.dtype == dtype
    np.testing.assert_allclose(
        factor @ factor.T, C, atol=50 * np.finfo(dtype).eps * max(np.abs(C).max(), 1e-30)
    )


def test_a_matrix_that_is_not_finite_has_no_factor(dtype):
    assert not np.isfinite(semidefinite_factor(jnp.full((12, 12), jnp.nan, dtype))).any()


@pytest.mark.f32
def test_a_difference_is_cleared_of_the_rounding_of_its_terms(dtype):
    """Rank 3 of size 1 beside rounding of the size of numbers of 1e6 (1e4 in float32): the rest is zero again."""
    size = 1e6 if dtype == jnp.float64 else 1e3
    noise = np.random.default_rng(1).normal(size=(12, 12)) * size * np.finfo(dtype).eps
    C = jnp.asarray(ROOT @ ROOT.T + 0.5 * (noise + noise.T), dtype)
    cleared = np.asarray(jax.jit(lambda C: clear_rounding(C, jnp.zeros_like, C))(C))
    values = np.linalg.eigvalsh(cleared.astype(float))
    assert values[0] > -1e-5 * size * np.finfo(dtype).eps - 20 * np.finfo(dtype).eps * values[-1]
    np.testing.assert_allclose(cleared, C, atol=12 * size * np.finfo(dtype).eps)
    np.testing.assert_allclose(values[:9], 0, atol=20 * np.finfo(dtype).eps * values[-1])


def test_a_definite_matrix_is_returned_and_the_lower_bound_is_kept(dtype):
    C = jnp.asarray(ROOT @ ROOT.T + np.eye(12))
    least = jnp.diag(jnp.linspace(0.0, 1e-3, 12))
    np.testing.assert_array_equal(clear_rounding(C, lambda least: least, 2 * C), C)
    cleared = clear_rounding(least - 1e-6 * jnp.eye(12), lambda least: least, least)
    np.testing.assert_allclose(cleared, least, atol=1e-15)


def test_derivatives_are_those_of_the_difference():
    def total(t):
        C = t * jnp.asarray(ROOT @ ROOT.T)
        return jnp.sum(jnp.sin(clear_rounding(C - 1e-9 * jnp.eye(12), jnp.zeros_like, C)))

    step = 1e-6
    slope = (total(1.0 + step) - total(1.0 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(total)(1.0), slope, rtol=1e-6)
