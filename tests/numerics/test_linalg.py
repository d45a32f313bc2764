"""Factor, jitter ladder, inverse and their rules, against NumPy, long doubles and generic autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.core.status import Status
from probinfer.numerics import linalg


def spd(n, dtype, seed=0, condition=1e3):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    return jnp.asarray((q * np.geomspace(1.0, condition, n)) @ q.T, dtype)


def tolerance(dtype, double=1e-10, single=2e-3):
    return double if dtype == jnp.float64 else single


def symmetric(rng, n):
    a = rng.normal(size=(n, n))
    return jnp.asarray(a + a.T)


@pytest.mark.f32
def test_a_good_matrix_needs_no_jitter(dtype):
    K = spd(20, dtype)
    L, jitter, status = jax.jit(linalg.safe_cholesky)(K)
    assert L.dtype == dtype
    assert jitter == 0
    assert status == Status.OK
    np.testing.assert_allclose(
        L, np.linalg.cholesky(np.asarray(K)), rtol=tolerance(dtype), atol=tolerance(dtype)
    )
    np.testing.assert_array_equal(np.triu(L, 1), 0.0)


@pytest.mark.f32
def test_a_singular_matrix_gets_the_smallest_rung_that_works(dtype):
    x = np.repeat(np.linspace(0, 1, 15), 2)
    K = jnp.asarray(7.0 * np.exp(-0.5 * (x[:, None] - x[None, :]) ** 2), dtype)
    L, jitter, status = jax.jit(linalg.safe_cholesky)(K)
    assert status == Status.OK
    rung = float(jitter) / 7.0
    first, last = (1e-12, 1e-6) if dtype == jnp.float64 else (1e-6, 1e-3)
    assert 0.99 * first < rung < 1.01 * last
    assert abs(np.log10(rung) - round(np.log10(rung))) < 1e-3
    np.testing.assert_allclose(
        L @ L.T, K + jitter * np.eye(30), atol=1e-5 if dtype == jnp.float32 else 1e-13 * 7
    )
    if rung > 1.5 * first:  # the rung below must have failed
        assert np.isnan(jnp.linalg.cholesky(K + 0.1 * jitter * jnp.eye(30, dtype=dtype))).any()


@pytest.mark.f32
def test_every_rung_of_the_ladder_is_tried_in_turn(dtype):
    """A mean diagonal of 1 and an eigenvalue between two rungs below zero: the next rung is the first that works."""
    first, last = (-12, -6) if dtype == jnp.float64 else (-6, -3)
    factor = jax.jit(linalg.safe_cholesky)
    for power in range(first, last + 1):
        below = 0.3 * 10.0**power
        K = jnp.asarray(np.diag([*[10.0 / 9] * 9, -below]), dtype)
        _, jitter, status = factor(K)
        assert status == Status.OK
        np.testing.assert_allclose(jitter, 10.0**power, rtol=1e-3)
    assert factor(jnp.asarray(np.diag([*[10.0 / 9] * 9, -3.0 * 10.0**last]), dtype))[2] == (
        Status.NOT_POSITIVE_DEFINITE
    )


@pytest.mark.f32
def test_failures_are_a_status_and_nan_never_an_exception(dtype):
    indefinite = jnp.diag(jnp.asarray([1.0, -1.0, 2.0], dtype))
    L, _, status = jax.jit(linalg.safe_cholesky)(indefinite)
    assert status == Status.NOT_POSITIVE_DEFINITE
    assert np.isnan(L).all()
    factor = jax.jit(linalg.safe_cholesky)
    for bad in (jnp.nan, jnp.inf):
        L, _, status = factor(jnp.eye(3, dtype=dtype).at[2, 1].set(bad).at[1, 2].set(bad))
        assert status == Status.NON_FINITE
        assert np.isnan(L).all()
    out = jax.jit(linalg.spd_inverse)(indefinite, jnp.ones(3, dtype))
    assert np.isnan(out.inverse).all()
    assert np.isnan(out.log_det)
    gradient = jax.jit(jax.grad(lambda K: linalg.logdet_quad(K, jnp.ones(3, dtype)).log_det))(indefinite)
    assert np.isnan(gradient).all()


def test_one_failure_in_a_batch_leaves_the_others_alone():
    good, bad = spd(4, jnp.float64), -jnp.eye(4)
    L, jitter, status = jax.vmap(linalg.safe_cholesky)(jnp.stack([good, bad]))
    np.testing.assert_allclose(L[0], np.linalg.cholesky(np.asarray(good)), rtol=1e-12, atol=1e-12)
    assert np.isnan(L[1]).all()
    assert jitter[0] == 0
    assert status.tolist() == [Status.OK, Status.NOT_POSITIVE_DEFINITE]


@pytest.mark.f32
@pytest.mark.parametrize("n", [1, 7, 110])
def test_inverse_from_cholesky(n, dtype):
    K = spd(n, dtype, condition=50.0)
    L = jnp.linalg.cholesky(K)
    exact = np.linalg.inv(np.asarray(K, np.float64))
    for inverse in (jax.jit(linalg.inverse_from_cholesky)(L), jax.jit(linalg._inverse_by_solve)(L)):
        np.testing.assert_allclose(inverse, exact, rtol=0, atol=tolerance(dtype, 1e-13, 1e-4))
        np.testing.assert_array_equal(inverse, inverse.T)


def test_inverse_does_not_read_above_the_diagonal_and_keeps_nan():
    L = jnp.linalg.cholesky(spd(60, jnp.float64))
    dirty = L + jnp.triu(jnp.full((60, 60), 9.0), 1)
    np.testing.assert_array_equal(linalg.inverse_from_cholesky(dirty), linalg.inverse_from_cholesky(L))
    assert np.isnan(linalg.inverse_from_cholesky(L.at[:].set(jnp.nan))).all()


def test_inverse_of_a_nearly_singular_matrix_is_as_good_as_its_condition_allows():
    x = np.linspace(0, 3, 100)
    K = np.exp(-0.5 * (x[:, None] - x[None, :]) ** 2) + 1e-9 * np.eye(100)  # condition 4e10
    exact = inverse_in_long_double(K)
    ours = linalg.spd_inverse(jnp.asarray(K), jnp.ones(100))
    assert ours.jitter == 0
    error = np.abs(np.asarray(ours.inverse) - exact).max() / np.abs(exact).max()
    reference = np.abs(np.linalg.inv(K) - exact).max() / np.abs(exact).max()
    assert error < max(4 * reference, 1e-6)
    assert error < 1e-4  # condition times rounding is 1e-5


def inverse_in_long_double(K):
    """Gauss-Jordan without pivoting (the matrix is positive definite) in extended precision."""
    A = np.asarray(K, np.longdouble)
    B = np.eye(len(A), dtype=np.longdouble)
    A = A.copy()
    for i in range(len(A)):
        pivot = A[i, i]
        A[i], B[i] = A[i] / pivot, B[i] / pivot
        for j in range(len(A)):
            if j != i:
                factor = A[j, i]
                A[j], B[j] = A[j] - factor * A[i], B[j] - factor * B[i]
    return np.asarray(B, np.float64)


def generic(K, y):
    """What the rules must agree with: autodiff through JAX's own Cholesky."""
    L = jnp.linalg.cholesky(K)
    half = jax.scipy.linalg.solve_triangular(L, y, lower=True)
    alpha = jax.scipy.linalg.cho_solve((L, True), y)
    return (
        L,
        jax.scipy.linalg.cho_solve((L, True), jnp.eye(len(y))),
        alpha,
        2 * jnp.sum(jnp.log(jnp.diag(L))),
        half @ half,
    )


