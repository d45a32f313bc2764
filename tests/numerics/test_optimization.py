import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from probinfer.core.status import Status
from probinfer.numerics import optimization
from probinfer.running.driver import run_until
from tests.params import quick


def shifted_rosenbrock(offset, x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2) + offset


def rosenbrock(x):
    return shifted_rosenbrock(0.0, x)


def quadratic(scales, x):
    return 0.5 * jnp.sum(scales * (x - 1) ** 2)


def logistic(features, labels, x):
    return jnp.sum(jnp.logaddexp(0, -labels * (features @ x))) + 0.5 * jnp.sum(x**2)


def barrier(x):
    # infinite or NaN outside (0, 1); minimum near 1e-3
    return jnp.sum(1e3 * x - jnp.log(x) - jnp.log(1 - x))


def wrong_gradient(x):
    value = jnp.sum(x**2)
    return 2 * jax.lax.stop_gradient(value) - value


def logistic_data(dtype):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(100, 5)) * [1, 10, 0.1, 1, 1]
    return jnp.asarray(features, dtype), jnp.asarray(np.sign(generator.normal(size=100)), dtype)


def problems(dtype):
    features, labels = logistic_data(dtype)
    scales = jnp.asarray([1e-4, 1e-2, 1.0, 1e2, 1e4], dtype)
    return {
        "rosenbrock": (rosenbrock, jnp.full(3, -1.2, dtype)),
        "quadratic": (jax.tree_util.Partial(quadratic, scales), jnp.zeros(5, dtype)),
        "logistic": (jax.tree_util.Partial(logistic, features, labels), jnp.zeros(5, dtype)),
        "barrier": (barrier, jnp.full(3, 0.5, dtype)),
    }


def scipy_minimum(name, fn, start, dtype):
    if name == "barrier":  # SciPy's L-BFGS-B does not survive the infinite trial values
        line = scipy.optimize.minimize_scalar(
            lambda x: 1e3 * x - np.log(x) - np.log1p(-x), bounds=(1e-5, 0.1), options={"xatol": 1e-12}
        )
        return 3 * line.fun, np.inf
    value_and_grad = jax.jit(jax.value_and_grad(fn))
    result = scipy.optimize.minimize(
        lambda x: [np.asarray(v, float) for v in value_and_grad(jnp.asarray(x, dtype))],
        np.asarray(start, float),
        jac=True,
        method="L-BFGS-B",
        options={"gtol": 1e-8, "ftol": 1e-15, "maxiter": 2000},
    )
    return result.fun, result.nfev


@pytest.mark.f32
@pytest.mark.parametrize("name", ["rosenbrock", "quadratic", "logistic", "barrier"])
@pytest.mark.usefixtures("optimized")
def test_reaches_the_minimum_scipy_reaches_at_its_cost(name, dtype):
    fn, start = problems(dtype)[name]
    result = optimization.minimize(fn, start)
    reference, evaluations = scipy_minimum(name, fn, start, dtype)
    assert result.status == Status.OK
    assert result.value.dtype == dtype
    # float32 cannot see the flattest coordinate of the quadratic: it is worth 5e-5
    tolerance = 30 * jnp.finfo(dtype).eps ** 0.75
    assert float(result.value) <= reference + tolerance * max(abs(reference), 1)
    assert result.num_evaluations <= 1.5 * evaluations + 10


def test_evaluates_once_an_iteration_and_traces_once(dtype):
    traces = []

    def fn(x):
        traces.append(x)
        return rosenbrock(x)

    jax.eval_shape(lambda x: optimization.minimize(fn, x), jnp.zeros(3, dtype))
    assert len(traces) == 1


@pytest.mark.f32
@pytest.mark.usefixtures("optimized")
def test_badly_scaled_quadratic(dtype):
    # condition 1e8; float32 cannot see the flattest coordinate, which is worth 5e-5
    scales = jnp.asarray([1e-4, 1e-2, 1.0, 1e2, 1e4], dtype)
    result = optimization.minimize(
        jax.tree_util.Partial(quadratic, scales), jnp.zeros(5, dtype), tolerance=1e-12
    )
    assert float(result.value) < (1e-20 if dtype == jnp.float64 else 1e-4)


def test_pytree_positions_and_a_scalar(dtype):
    def fn(position):
        return (position["a"] - 2) ** 2 + jnp.sum((position["b"] + jnp.arange(3.0)) ** 4)

    result = optimization.minimize(fn, {"a": jnp.zeros((), dtype), "b": jnp.ones(3, dtype)})
    np.testing.assert_allclose(result.position["a"], 2, atol=1e-6)
    # a quartic is flat to |x|^4 at its minimum
    np.testing.assert_allclose(result.position["b"], [0, -1, -2], atol=0.02)


def test_float32_stays_float32_in_a_float64_process():
    result = optimization.minimize(rosenbrock, jnp.zeros(3, jnp.float32))
    assert result.position.dtype == jnp.float32
    assert result.value.dtype == jnp.float32
    assert result.status == Status.OK


