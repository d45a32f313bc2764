"""Operators, their bad inputs, and kernels of transformed inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from probinfer import kernels as k
from tests.kernels import cases


def test_operators_build_flat_trees():
    a, b, c = k.RBF(), k.Matern12(), k.Linear()
    assert [type(t).__name__ for t in (a + b + c).terms] == ["RBF", "Matern12", "Linear"]
    assert [type(t).__name__ for t in (a * (b * c)).factors] == ["RBF", "Matern12", "Linear"]
    scaled = 3.0 * a
    assert isinstance(scaled, k.Scaled)
    assert float(scaled.variance) == 3.0
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(a + 2.0 * b)[0]]
    assert names == [
        ".terms[0].variance",
        ".terms[0].lengthscale",
        ".terms[1].kernel.variance",
        ".terms[1].kernel.lengthscale",
        ".terms[1].variance",
    ]


def test_bad_compositions_are_refused():
    with pytest.raises(TypeError):
        k.RBF() + 1.0
    with pytest.raises(ValueError, match="at least one kernel"):
        k.Sum(())
    with pytest.raises(ValueError, match="distinct column numbers"):
        k.RBF().on((0, 0))
    with pytest.raises(ValueError, match="distinct column numbers"):
        k.RBF().on((-1,))
    with pytest.raises(ValueError, match="uses column 5"):
        k.RBF().on(5).gram(jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="degree must be an integer"):
        k.Polynomial(degree=0)
    with pytest.raises(TypeError, match="fn must be callable"):
        k.Warped(k.RBF(), 3.0)


def test_a_plain_function_warps_without_parameters():
    kernel = k.Warped(k.RBF(), jnp.log1p)
    X = jnp.abs(cases.inputs(jnp.float64))
    assert len(jax.tree.leaves(kernel)) == 2
    np.testing.assert_allclose(
        jax.jit(lambda kernel: kernel.gram(X))(kernel), k.RBF().gram(jnp.log1p(X)), rtol=1e-14
    )


def apply(graphdef, state, X):
    return nnx.merge(graphdef, state)(X)


def test_a_flax_module_is_a_deep_kernel():
    graphdef, state = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    kernel = k.Warped(k.Matern52(), jax.tree_util.Partial(apply, graphdef, state))
    X, G = cases.inputs(jnp.float64), jnp.eye(7) + 0.1
    (through, dX), (expected, dX_expected) = jax.jit(
        lambda kernel, X: (kernel.contract(X, G), jax.vjp(lambda k, X: k.gram(X), kernel, X)[1](G))
    )(kernel, X)
    for a, b in zip(jax.tree.leaves((through, dX)), jax.tree.leaves((expected, dX_expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # flax's parameters are float32
    assert sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(through.fn)) > 0


def table(parameters, X):
    return X[:, :2] * parameters["scale"] + parameters["counts"]


def test_integer_leaves_have_no_derivative():
    parameters = {"scale": jnp.asarray(1.5), "counts": jnp.asarray([1, 2])}
    kernel = k.Warped(k.RBF(), jax.tree_util.Partial(table, parameters)) + k.White(0.1)
    X, G = cases.inputs(jnp.float64), jnp.eye(7) + 0.1
    through, _ = kernel.contract(X, G)
    counts, scale = jax.tree.leaves(through.terms[0].fn)
    assert counts.dtype == jax.dtypes.float0
    assert np.isfinite(scale)


def test_swapped_arguments_are_named():
    for dims in (k.RBF(), 1.5):
        swapped = object.__new__(k.ActiveDims)  # the checks of annotations in tests would speak first
        object.__setattr__(swapped, "dims", dims)
        with pytest.raises(TypeError, match=r"ActiveDims\(kernel, dims\)"):
            swapped.__post_init__()
    with pytest.raises(TypeError, match="variance must be a positive number"):
        k.Scaled(2.0, k.RBF())