def scalar_of(parts, weights):
    return sum(jnp.sum(part * weight) for part, weight in zip(parts, weights, strict=True))


def test_every_rule_agrees_with_autodiff_to_second_order():
    rng = np.random.default_rng(1)
    n = 9
    K0, direction, y = spd(n, jnp.float64, condition=20.0), symmetric(rng, n), jnp.asarray(rng.normal(size=n))
    other = symmetric(rng, n)
    weights = [jnp.asarray(rng.normal(size=s)) for s in ((n, n), (n, n), (n,), (), ())]

    def build(t):
        return K0 + t[0] * direction + t[1] ** 2 * other, y * (1.0 + t[2])

    def ours(t):
        K, b = build(t)
        L, _, _ = linalg.safe_cholesky(K)
        known, both = linalg.spd_inverse(K, b), linalg.logdet_quad(K, b)
        parts = (L + known.chol, linalg.inverse_from_cholesky(L) + known.inverse, known.solution)
        return scalar_of((*parts, known.log_det + both.log_det, both.quad), weights)

    def expected(t):
        L, inverse, alpha, log_det, quad = generic(*build(t))
        return scalar_of((2 * L, 2 * inverse, alpha, 2 * log_det, quad), weights)

    t = jnp.asarray([0.05, 0.2, 0.3])
    value, gradient, hessian = jax.jit(
        lambda t: (expected(t), jax.grad(expected)(t), jax.hessian(expected)(t))
    )(t)
    ours_value, backward = jax.jit(jax.value_and_grad(ours))(t)
    np.testing.assert_allclose(ours_value, value, rtol=1e-11)
    np.testing.assert_allclose(backward, gradient, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(jax.grad(ours)))(t), hessian, rtol=1e-8, atol=1e-8)