@pytest.mark.f32
def test_statuses(dtype):
    nan = optimization.minimize(rosenbrock, jnp.asarray([jnp.nan, 1, 1], dtype))
    assert nan.status == Status.NON_FINITE
    assert nan.num_steps == 0
    short = optimization.minimize(rosenbrock, jnp.zeros(3, dtype), max_steps=3)
    assert short.status == Status.MAX_ITERATIONS
    assert short.num_steps == 3
    wrong = optimization.minimize(wrong_gradient, jnp.ones(3, dtype))
    assert wrong.status == Status.LINE_SEARCH_STALLED
    np.testing.assert_array_equal(wrong.position, 1)
    solved = optimization.minimize(rosenbrock, jnp.ones(3, dtype))
    assert (solved.status, solved.num_evaluations) == (Status.OK, 1)


def test_a_nan_wall_never_enters_the_result(dtype):
    def fn(x):
        return jnp.sum(jnp.where(x > 2, jnp.nan, (x - 3) ** 2))

    result = optimization.minimize(fn, jnp.zeros(2, dtype))
    assert jnp.isfinite(result.value)
    assert result.value < 2.1
    assert jnp.all(result.position <= 2)


def test_offset_of_the_objective_does_not_move_the_minimum(dtype):
    fn = jax.tree_util.Partial(shifted_rosenbrock, jnp.asarray(1e6, dtype))
    result = optimization.minimize(fn, jnp.zeros(3, dtype))
    np.testing.assert_allclose(result.position, 1, atol=1e-2)
    assert result.status == Status.OK


def test_a_decrease_that_does_not_matter_ends_the_search(dtype):
    unit = 1e-2  # of an objective whose minimum is 0
    fn, start = rosenbrock, jnp.zeros(4, dtype)
    whole = optimization.minimize(fn, start)
    short = optimization.minimize(fn, start, decrease=unit)
    assert short.status == Status.OK
    assert short.num_evaluations < whole.num_evaluations
    assert whole.value < short.value < 3 * unit


def test_noise_of_the_objective_stalls_unless_its_unit_is_given():
    def noisy(x):  # as if the value were the small sum of large terms: noise far above its own rounding
        return jnp.sum(jnp.cosh(x - 1) - 1) + jax.lax.stop_gradient(1e-7 * jnp.sin(1e8 * jnp.sum(x)))

    start = jnp.array([4.0, 3.0, -2.0])
    assert optimization.minimize(noisy, start, tolerance=0.0).status == Status.LINE_SEARCH_STALLED
    result = optimization.minimize(noisy, start, tolerance=0.0, decrease=1e-5)
    assert result.status == Status.OK
    np.testing.assert_allclose(result.position, 1, atol=1e-2)


def test_no_retrace_for_new_data(dtype, count_compiles):
    features, labels = logistic_data(dtype)
    start = jnp.zeros(5, dtype)
    first = optimization.minimize(jax.tree_util.Partial(logistic, features, labels), start)
    other = labels[:, None] * features
    with count_compiles() as compiles:
        second = optimization.minimize(jax.tree_util.Partial(logistic, other, labels), start)
    assert compiles.count == 0
    assert first.value != second.value


def test_vmap_and_map_find_what_single_runs_find(dtype):
    starts = jax.random.normal(jax.random.key(1), (4, 3), dtype)
    single = [optimization.minimize(rosenbrock, start) for start in starts]
    for batch in (jax.vmap, lambda fn: lambda xs: jax.lax.map(fn, xs)):
        batched = jax.jit(batch(lambda start: optimization.minimize(rosenbrock, start)))(starts)
        np.testing.assert_allclose(batched.value, [r.value for r in single], atol=1e-10)
        assert jnp.all(batched.status == Status.OK)


def is_done(state, info):
    return state.done


@pytest.mark.parametrize("name", quick(["rosenbrock", "barrier"], "barrier"))
def test_as_an_algorithm_in_the_run_loop_it_takes_the_same_path(name, dtype):
    # infinite trial values are no reason for the loop to stop: they never enter the state
    fn, start = problems(dtype)[name]
    algorithm = optimization.lbfgs(fn)
    state, history = run_until(jax.random.key(0), algorithm, algorithm.init(start), is_done, 200)
    history.check()
    result = optimization.minimize(fn, start)
    np.testing.assert_allclose(state.position, result.position, rtol=1e-9)
    assert state.num_evaluations == result.num_evaluations == history.num_steps
    infos = history.filled()[1]
    assert int(infos.accepted.sum()) == result.num_steps + 1  # the start is accepted, too
    assert bool(jnp.all(jnp.diff(infos.value) <= 1e-9 * jnp.abs(infos.value[1:])))


def test_integer_positions_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        optimization.minimize(rosenbrock, jnp.arange(3))
