"""The exact evidence and every derivative of it, against NumPy, golden values and generic autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import kernels as k
from probinfer.core.status import Status
from probinfer.gp.structure.exact_evidence import gaussian_evidence
from tests.reference import gp_exact as oracle


def data(dtype, n=12, d=2, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    noise = rng.uniform(0.1, 0.4, size=n)
    return tuple(jnp.asarray(a, dtype) for a in (X, np.sin(2 * X[:, 0]) + 0.3 * rng.normal(size=n), noise))


def log_evidence(kernel, X, residual, noise):
    return gaussian_evidence(kernel, X, residual, noise).log_evidence


def generic(kernel, X, residual, noise):
    """The reference for our derivative rules: autodiff through JAX's own Cholesky."""
    L = jnp.linalg.cholesky(kernel.gram(X) + jnp.diag(noise))
    half = jax.scipy.linalg.solve_triangular(L, residual, lower=True)
    return -0.5 * half @ half - jnp.sum(jnp.log(jnp.diag(L))) - 0.5 * len(half) * np.log(2 * np.pi)


def assert_trees_close(actual, expected, rtol):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1.0, float(np.abs(b).max())))


def test_golden_row():
    """Reference example A: squared exponential, lengthscale 0.9, variance 1.7, noise 0.3."""
    X = jnp.asarray([-1.5, -0.4, 0.3, 1.1, 2.0])[:, None]
    y = jnp.asarray([-1.2, 0.4, 0.5, 1.3, 0.9])

    def value(logs):
        scale, variance, noise = jnp.exp(logs)
        return log_evidence(k.RBF(variance, scale), X, y, jnp.full(5, noise))

    result, gradient = jax.jit(jax.value_and_grad(value))(jnp.log(jnp.asarray([0.9, 1.7, 0.3])))
    np.testing.assert_allclose(result, -6.6235917986, atol=5e-11)
    np.testing.assert_allclose(gradient, [1.0797175741, -1.0402643125, -0.3985125984], atol=5e-11)


@pytest.mark.f32
def test_value_equals_the_formula(dtype):
    X, residual, noise = data(dtype)
    out = jax.jit(gaussian_evidence)(
        k.RBF(jnp.asarray(1.3, dtype), jnp.asarray([0.7, 1.5], dtype)), X, residual, noise
    )
    x, r, s = (np.asarray(a, np.float64) for a in (X, residual, noise))
    gram = oracle.rbf(x, x, 1.3, np.array([0.7, 1.5]))
    rtol = 1e-12 if dtype == jnp.float64 else 1e-5
    assert {a.dtype for a in (out.log_evidence, out.chol, out.alpha, out.jitter)} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(out.log_evidence, oracle.log_evidence(gram, r, s), rtol=rtol)
    np.testing.assert_allclose(
        out.alpha, np.linalg.solve(gram + np.diag(s), r), rtol=100 * rtol, atol=100 * rtol
    )
    np.testing.assert_allclose(out.chol @ out.chol.T, gram + np.diag(s), rtol=10 * rtol, atol=10 * rtol)
    assert out.jitter == 0
    assert out.status == Status.OK


def warp(weights, X):
    return jnp.tanh(X @ weights["dense"]) * weights["counts"]


def composed():
    weights = {"dense": jnp.asarray([[0.8, 0.1], [-0.4, 0.9]]), "counts": jnp.asarray([1, 2])}
    deep = k.Warped(k.Matern32(0.7, jnp.asarray([0.6, 1.1])), jax.tree_util.Partial(warp, weights))
    return deep + 1.4 * k.Matern12(0.3).on(1) * k.Linear(0.5) + k.White(0.1)


