"""The words of the library: registered classes, algorithms, statuses, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.core import errors
from probinfer.core.algorithms import algorithm, as_partial
from probinfer.core.arguments import check_finite, check_floating
from probinfer.core.status import Status
from probinfer.core.types import field, pytree, strong_array

pytestmark = pytest.mark.f32


@pytree
class Config:
    scale: object
    order: int = field(static=True, default=2)

    def __post_init__(self):
        if not isinstance(self.order, int):
            raise TypeError("order")


def test_a_registered_class_is_a_pytree_with_named_leaves():
    config = Config(jnp.ones(2), order=3)
    paths, structure = jax.tree_util.tree_flatten_with_path(config)
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [".scale"]
    assert jax.tree.unflatten(structure, [5.0]).order == 3
    assert jax.tree.structure(Config(1.0)) != jax.tree.structure(Config(1.0, order=3))


def test_a_registered_class_is_rebuilt_without_init_around_anything():
    structure = jax.tree.structure(Config(1.0))
    placeholder = object()
    assert jax.tree.unflatten(structure, [placeholder]).scale is placeholder
    stacked = jax.vmap(Config)(jnp.arange(3.0))
    assert stacked.scale.shape == (3,)


def test_a_registered_class_is_frozen():
    with pytest.raises(AttributeError):
        Config(1.0).scale = 2.0


def test_field_keeps_constraint_and_default():
    metadata = {f.name: f.metadata for f in Config.__dataclass_fields__.values()}
    assert metadata["order"]["static"]
    assert Config(1.0).order == 2


@pytest.mark.parametrize("value", [1.5, 2, [1, 2], np.float32(3)])
def test_strong_array_makes_numbers_strong(value):
    array = strong_array(value)
    assert not array.aval.weak_type
    assert array.dtype == (jnp.float32 if isinstance(value, np.float32) else jnp.result_type(float))
    assert not strong_array(jnp.asarray(1.0)).aval.weak_type


def test_strong_array_leaves_the_rest_alone():
    marker = object()
    assert strong_array(marker) is marker
    assert strong_array(None) is None
    assert strong_array(True) is True
    assert strong_array(jnp.arange(3)).dtype == jnp.arange(3).dtype


def init_fn(config, position):
    return config.scale * position


def step_fn(config, key, state):
    return state + config.scale, ()


def test_an_algorithm_is_data_around_static_functions():
    first, second = (
        algorithm(init_fn, step_fn, Config(jnp.ones(2))),
        algorithm(init_fn, step_fn, Config(jnp.zeros(2))),
    )
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert len(jax.tree.leaves(first)) == 2  # the array of the config, in init and in step
    assert first.init(3.0).tolist() == [3.0, 3.0]
    assert first.step(None, first.init(3.0))[0].tolist() == [4.0, 4.0]


def test_as_partial_compares_by_content():
    assert jax.tree.structure(as_partial(init_fn)) == jax.tree.structure(as_partial(init_fn))
    assert jax.tree.structure(as_partial(init_fn)) != jax.tree.structure(as_partial(step_fn))
    bound = as_partial(init_fn)
    assert as_partial(bound) is bound


def test_every_status_has_advice_and_larger_is_worse():
    for status in Status:
        assert len(errors.advice(status)) > 10
        assert errors.advice(int(status)) == errors.advice(status)
    assert max(Status) is Status.IMPROPER_DENSITY
    assert min(Status) is Status.OK


def test_numerical_error_carries_its_status():
    error = errors.NumericalError("no", int(jnp.int32(Status.NOT_POSITIVE_DEFINITE)))
    assert error.status is Status.NOT_POSITIVE_DEFINITE
    assert errors.NumericalError("no").status is None


def test_a_missing_extra_names_the_extra():
    assert errors.import_extra("json", "plots").loads("1") == 1
    with pytest.raises(errors.MissingExtraError, match="probinfer\\[plots\\]"):
        errors.import_extra("a_package_that_is_not_there", "plots")


@pytest.mark.parametrize("value", [np.arange(3), np.array([True]), np.array(["a"]), np.array([1j])])
def test_what_is_not_floating_is_refused(value):
    with pytest.raises(TypeError, match=r"X must be floating point.*astype"):
        check_floating("X", value)
    check_floating("X", np.ones(2, np.float32))


def test_what_is_not_finite_is_refused_with_its_places():
    with pytest.raises(ValueError, match=r"y has 2 entries .* at \(1,\), \(2,\);"):
        check_finite("y", jnp.array([0.0, jnp.nan, jnp.inf]))
    with pytest.raises(ValueError, match="and 4 more"):
        check_finite("y", np.full((3, 3), np.nan))
    check_finite("y", np.ones(3))
    jax.jit(lambda y: check_finite("y", y))(jnp.array(jnp.nan))


def test_float64_is_no_advice_where_it_is_in_use(dtype):
    for status in (Status.LINE_SEARCH_STALLED, Status.NOT_POSITIVE_DEFINITE, Status.NON_FINITE):
        assert ("float64" in errors.advice(status)) == (jnp.result_type(float) == jnp.float32)
    assert "proper" in errors.advice(Status.NON_FINITE)


def test_values_in_messages_are_short():
    assert len(errors.shortened(np.zeros((50, 50)))) <= 100
    assert "\n" not in errors.shortened(np.zeros((50, 50)))
    with pytest.raises(TypeError, match=r"leaf 'value' must be .* with \.astype\(float\)$"):
        check_floating("leaf 'value'", np.arange(3))


def test_close_matches():
    assert errors.close_matches("tua", ["mu", "tau"]) == "; did you mean 'tau'?"
    assert errors.close_matches("zzz", ["mu", "tau"]) == "; there is mu, tau"
