"""Matrices and marginals of sites against dense inverses, and their derivatives against those of plain formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.core.status import Status
from probinfer.gp.approximation.gaussian_marginals import marginals
from probinfer.gp.structure.dense import negative_factor, positive_factor, posterior_matrices
from tests.reference import gp_sites as oracle

N = 6
INPUTS = np.random.default_rng(3).uniform(0, 6, N)
K = 1.7 * np.exp(-np.abs(INPUTS[:, None] - INPUTS[None, :]))
PRIOR_MEAN = np.linspace(-2.0, 1.5, N)
LAM1 = np.array([0.7, -1.2, 0.3, 2.0, -0.4, 0.0])
SITES = {
    "moderate": np.array([0.5, 1.2, 0.1, 3.0, 0.7, 0.9]),
    "zero": np.zeros(N),
    "some zero": np.array([0.0, 2.0, 0.0, 0.5, 1e-300, 0.0]),
    "twelve decades": np.array([1e-12, 1e4, 1e-6, 1.0, 1e-3, 1e2]),
    "strong": np.full(N, 1e4),
    "weak": np.full(N, 1e-12),
    "negative": np.array([0.5, -0.2, 0.1, 3.0, -0.05, 0.9]),
    "all negative": np.full(N, -0.1),
}
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
fast_matrices = jit(posterior_matrices, static_argnums=2)
fast_marginals = jit(marginals, static_argnums=4)


def dense(lam2):
    """Σ, R, M and log |I + KΛ| by Gaussian elimination; np.diag(lam2) may have any sign."""
    shrinkage = np.linalg.inv(np.eye(N) + K * lam2)
    covariance = shrinkage @ K
    reduction = lam2[:, None] * shrinkage
    return covariance, reduction, shrinkage, np.linalg.slogdet(np.eye(N) + K * lam2)[1]


def cases():
    return [
        (name, signed)
        for name, lam2 in SITES.items()
        for signed in (False, True)
        if signed or lam2.min() >= 0
    ]


@pytest.mark.f32
@pytest.mark.parametrize(("name", "signed"), cases())
def test_matrices_are_those_of_dense_inverses(name, signed, dtype):
    lam2 = SITES[name]
    got = fast_matrices(jnp.asarray(K, dtype), jnp.asarray(lam2, dtype), signed)
    wanted = dense(lam2)
    assert got.status == Status.OK
    tolerance = 1e-11 if dtype == jnp.float64 else 1e-5
    for matrix, exact in zip(got[:3], wanted[:3]):
        assert matrix.dtype == dtype
        smallest = 1e-18 + tolerance * np.abs(exact).max()  # a site of zero is replaced by about tiny^½
        np.testing.assert_allclose(matrix, exact, rtol=10 * tolerance, atol=smallest)
    # A small log determinant is a difference of logarithms near one: absolute digits.
    np.testing.assert_allclose(got.log_det, wanted[3], rtol=tolerance, atol=tolerance)


@pytest.mark.f32
@pytest.mark.parametrize("name", ["moderate", "twelve decades", "strong", "weak", "zero"])
def test_variances_keep_their_digits(name, dtype):
    """diag Σ and diag R to relative precision, where Σ is 1e-4 and where R is 1e-12."""
    lam2 = SITES[name]
    got = fast_matrices(jnp.asarray(K, dtype), jnp.asarray(lam2, dtype), False)
    covariance, reduction, _, _ = dense(np.maximum(lam2, 1e-300))
    rtol = 1e-12 if dtype == jnp.float64 else 1e-5
    np.testing.assert_allclose(jnp.diagonal(got.covariance), np.diag(covariance), rtol=rtol)
    if name != "zero":
        np.testing.assert_allclose(jnp.diagonal(got.reduction), np.diag(reduction), rtol=rtol)


@pytest.mark.f32
@pytest.mark.parametrize(("name", "signed"), cases())
def test_marginals_with_a_prior_mean(name, signed, dtype):
    lam2 = SITES[name]
    arguments = [jnp.asarray(value, dtype) for value in (K, PRIOR_MEAN, LAM1, lam2)]
    got = fast_marginals(*arguments, signed)
    mean, covariance, log_z = oracle.condition(K, PRIOR_MEAN, LAM1, lam2)
    assert got.status == Status.OK
    tolerance = 1e-10 if dtype == jnp.float64 else 1e-4
    np.testing.assert_allclose(got.mean, mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(got.variance, np.diag(covariance), rtol=tolerance)
    alpha = np.linalg.solve(K, mean - PRIOR_MEAN)
    np.testing.assert_allclose(got.alpha, alpha, rtol=tolerance, atol=tolerance * np.abs(alpha).max())
    np.testing.assert_allclose(got.log_z, log_z, rtol=10 * tolerance)


def test_factors_rebuild_the_posterior():
    """Σ₊ = K − KS(LLᵀ)⁻¹SK and Σ = Σ₊ + Σ₊N(CCᵀ)⁻¹NΣ₊."""
    lam2 = SITES["negative"]
    s, chol = jit(positive_factor)(jnp.asarray(K), np.maximum(lam2, 0))
    half = np.linalg.solve(chol, np.asarray(s)[:, None] * K)
    positive = K - half.T @ half
    np.testing.assert_allclose(positive, dense(np.maximum(lam2, 0))[0], atol=1e-12)
    n, chol = jit(negative_factor)(jnp.asarray(K), jnp.asarray(lam2))
    half = np.linalg.solve(chol, np.asarray(n)[:, None] * positive)
    np.testing.assert_allclose(positive + half.T @ half, dense(lam2)[0], atol=1e-12)


# Derivatives, in directions of symmetric K

DIRECTIONS = np.random.default_rng(4).normal(size=(2, N, N))
DIRECTIONS = 0.3 * (DIRECTIONS + DIRECTIONS.transpose(0, 2, 1))
WEIGHTS = [np.random.default_rng(5 + i).normal(size=(N, N)) for i in range(3)]


def plain_precision(K, lam2):
    shrinkage = jnp.linalg.inv(jnp.eye(N) + K * lam2)
    log_det = jnp.linalg.slogdet(jnp.eye(N) + K * lam2)[1]
    return shrinkage @ K, lam2[:, None] * shrinkage, shrinkage, log_det


def plain_marginals(K, prior_mean, lam1, lam2):
    covariance, _, _, log_det = plain_precision(K, lam2)
    linear = lam1 - lam2 * prior_mean
    mean = prior_mean + covariance @ linear
    log_z = 0.5 * linear @ covariance @ linear + (lam1 - 0.5 * lam2 * prior_mean) @ prior_mean - 0.5 * log_det
    return mean, jnp.diagonal(covariance), lam1 - lam2 * mean, log_z


def direction(a):
    return jnp.asarray(K) + jnp.tensordot(a, jnp.asarray(DIRECTIONS), 1)


def matrices_projected(matrices):
    projected = [jnp.sum(weight * matrix) for weight, matrix in zip(WEIGHTS, matrices[:3])]
    return sum(projected[1:], projected[0]) + 0.7 * matrices[3]


def marginals_projected(q):
    return jnp.sum(WEIGHTS[0][:3] @ jnp.stack(q[:3], 1)) + 0.7 * q[3]


@functools.cache
def derivative_functions(which):
    """(ours unsigned, ours signed, plain): value, gradient and Hessian in (directions of K, vectors)."""
    if which == "precision":
        functions = [
            lambda x: matrices_projected(posterior_matrices(direction(x["K"]), x["lam2"], False)),
            lambda x: matrices_projected(posterior_matrices(direction(x["K"]), x["lam2"], True)),
            lambda x: matrices_projected(plain_precision(direction(x["K"]), x["lam2"])),
        ]
    else:
        functions = [
            lambda x: marginals_projected(marginals(*unpacked(x), False)),
            lambda x: marginals_projected(marginals(*unpacked(x), True)),
            lambda x: marginals_projected(plain_marginals(*unpacked(x))),
        ]
    return [jit(lambda x, fn=fn: (fn(x), jax.grad(fn)(x), jax.hessian(fn)(x))) for fn in functions]


def unpacked(x):
    return direction(x["K"]), x["prior_mean"], x["lam1"], x["lam2"]


@pytest.mark.parametrize("name", ["moderate", "zero", "twelve decades", "negative"])
@pytest.mark.parametrize("which", ["precision", "marginals"])
def test_derivatives_of_first_and_second_order(which, name):
    lam2 = SITES[name]
    unsigned, signed, plain = derivative_functions(which)
    x = {"K": jnp.zeros(2), "lam2": jnp.asarray(lam2)}
    if which == "marginals":
        x |= {"prior_mean": jnp.asarray(PRIOR_MEAN), "lam1": jnp.asarray(LAM1)}
    wanted = plain(x)
    for fn in (signed,) if lam2.min() < 0 else (signed, unsigned):
        for got, exact in zip(jax.tree.leaves(fn(x)), jax.tree.leaves(wanted)):
            np.testing.assert_allclose(got, exact, rtol=1e-9, atol=1e-10 * (1 + np.abs(exact).max()))


def test_forward_and_reverse_agree_where_only_some_inputs_move():
    """Symbolic zeros: each input alone, by a forward derivative against the gradient."""
    fn = marginals_projected
    x = [jnp.asarray(value) for value in (K, PRIOR_MEAN, LAM1, SITES["negative"])]
    tangents = [jnp.asarray(DIRECTIONS[0]), jnp.ones(N), jnp.linspace(0, 1, N), jnp.linspace(1, 0.5, N)]

    @jit
    def both(x, tangents):
        grads = jax.grad(lambda *x: fn(marginals(*x, True)), argnums=(0, 1, 2, 3))(*x)
        backward = [jnp.sum(g * t) for g, t in zip(grads, tangents)]
        forward = []
        for i, tangent in enumerate(tangents):
            moved = [*x[:i], None, *x[i + 1 :]]
            forward.append(
                jax.jvp(
                    lambda xi, i=i, moved=moved: fn(marginals(*moved[:i], xi, *moved[i + 1 :], True)),
                    (x[i],),
                    (tangent,),
                )[1]
            )
        return jnp.stack(forward), jnp.stack(backward)

    forward, backward = both(x, tangents)
    np.testing.assert_allclose(forward, backward, rtol=1e-11)
    step = 1e-6
    for i, tangent in enumerate(tangents):
        ends = []
        for sign in (1, -1):
            moved = [np.asarray(value) for value in x]
            moved[i] = moved[i] + sign * step * np.asarray(tangent)
            mean, covariance, log_z = oracle.condition(*moved)
            alpha = np.linalg.solve(moved[0], mean - moved[1])
            ends.append(float(fn((mean, np.diag(covariance), alpha, log_z))))
        np.testing.assert_allclose(forward[i], (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-7)


# Failures


@pytest.mark.f32
def test_failures_have_a_status_and_are_nan(dtype):
    gram, ones = jnp.asarray(K, dtype), jnp.ones(N, dtype)
    cases = [
        (gram, -0.1 * ones, False, Status.NOT_POSITIVE_DEFINITE),  # negative, though not allowed
        (gram, -2.0 * ones, True, Status.NOT_POSITIVE_DEFINITE),  # K⁻¹ + Λ is not positive definite
        (gram.at[0, 0].set(jnp.nan), ones, False, Status.NON_FINITE),
        (gram.at[2, 0].set(jnp.inf).at[0, 2].set(jnp.inf), ones, True, Status.NON_FINITE),
        (-gram, ones, False, Status.NOT_POSITIVE_DEFINITE),
    ]
    for covariance, lam2, signed, status in cases:
        matrices = fast_matrices(covariance, lam2, signed)
        assert matrices.status == status
        assert np.isnan(matrices.log_det)
        q = fast_marginals(covariance, 0 * ones, ones, lam2, signed)
        assert q.status == status
        assert np.isnan(q.log_z)


def test_vmap_over_sites():
    batch = jnp.stack([SITES["moderate"], SITES["negative"], -2 * np.ones(N)])
    got = jit(jax.vmap(lambda lam2: posterior_matrices(jnp.asarray(K), lam2, True)))(batch)
    np.testing.assert_array_equal(got.status, [Status.OK, Status.OK, Status.NOT_POSITIVE_DEFINITE])
    for i in (0, 1):
        np.testing.assert_allclose(got.covariance[i], dense(np.asarray(batch[i]))[0], rtol=1e-10, atol=1e-12)