def test_the_derivative_includes_the_jitter_that_follows_the_mean_diagonal():
    x = np.repeat(np.linspace(0, 1, 5), 2)
    base = jnp.asarray(np.exp(-0.5 * (x[:, None] - x[None, :]) ** 2 / 0.01))
    y = jnp.asarray(np.sin(7 * x))
    relative = float(linalg.safe_cholesky(base)[1])
    assert relative > 0

    def scaled(t):  # A(t) = t (K + c I): log det has derivative N / t, quad − quad / t, the jitter c
        return linalg.logdet_quad(t * base, y)

    out, tangent = jax.jit(lambda t: jax.jvp(scaled, (t,), (jnp.ones(()),)))(jnp.asarray(2.0))
    np.testing.assert_allclose(out.jitter, 2 * relative, rtol=1e-12)
    np.testing.assert_allclose(tangent.log_det, 10 / 2, rtol=1e-3)
    np.testing.assert_allclose(tangent.quad, -out.quad / 2, rtol=1e-3)
    np.testing.assert_allclose(tangent.jitter, relative, rtol=1e-12)
    L, dL = jax.jit(lambda t: jax.jvp(lambda t: linalg.safe_cholesky(t * base)[0], (t,), (t / 2,)))(
        jnp.asarray(2.0)
    )
    np.testing.assert_allclose(dL, L / 4, atol=1e-3 * float(jnp.abs(L).max()))
    no_jitter_rule = float(jnp.sum(linalg.spd_inverse(2 * base, y).inverse * base))
    assert abs(no_jitter_rule - 5) > 1  # leaving the jitter out would be far off


def test_logdet_quad_value_costs_no_inverse_and_vmaps_under_grad():
    K, y = spd(6, jnp.float64), jnp.arange(6.0)
    stack = jnp.stack([K, 2 * K])
    gradients = jax.jit(jax.vmap(jax.grad(lambda K: linalg.logdet_quad(K, y).quad)))(stack)
    np.testing.assert_allclose(gradients[0], -np.outer(*[np.linalg.solve(K, y)] * 2), rtol=1e-9)
    np.testing.assert_allclose(gradients[1], gradients[0] / 4, rtol=1e-9)
    value = jax.jit(lambda K: linalg.logdet_quad(K, y)).lower(K).as_text()
    assert value.count("dot_general") == 0


def test_solves():
    K = spd(8, jnp.float64)
    L, b = jnp.linalg.cholesky(K), jnp.arange(24.0).reshape(8, 3)
    np.testing.assert_allclose(linalg.cholesky_solve(L, b), np.linalg.solve(K, b), rtol=1e-9)
    np.testing.assert_allclose(linalg.cholesky_solve(L, b[:, 0]), np.linalg.solve(K, b[:, 0]), rtol=1e-9)
    np.testing.assert_allclose(L.T @ linalg.triangular_solve(L, b, transpose=True), b, atol=1e-9)
    np.testing.assert_allclose(linalg.log_det_from_cholesky(L), np.linalg.slogdet(K)[1], rtol=1e-12)
    np.testing.assert_array_equal(linalg.add_to_diagonal(K, b[:, 0]), K + jnp.diag(b[:, 0]))
