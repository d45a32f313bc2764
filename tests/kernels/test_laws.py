"""Laws that every kernel obeys, by table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.kernels import White
from probinfer.kernels.base import check_inputs
from tests.kernels import cases


@pytest.fixture(params=cases.NAMES)
def kernel(request, dtype):
    return cases.make(dtype)[request.param]


def close(actual, expected, dtype, double=1e-12, single=2e-5):
    rtol = double if dtype == jnp.float64 else single
    scale = float(np.abs(np.asarray(expected, np.float64)).max()) if np.size(expected) else 1.0
    np.testing.assert_allclose(
        np.asarray(actual), np.asarray(expected), rtol=rtol, atol=rtol * max(scale, 1e-3)
    )


@jax.jit
def everything(kernel, X, Z):
    return (
        kernel.gram(X),
        kernel.gram(X, Z),
        kernel.diag(X),
        jax.vmap(jax.vmap(kernel.evaluate, (None, 0)), (0, None))(X, Z),
    )


@pytest.mark.f32
def test_gram_diag_and_evaluate_equal_the_formula(kernel, dtype):
    X, Z = cases.inputs(dtype), cases.inputs(dtype, n=5, seed=1)
    gram, cross, diag, pairs = everything(kernel, X, Z)
    assert {a.dtype for a in (gram, cross, diag, pairs)} == {jnp.dtype(dtype)}
    x, z = np.asarray(X, np.float64), np.asarray(Z, np.float64)
    close(
        gram, [[cases.oracle(kernel, a, b, i == j) for j, b in enumerate(x)] for i, a in enumerate(x)], dtype
    )
    close(cross, [[cases.oracle(kernel, a, b, False) for b in z] for a in x], dtype)
    close(pairs, cross, dtype)
    close(diag, np.diagonal(gram), dtype)
    close(gram, gram.T, dtype, double=1e-15, single=5e-7)
    assert np.linalg.eigvalsh(np.asarray(gram, np.float64)).min() > (
        -1e-12 if dtype == jnp.float64 else -1e-5
    )


@jax.jit
def both_contractions(kernel, X, G):
    _, pullback = jax.vjp(lambda kernel, X: kernel.gram(X), kernel, X)
    return kernel.contract(X, G), pullback(G)


def weights(n, dtype):
    G = np.random.default_rng(3).normal(size=(n, n))
    return jnp.asarray(G + G.T, dtype)


@pytest.mark.f32
def test_contract_is_the_gradient_of_the_gram(kernel, dtype):
    X = cases.inputs(dtype)
    contracted, expected = both_contractions(kernel, X, weights(7, dtype))
    assert jax.tree.structure(contracted) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(contracted), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        close(a, b, dtype, single=2e-4)
    assert jax.tree.structure(contracted[0]) == jax.tree.structure(kernel)


@pytest.mark.parametrize("name", cases.SIMPLE)
def test_gram_gradient_agrees_with_finite_differences(name):
    kernel = cases.make(jnp.float64)[name]
    X, G = cases.inputs(jnp.float64).at[4].add(0.3), weights(7, jnp.float64)
    leaves, structure = jax.tree.flatten((kernel, X))
    rng = np.random.default_rng(5)
    direction = [jnp.asarray(rng.normal(size=leaf.shape)) for leaf in leaves]

    @jax.jit
    def along(t):
        moved, X = jax.tree.unflatten(
            structure, [leaf + t * d for leaf, d in zip(leaves, direction, strict=True)]
        )
        return jnp.sum(G * moved.gram(X))

    h = 1e-4
    difference = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    np.testing.assert_allclose(jax.grad(along)(0.0), difference, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["rational_quadratic", "white", "product", "warped"])
def test_contract_may_be_differentiated(name):
    kernel = cases.make(jnp.float64)[name]
    X, G = cases.inputs(jnp.float64), weights(7, jnp.float64)
    leaves, structure = jax.tree.flatten((kernel, X))
    direction = [jnp.full(leaf.shape, 0.7) for leaf in leaves]

    def along(by):
        def total(t):
            moved, X = jax.tree.unflatten(
                structure, [a + t * d for a, d in zip(leaves, direction, strict=True)]
            )
            gradient = by(moved, X)
            return sum(jnp.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), direction, strict=True))

        return jax.jit(jax.grad(total))(0.0)

    actual = along(lambda kernel, X: kernel.contract(X, G))
    expected = along(lambda kernel, X: jax.vjp(lambda k, X: k.gram(X), kernel, X)[1](G))
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.f32
def test_a_kernel_is_a_pytree_rebuilt_around_anything(kernel, dtype):
    leaves, structure = jax.tree.flatten(kernel)
    placeholders = jax.tree.unflatten(structure, [object() for _ in leaves])
    assert jax.tree.structure(placeholders) == structure
    X = cases.inputs(dtype)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), kernel)
    grams = jax.jit(jax.vmap(lambda kernel: kernel.gram(X)))(stacked)
    close(grams[0], everything(kernel, X, cases.inputs(dtype, n=5, seed=1))[0], dtype)
    assert len(jax.tree_util.tree_flatten_with_path(kernel)[0]) == len(leaves)


def test_new_values_trace_nothing(kernel, count_compiles):
    X, G = cases.inputs(jnp.float64), weights(7, jnp.float64)
    jax.block_until_ready(both_contractions(kernel, X, G))
    rebuilt = jax.tree.map(lambda leaf: leaf * 1.5, kernel)
    moved = X + 1.0
    with count_compiles() as counter:
        jax.block_until_ready(both_contractions(rebuilt, moved, G))
    assert counter.count == 0


@pytest.mark.f32
def test_parameters_follow_the_dtype_of_the_inputs(kernel):
    X = cases.inputs(jnp.float32)
    gram, cross, diag, pair = jax.eval_shape(
        lambda kernel: (kernel.gram(X), kernel.gram(X, X), kernel.diag(X), kernel.evaluate(X[0], X[1])),
        kernel,
    )
    assert {a.dtype for a in (gram, cross, diag, pair)} == {jnp.dtype(jnp.float32)}


def test_bad_inputs_are_refused():
    with pytest.raises(TypeError, match="X must be floating point"):
        check_inputs(jnp.ones((3, 3), int))
    with pytest.raises(ValueError, match="for one column"):
        check_inputs(jnp.ones(3))
    with pytest.raises(ValueError, match="same number of columns"):
        check_inputs(jnp.ones((3, 3)), jnp.ones((3, 2)))


def test_white_noise_is_independent_between_sets():
    X = cases.inputs(jnp.float64)
    np.testing.assert_array_equal(White(0.3).gram(X), 0.3 * np.eye(7))
    np.testing.assert_array_equal(White(0.3).gram(X, X), 0.0)