@pytest.mark.parametrize("make", [lambda: k.Matern52(1.3, jnp.asarray([0.7, 1.5])), composed])
def test_first_derivatives_forward_and_reverse(make):
    arguments = (make(), *data(jnp.float64, n=8))
    assert_trees_close(gradient_of(log_evidence)(arguments), gradient_of(generic)(arguments), 1e-9)
    tangents = jax.tree.map(tangent, arguments)
    ours = jax.jit(lambda a, t: jax.jvp(log_evidence, a, t))(arguments, tangents)
    theirs = jax.jit(lambda a, t: jax.jvp(generic, a, t))(arguments, tangents)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def gradient_of(fn):
    """The gradient with respect to everything; integer leaves give float0, shown here as zeros."""

    def gradient(arguments):
        tree = jax.grad(lambda arguments: fn(*arguments), allow_int=True)(arguments)
        return jax.tree.map(lambda g: jnp.zeros(g.shape) if g.dtype == jax.dtypes.float0 else g, tree)

    return jax.jit(gradient)


def tangent(leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return np.zeros(leaf.shape, jax.dtypes.float0)
    return jnp.asarray(np.random.default_rng(leaf.size).normal(size=leaf.shape))


def test_hessian_in_every_order_of_modes():
    X, residual, noise = data(jnp.float64, n=4)
    point = {"scale": jnp.asarray([0.7, 1.5]), "X": X, "residual": residual, "noise": noise}

    def along(fn):
        return lambda p: fn(k.Matern52(p["scale"][0], p["scale"]), p["X"], p["residual"], p["noise"])

    expected = jax.jit(jax.jacfwd(jax.grad(along(generic))))(point)
    for outer, inner in ((jax.jacrev, jax.grad), (jax.jacfwd, jax.jacfwd)):
        assert_trees_close(jax.jit(outer(inner(along(log_evidence))))(point), expected, 1e-9)


def test_factor_alpha_and_prediction_may_be_differentiated():
    X, residual, noise = data(jnp.float64, n=7)
    new = X[:3] + 0.1

    def predict(kernel, X, residual, noise, ours):
        if ours:
            out = gaussian_evidence(kernel, X, residual, noise)
            L, alpha = out.chol, out.alpha
        else:
            L = jnp.linalg.cholesky(kernel.gram(X) + jnp.diag(noise))
            alpha = jax.scipy.linalg.cho_solve((L, True), residual)
        cross = kernel.gram(X, new)
        half = jax.scipy.linalg.solve_triangular(L, cross, lower=True)
        return jnp.sum(jnp.sin(cross.T @ alpha)) + jnp.sum(
            jnp.log(kernel.diag(new) - jnp.sum(half**2, axis=0))
        )

    arguments = (k.RBF(1.3, jnp.asarray([0.7, 1.5])), X, residual, noise)
    ours, theirs = (
        jax.jit(jax.grad(lambda *a, ours=ours: predict(*a, ours), argnums=(0, 1, 2, 3)))(*arguments)
        for ours in (True, False)
    )
    assert_trees_close(ours, theirs, 1e-9)


def test_vmap_of_grad_is_grad_one_by_one():
    arguments = data(jnp.float64, n=6)
    gradient = jax.jit(jax.grad(log_evidence, (0, 1)))
    stacked = jax.tree.map(lambda leaf: leaf * jnp.asarray([0.5, 1.0, 2.0]), k.RBF())
    batched = jax.jit(jax.vmap(jax.grad(log_evidence, (0, 1)), (0, None, None, None)))(stacked, *arguments)
    for i in range(3):
        alone = gradient(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), *arguments)
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], batched), alone, 1e-11)


@pytest.mark.f32
def test_float32_stays_float32_and_close(dtype):
    X, residual, noise = data(jnp.float32)
    kernel = k.Matern52(jnp.float32(1.3), jnp.asarray([0.7, 1.5], jnp.float32))
    value, gradient = jax.jit(jax.value_and_grad(log_evidence, (0, 1, 2, 3)))(kernel, X, residual, noise)
    assert {leaf.dtype for leaf in (value, *jax.tree.leaves(gradient))} == {jnp.dtype(jnp.float32)}
    assert_trees_close(gradient, jax.jit(jax.grad(generic, (0, 1, 2, 3)))(kernel, X, residual, noise), 2e-4)


