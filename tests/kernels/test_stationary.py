"""Distances without cancellation, derivatives where points coincide, and what constructors refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist

from probinfer import kernels as k
from probinfer.kernels.stationary import squared_distances


@pytest.mark.f32
@pytest.mark.parametrize("dims", [1, 5, 40])
def test_squared_distances(dims, dtype):
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(6, dims)), rng.normal(size=(4, dims))
    exact = np.sum((A[:, None] - B[None]) ** 2, axis=2)
    actual = squared_distances(jnp.asarray(A, dtype), jnp.asarray(B, dtype))
    np.testing.assert_allclose(actual, exact, rtol=1e-13 if dtype == jnp.float64 else 1e-5)


@pytest.mark.f32
def test_nothing_cancels_far_from_the_origin(dtype):
    """Years around 2000 in units of a week: squares of size 1e10, differences of size 1."""
    small = dtype == jnp.float32
    x = np.asarray(2000.0 + np.arange(8) * (2.0**-6), dtype)[:, None]
    kernel = k.RBF(jnp.ones((), dtype), jnp.asarray(2.0**-6, dtype))
    gram = np.asarray(kernel.gram(jnp.asarray(x)))
    steps = np.arange(8)
    np.testing.assert_allclose(
        gram, np.exp(-0.5 * (steps[:, None] - steps) ** 2), rtol=1e-5 if small else 1e-12
    )
    np.testing.assert_array_equal(np.diagonal(gram), 1.0)


@pytest.mark.f32
def test_gradients_do_not_cancel_far_from_the_origin(dtype):
    x = jnp.asarray(np.sin(np.arange(8.0)), dtype)[:, None]
    shifted = jnp.asarray(np.round(np.asarray(x) * 2**8) / 2**8, dtype)
    G = jnp.asarray(np.cos(np.add.outer(np.arange(8.0), np.arange(8.0))), dtype)
    kernel = k.Matern32(jnp.ones((), dtype), jnp.asarray(0.5, dtype))
    contract = jax.jit(lambda X: kernel.contract(X, G))
    near, far = contract(shifted), contract(shifted + 2048.0)
    rtol = 1e-12 if dtype == jnp.float64 else 1e-4
    for a, b in zip(jax.tree.leaves(near), jax.tree.leaves(far), strict=True):
        np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("cls", [k.RBF, k.Matern12, k.Matern32, k.Matern52, k.RationalQuadratic, k.Periodic])
def test_first_derivative_is_zero_where_the_points_meet(cls):
    x = jnp.asarray([0.3, -0.2])
    X = jnp.stack([x, x, 2 * x])
    gradient, jacobian = jax.jit(lambda: (jax.grad(cls().evaluate)(x, x), jax.jacfwd(cls().gram)(X)))()
    np.testing.assert_allclose(gradient, 0.0, atol=1e-12)
    assert np.isfinite(jacobian).all()
    np.testing.assert_allclose(jacobian[0, 1], 0.0, atol=1e-12)


# −∂²k/∂x² at x = z, unit variance, lengthscale 0.8: 1/l², 3/l², 5/(3 l²), 1/l², (2π)²/l² for period 1
@pytest.mark.parametrize(
    ("cls", "curvature"),
    [
        (k.RBF, 1.0),
        (k.Matern32, 3.0),
        (k.Matern52, 5 / 3),
        (k.RationalQuadratic, 1.0),
        (k.Periodic, 4 * np.pi**2),
    ],
)
def test_second_derivative_where_the_points_meet(cls, curvature):
    kernel, x = cls(1.0, 0.8), jnp.asarray([0.3])
    slope = jax.grad(kernel.evaluate)
    same_argument, mixed = jax.jit(jax.jacfwd(slope, argnums=(0, 1)))(x, x)
    np.testing.assert_allclose(same_argument, -curvature / 0.64, rtol=1e-10)
    np.testing.assert_allclose(mixed, curvature / 0.64, rtol=1e-10)


@pytest.mark.parametrize("cls", [k.RBF, k.Matern52])
def test_third_derivatives_are_finite_and_right(cls):
    second = jax.jit(jax.grad(jax.grad(lambda x: cls().evaluate(x[None], jnp.zeros(1)))))
    third = jax.jit(jax.grad(second))
    assert third(0.0) == 0.0
    np.testing.assert_allclose(third(0.4), (second(0.401) - second(0.399)) / 0.002, rtol=1e-4)


def test_large_alpha_is_the_squared_exponential():
    X = jnp.linspace(0.0, 2.0, 5)[:, None]
    np.testing.assert_allclose(k.RationalQuadratic(1.0, 0.7, 1e8).gram(X), k.RBF(1.0, 0.7).gram(X), rtol=1e-6)


@pytest.mark.parametrize("bad", [-1.0, 0.0, np.nan, np.inf])
def test_numbers_that_are_not_positive_are_refused(bad):
    with pytest.raises(ValueError, match="variance must be positive"):
        k.RBF(variance=bad)
    with pytest.raises(ValueError, match="lengthscale must be positive"):
        k.Matern52(lengthscale=[1.0, bad])


def test_shapes_and_dtypes_are_checked():
    with pytest.raises(ValueError, match="must be a scalar"):
        k.RBF(variance=np.ones(3))
    with pytest.raises(ValueError, match="stack whole kernels"):
        k.RBF(lengthscale=jnp.ones((2, 3)))
    for wrong in ("a", ["a", "b"], None, True, k.RBF()):
        with pytest.raises(TypeError, match=r"lengthscale must (be a positive number|hold numbers)"):
            k.RBF(lengthscale=wrong)
    with pytest.raises(TypeError, match="floating point"):
        k.RBF(lengthscale=jnp.ones(3, int))
    with pytest.raises(ValueError, match="one value for each column"):
        k.RBF(lengthscale=jnp.ones(2)).gram(jnp.ones((4, 3)))


def test_priors_and_tracers_may_stand_in_for_numbers():
    prior = k.RBF(variance=dist.LogNormal(0.0, 1.0), lengthscale=dist.Gamma(2.0, 1.0))
    assert isinstance(prior.variance, dist.LogNormal)
    gram = jax.jit(lambda scale: k.RBF(lengthscale=scale).gram(jnp.ones((2, 1))))(jnp.asarray(2.0))
    np.testing.assert_array_equal(gram, 1.0)


@pytest.mark.f32
def test_defaults_are_strong_arrays(dtype):
    kernel = k.Matern32()
    assert kernel.variance.dtype == dtype
    assert not kernel.variance.weak_type
