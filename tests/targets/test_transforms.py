"""Laws of the bijector trees, a row per NumPyro constraint, against autodiff; and every refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ExpTransform

from probinfer.core.binding import LogDensity
from probinfer.targets import transforms

# name: constraint, shape of the unconstrained leaf, coordinates that chart the constrained set
UPPER = np.triu_indices(3, 1)
LOWER = np.tril_indices(3)
STRICT = np.tril_indices(3, -1)
CHARTS = {
    "real": (constraints.real, (2, 3), jnp.ravel),
    "real_vector": (constraints.real_vector, (3,), jnp.ravel),
    "positive": (constraints.positive, (3,), jnp.ravel),
    "nonnegative": (constraints.nonnegative, (2, 2), jnp.ravel),
    "softplus_positive": (constraints.softplus_positive, (3,), jnp.ravel),
    "greater_than": (constraints.greater_than(1.5), (3,), jnp.ravel),
    "less_than": (constraints.less_than(-2.0), (3,), jnp.ravel),
    "interval": (constraints.interval(-1.0, 3.0), (3,), jnp.ravel),
    "interval by entry": (constraints.interval(np.array([0.0, -5.0]), np.array([1.0, 5.0])), (2,), jnp.ravel),
    "unit_interval": (constraints.unit_interval, (), jnp.ravel),
    "circular": (constraints.circular, (2,), jnp.ravel),
    "independent": (constraints.independent(constraints.positive, 1), (2, 3), jnp.ravel),
    "ordered_vector": (constraints.ordered_vector, (4,), jnp.ravel),
    "positive_ordered_vector": (constraints.positive_ordered_vector, (3,), jnp.ravel),
    "simplex": (constraints.simplex, (3,), lambda v: v[:-1]),
    "corr_cholesky": (constraints.corr_cholesky, (3,), lambda v: v[STRICT]),
    "corr_matrix": (constraints.corr_matrix, (3,), lambda v: v[STRICT]),
    "lower_cholesky": (constraints.lower_cholesky, (6,), lambda v: v[LOWER]),
    "scaled_unit_lower_cholesky": (constraints.scaled_unit_lower_cholesky, (6,), lambda v: v[LOWER]),
    "softplus_lower_cholesky": (constraints.softplus_lower_cholesky, (6,), lambda v: v[LOWER]),
    "positive_definite": (constraints.positive_definite, (6,), lambda v: v[LOWER]),
}


def example_position(shape, dtype):
    return jnp.asarray(np.random.default_rng(3).normal(size=shape), dtype)


@pytest.mark.f32
@pytest.mark.parametrize("name", CHARTS)
def test_inverse_undoes_forward(name, dtype):
    constraint, shape, _ = CHARTS[name]
    leaf = transforms.with_dtype(transforms.bijector(constraint), dtype)
    z = example_position(shape, dtype)
    value = transforms.forward(leaf, z)
    assert value.dtype == dtype
    back = transforms.inverse(leaf, value)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, z, atol=1e-10 if dtype == jnp.float64 else 1e-4)


@pytest.mark.parametrize("name", CHARTS)
def test_log_det_is_that_of_autodiff(name, dtype):
    constraint, shape, chart = CHARTS[name]
    leaf = transforms.bijector(constraint)
    z = example_position(shape, dtype)
    jacobian = jax.jacfwd(lambda flat: chart(leaf(flat.reshape(shape))))(z.ravel())
    expected = np.linalg.slogdet(np.asarray(jacobian))[1]
    np.testing.assert_allclose(transforms.log_abs_det_jacobian(leaf, z), expected, rtol=1e-10, atol=1e-12)


def test_zero_sum_is_an_isometry(dtype):
    leaf = transforms.bijector(constraints.zero_sum(1))
    z = example_position((4,), dtype)
    jacobian = jax.jacfwd(leaf)(z)
    np.testing.assert_allclose(jacobian.T @ jacobian, np.eye(4), atol=1e-12)
    assert transforms.log_abs_det_jacobian(leaf, z) == 0.0
    np.testing.assert_allclose(transforms.inverse(leaf, leaf(z)), z, atol=1e-12)


@pytest.fixture
def tree(dtype):
    """A tree whose leaves change shape, with its constraints and a position."""
    bounds = {
        "scale": constraints.positive,
        "mixture": (constraints.simplex, constraints.corr_cholesky),
        "slope": None,
    }
    example = {
        "scale": jnp.ones(2, dtype),
        "mixture": (jnp.ones(3, dtype) / 3, jnp.eye(3, dtype=dtype)),
        "slope": jnp.zeros((), dtype),
    }
    position = {
        "scale": example_position((2,), dtype),
        "mixture": (example_position((2,), dtype), example_position((3,), dtype)),
        "slope": example_position((), dtype),
    }
    return bounds, example, position


@pytest.mark.f32
def test_trees_change_shapes_and_keep_their_structure(tree):
    bounds, example, position = tree
    bijectors = transforms.from_constraints(bounds, example)
    values = transforms.forward(bijectors, position)
    assert jax.tree.map(jnp.shape, values) == jax.tree.map(jnp.shape, example)
    back = transforms.inverse(bijectors, values)
    for z, expected in zip(jax.tree.leaves(back), jax.tree.leaves(position), strict=True):
        np.testing.assert_allclose(z, expected, atol=1e-4 if z.dtype == jnp.float32 else 1e-10)
    assert transforms.leaf_names(values) == ("mixture.0", "mixture.1", "scale", "slope")


@pytest.mark.f32
def test_pullback_adds_the_summed_jacobian(tree, dtype):
    bounds, example, position = tree
    bijectors = transforms.from_constraints(bounds, example)

    def log_density(values):
        return -jnp.sum(values["scale"]) + values["slope"] * values["mixture"][0][0]

    pulled = transforms.pullback(log_density, bijectors)
    parts = [
        leaf.log_abs_det_jacobian(z, leaf(z)).sum()
        for leaf, z in zip(transforms.leaves(bijectors), jax.tree.leaves(position), strict=True)
    ]
    expected = log_density(transforms.forward(bijectors, position)) + sum(parts)
    value = pulled(position)
    assert value.shape == ()
    assert value.dtype == dtype
    np.testing.assert_allclose(value, expected, rtol=1e-5 if dtype == jnp.float32 else 1e-12)


def test_pullback_of_a_lognormal_is_a_normal(dtype):
    prior = dist.LogNormal(0.3, 1.7)
    pulled = transforms.pullback(prior.log_prob, transforms.from_priors(prior))
    z = jnp.linspace(-4, 4, 9, dtype=dtype)
    np.testing.assert_allclose(jax.vmap(pulled)(z), dist.Normal(0.3, 1.7).log_prob(z), rtol=1e-12)


def test_pullback_jits_and_does_not_trace_again_with_new_bounds(count_compiles, dtype):
    def log_density(value):
        return -value * value

    run = jax.jit(lambda fn, z: fn(z))
    z = jnp.asarray(0.3, dtype)

    def pulled(upper):
        leaf = transforms.with_dtype(transforms.bijector(constraints.interval(0.0, upper)), dtype)
        return transforms.pullback(log_density, leaf)

    first, second = pulled(2.0), pulled(5.0)
    run(first, z)
    with count_compiles() as compiles:
        value = run(second, z)
    assert compiles.count == 0
    np.testing.assert_allclose(value, second(z), rtol=1e-12)
    np.testing.assert_allclose(
        jax.vmap(second)(jnp.stack([z, z + 1])), [second(z), second(z + 1)], rtol=1e-12
    )


def test_the_log_density_may_carry_data(dtype):
    def log_density(weights, value):
        return jnp.sum(weights * value)

    weights = jnp.asarray([1.0, 2.0], dtype)
    pulled = transforms.pullback(LogDensity(log_density, weights), transforms.bijector(constraints.positive))
    z = jnp.asarray([0.1, -0.4], dtype)
    np.testing.assert_allclose(pulled(z), jnp.sum(weights * jnp.exp(z)) + jnp.sum(z), rtol=1e-12)


def test_priors_give_their_supports(dtype):
    priors = {
        "rate": dist.Gamma(2.0, 1.0),
        "means": dist.Normal(0, 1).expand([2]),
        "shares": dist.Dirichlet(jnp.ones(3)),
    }
    bijectors = transforms.from_priors(priors)
    position = {"rate": jnp.zeros(()), "means": jnp.zeros(2), "shares": jnp.zeros(2)}
    values = transforms.forward(bijectors, position)
    assert transforms.leaf_names(priors) == ("means", "rate", "shares")
    np.testing.assert_allclose(values["rate"], 1.0)
    np.testing.assert_allclose(values["shares"], 1 / 3, rtol=1e-6)


def test_one_constraint_stands_for_a_branch(dtype):
    example = {
        "a": {"x": jnp.ones(2, dtype), "y": jnp.ones((), dtype), "none": None},
        "b": jnp.ones((), dtype),
    }
    bijectors = transforms.from_constraints({"a": constraints.positive, "b": None}, example)
    position = transforms.inverse(bijectors, example)
    np.testing.assert_array_equal(position["a"]["x"], 0.0)
    np.testing.assert_array_equal(position["b"], 1.0)
    everywhere = transforms.from_constraints(None, example)
    np.testing.assert_array_equal(transforms.forward(everywhere, example)["a"]["y"], 1.0)


@pytest.mark.f32
@pytest.mark.parametrize(
    ("constraint", "value", "message"),
    [
        (constraints.positive, [1.0, -2.0], r"leaf 'x' is outside the support .*-2\.0 at index \(1,\)"),
        (constraints.positive, [1.0, 0.0], r"leaf 'x' lies on the boundary .*0\.0 at index \(1,\)"),
        (constraints.interval(0.0, 2.0), 2.5, r"leaf 'x' is outside the support Interval"),
        (constraints.unit_interval, 1.0, r"leaf 'x' lies on the boundary"),
        (constraints.simplex, [0.5, 0.6], r"leaf 'x' is outside the support Simplex"),
        (constraints.simplex, [1.0, 0.0, 0.0], r"leaf 'x' lies on the boundary"),
        (
            constraints.lower_cholesky,
            [[1.0, 0.2], [0.2, 1.5]],
            r"leaf 'x' is outside the support LowerCholesky",
        ),
        (constraints.ordered_vector, [1.0, 0.5], r"leaf 'x' is outside the support OrderedVector"),
        (constraints.real, [1.0, float("nan")], r"leaf 'x' is NaN"),
        (constraints.zero_sum(1), [1.0, 0.5], r"leaf 'x' is outside the support ZeroSum"),
        (constraints.simplex, 0.5, r"leaf 'x' of shape \(\) does not fit its support"),
    ],
)
def test_values_outside_their_support_are_refused(constraint, value, message, dtype):
    value = jnp.asarray(value, dtype)
    bijectors = transforms.from_constraints({"x": constraint}, {"x": value})
    with pytest.raises(ValueError, match=message):
        transforms.inverse(bijectors, {"x": value})


@pytest.mark.f32
def test_values_close_to_a_boundary_pass(dtype):
    tiny = 4 * float(jnp.finfo(dtype).tiny)
    leaf = transforms.bijector(constraints.positive)
    np.testing.assert_allclose(leaf(transforms.inverse(leaf, jnp.asarray(tiny, dtype))), tiny, rtol=1e-3)
    unit = transforms.bijector(constraints.unit_interval)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(unit(transforms.inverse(unit, jnp.asarray(1 - eps, dtype))), 1 - eps, rtol=eps)


def test_under_jit_values_are_not_checked(dtype):
    leaf = transforms.bijector(constraints.positive)
    z = jax.jit(lambda value: transforms.inverse(leaf, value))(jnp.asarray([0.0, -1.0], dtype))
    assert z[0] == -jnp.inf
    assert jnp.isnan(z[1])


@pytest.mark.f32
def test_infinite_positions_become_finite_and_nan_stays(dtype):
    z = transforms.finite(jnp.asarray([-jnp.inf, jnp.inf, jnp.nan, 0.5], dtype))
    assert jnp.exp(z[0]) > 0
    assert jnp.isfinite(jnp.exp(z[1]))
    assert jnp.isnan(z[2])
    assert z[3] == 0.5


def test_bad_trees_are_refused(dtype):
    one = jnp.ones((), dtype)
    with pytest.raises(TypeError, match=r"leaf 'a\.b': expected a numpyro constraint"):
        transforms.from_constraints({"a": {"b": "positive"}}, {"a": {"b": one}})
    with pytest.raises(ValueError, match="structure of the example"):
        transforms.from_constraints({"a": None}, {"b": one})
    with pytest.raises(ValueError, match=r"leaf 'k': the support .* is discrete"):
        transforms.from_priors({"k": dist.Poisson(3.0)})
    with pytest.raises(ValueError, match="no bijector"):
        transforms.bijector(constraints.sphere)
    with pytest.raises(TypeError, match="leaf 'k' of the priors must be a numpyro distribution, got float"):
        transforms.from_priors({"k": 3.0})
    with pytest.raises(ValueError, match="the trees differ"):
        transforms.forward({"a": ExpTransform()}, {"b": one})
    with pytest.raises(TypeError, match="leaf 'a' must be floating point"):
        transforms.inverse({"a": ExpTransform()}, {"a": jnp.ones((), int)})