@pytest.mark.f32
def test_failure_is_nan_in_value_and_gradient(dtype):
    X, residual, noise = data(dtype, n=5)
    kernel = k.RBF(jnp.ones((), dtype), jnp.ones((), dtype))
    fn = jax.jit(
        jax.value_and_grad(
            lambda *a: (lambda out: (out.log_evidence, out))(gaussian_evidence(*a)),
            (0, 1, 2, 3),
            has_aux=True,
        )
    )
    negative = noise.at[2].set(-3.0)
    for arguments, status in (
        ((kernel, X, residual, negative), Status.NOT_POSITIVE_DEFINITE),
        ((kernel, X.at[1, 0].set(jnp.nan), residual, noise), Status.NON_FINITE),
        ((kernel, X, residual.at[0].set(jnp.inf), noise), Status.NON_FINITE),
    ):
        (value, out), gradient = fn(*arguments)
        assert out.status == status
        assert np.isnan(value)
        assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(gradient[0]))
        assert np.isnan(gradient[2]).any()


def test_duplicates_without_noise_get_a_reported_jitter_and_its_derivative():
    X = jnp.repeat(jnp.asarray([[0.0], [0.7], [1.9]]), 2, axis=0)
    residual = jnp.asarray([1.0, 1.0, -0.5, -0.5, 0.3, 0.3])

    def value(log_variance):
        out = gaussian_evidence(k.RBF(jnp.exp(log_variance), 1.0), X, residual, jnp.zeros(6))
        return out.log_evidence, out

    (_, out), slope = jax.jit(jax.value_and_grad(value, has_aux=True))(jnp.asarray(0.3))
    assert out.status == Status.OK
    np.testing.assert_allclose(out.jitter / jnp.exp(0.3), 1e-12, rtol=1e-6)
    # A(v) = v (R + c I), so d log N / d log v = (quad − n) / 2; without the jitter's own share it is 1.5 more
    np.testing.assert_allclose(slope, 0.5 * (residual @ out.alpha - 6), atol=0.02)


def test_near_singular_value_against_extended_precision():
    X = jnp.linspace(0.0, 2.0, 60)[:, None]
    residual, noise = jnp.sin(5 * X[:, 0]), jnp.full(60, 1e-7)
    kernel = k.RBF(1.0, 0.8)
    out = jax.jit(gaussian_evidence)(kernel, X, residual, noise)
    exact = oracle.log_evidence_long_double(
        np.asarray(kernel.gram(X)) + np.diag(np.asarray(noise)), np.asarray(residual)
    )
    assert out.jitter == 0
    np.testing.assert_allclose(out.log_evidence, exact, rtol=1e-6)  # condition 4e8 times rounding is 1e-7


@pytest.mark.parametrize("variance", [1e4, 1e-8])
def test_extreme_variances(variance):
    X, residual, _ = data(jnp.float64)
    noise = jnp.full(12, 0.01 * variance)
    out = jax.jit(gaussian_evidence)(k.RBF(variance, 1.0), X, residual, noise)
    gram = oracle.rbf(np.asarray(X), np.asarray(X), variance, 1.0)
    assert out.status == Status.OK
    np.testing.assert_allclose(
        out.log_evidence, oracle.log_evidence(gram, np.asarray(residual), np.asarray(noise)), rtol=1e-9
    )


def test_one_point_and_new_values_trace_nothing(count_compiles):
    X, residual, noise = data(jnp.float64, n=1)
    fn = jax.jit(jax.value_and_grad(log_evidence, (0, 1, 2, 3)))
    kernel = k.RBF(1.5, 0.5)
    value, _ = jax.block_until_ready(fn(kernel, X, residual, noise))
    total = 1.5 + float(noise[0])
    np.testing.assert_allclose(
        value, -0.5 * float(residual[0]) ** 2 / total - 0.5 * np.log(2 * np.pi * total), rtol=1e-13
    )
    other = jax.tree.map(lambda leaf: leaf + 0.5, (k.RBF(2.5, 1.5), X, residual, noise))
    with count_compiles() as counter:
        jax.block_until_ready(fn(*other))
    assert counter.count == 0


def test_the_value_alone_costs_no_inverse():
    arguments = (k.RBF(1.3, 0.8), *data(jnp.float64, n=200))
    assert jax.jit(gaussian_evidence).lower(*arguments).as_text().count("dot_general") == 0
