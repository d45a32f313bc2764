import inspect
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probinfer as pi
from probinfer import progress
from probinfer.core.algorithms import Algorithm, algorithm
from probinfer.core.status import Status
from probinfer.core.types import pytree
from probinfer.running import loop


@pytree
class Walk:
    scale: object


def walk_init(config, position):
    return {"position": position}


def walk_step(config, key, state):
    TRACES.append(1)
    move = config.scale * jax.random.normal(key, state["position"].shape, state["position"].dtype)
    return {"position": state["position"] + move}, {"move": move, "key": key}


TRACES: list[int] = []


def walk(scale) -> Algorithm:
    return algorithm(walk_init, walk_step, Walk(jnp.asarray(scale, float)))


def start(num=2):
    return {"position": jnp.arange(num, dtype=float)}


def reference(key, scale, position, num_steps):
    """The same walk as a Python loop over split keys."""
    positions = []
    for step_key in jax.random.split(key, num_steps):
        move = scale * jax.random.normal(step_key, position.shape, position.dtype)
        position = position + move
        positions.append(position)
    return np.stack(positions)


def same(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: bool(jnp.all((x == y) | ((x != x) & (y != y)))), plain(a), plain(b))
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(equal)


def plain(tree):
    """Keys as their integers."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if x.dtype == jax.random.key(0).dtype else x, tree)


@pytest.mark.f32
def test_run_is_the_python_loop(key):
    state, history = pi.run(key, walk(0.5), start(), 6)
    expected = reference(key, 0.5, start()["position"], 6)
    states, infos = history
    np.testing.assert_allclose(states["position"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state["position"], states["position"][-1])
    assert infos["move"].shape == (6, 2)
    assert infos["key"].shape == (6,)
    assert history.status == Status.OK
    assert history.num_steps == history.num_records == 6
    assert states["position"].dtype == jnp.result_type(float)


@pytest.mark.parametrize(("num_steps", "thin"), [(11, 4), (2, 5), (0, 1)])
def test_thinning_keeps_every_nth_state(key, num_steps, thin):
    full_state, full = pi.run(key, walk(0.5), start(), num_steps)
    state, history = pi.run(key, walk(0.5), start(), num_steps, thin=thin)
    jitted = jax.jit(lambda key: pi.run(key, walk(0.5), start(), num_steps, thin=thin))(key)
    kept = jax.tree.map(lambda leaf: leaf[thin - 1 :: thin], full.records)
    assert same(state, full_state)
    assert same(history.records, kept)
    assert same((state, history), jitted)
    assert history.num_steps == num_steps
    assert history.num_records == num_steps // thin


def test_collect_replaces_the_record(key):
    _, history = pi.run(key, walk(0.5), start(), 5, collect=lambda state, info: state["position"].sum())
    full = pi.run(key, walk(0.5), start(), 5)[1].records[0]["position"]
    np.testing.assert_allclose(history.records, full.sum(1), rtol=1e-6)
    _, nothing = pi.run(key, walk(0.5), start(), 5, collect=pi.record_nothing)
    assert nothing.records == ()
    assert nothing.num_steps == 5


def test_jit_and_vmap_agree_with_plain_calls(key):
    keys = jax.random.split(key, 3)
    batched_state, batched = jax.vmap(lambda key: pi.run(key, walk(0.5), start(), 7, thin=2))(keys)
    for i, one in enumerate(keys):
        state, history = pi.run(one, walk(0.5), start(), 7, thin=2)
        np.testing.assert_allclose(batched_state["position"][i], state["position"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batched.records[1]["move"][i], history.records[1]["move"], rtol=1e-5)
    assert batched.num_steps.tolist() == [7, 7, 7]


def test_gradient_through_a_run(key):
    def end(scale):
        return pi.run(key, walk(scale), start(), 4)[0]["position"].sum()

    moves = pi.run(key, walk(1.0), start(), 4)[1].records[1]["move"]
    np.testing.assert_allclose(jax.grad(end)(0.5), moves.sum(), rtol=1e-5)


@pytest.mark.f32
def test_new_data_of_the_same_shape_traces_nothing(key, count_compiles):
    pi.run(key, walk(0.5), start(), 9)
    arguments = jax.random.key(7), walk(2.0), {"position": jnp.ones(2)}, 9
    traces = len(TRACES)
    with count_compiles() as compiles:
        pi.run(*arguments)
    assert compiles.count == 0
    assert len(TRACES) == traces


def test_one_trace_serves_shapes_and_loop(key):
    traces = len(TRACES)
    pi.run(key, walk(0.5), start(17), 9)
    assert len(TRACES) == traces + 1


def test_chunks_of_any_length_make_the_same_draws(key, monkeypatch, count_compiles):
    plain_result = pi.run(key, walk(0.5), start(), 50, thin=2)
    lengths = itertools.cycle([4, 2, 10, 6, 14])
    monkeypatch.setattr(loop, "_next_chunk", lambda *_: next(lengths))
    with count_compiles() as compiles:
        chunked = pi.run(key, walk(0.5), start(), 50, thin=2, progress=True)
    assert same(plain_result, chunked)
    assert compiles.count == 0


def test_chunk_length_follows_the_clock():
    assert loop._next_chunk(100, 0.6, 0.3, 1) == 50
    assert loop._next_chunk(100, 0.001, 0.3, 1) == 400  # grows by four at most
    assert loop._next_chunk(10, 100.0, 0.3, 5) == 5  # one record at least
    assert loop._next_chunk(10, 0.15, 0.3, 8) == 16  # whole records


def test_progress_counts_steps(key, monkeypatch):
    seen = []
    monkeypatch.setattr(progress.Task, "update", lambda self, completed, note="": seen.append(completed))
    pi.run(key, walk(0.5), start(), 30, progress="warm-up")
    assert seen[0] == 0
    assert seen[-1] == 30
    assert seen == sorted(seen)


def explode_step(config, key, state):
    position = state["position"]
    count = state["count"] + 1
    bad = jnp.where(count > config.scale, jnp.nan, 1.0).astype(position.dtype)
    return {"count": count, "position": position + 1, "other": bad * state["other"]}, count


def exploding(after):
    state = {"count": jnp.asarray(0.0), "position": jnp.zeros(2), "other": jnp.ones(3)}
    return algorithm(walk_init, explode_step, Walk(jnp.asarray(after, float))), state


@pytest.mark.f32
@pytest.mark.parametrize("how", ["plain", "jit", "chunks"])
def test_a_non_finite_state_stops_the_run(key, how):
    alg, state = exploding(4.5)
    if how == "jit":
        state, history = jax.jit(lambda key: pi.run(key, alg, state, 10, thin=2))(key)
    else:
        state, history = pi.run(key, alg, state, 10, thin=2, progress=how == "chunks")
    assert history.status == Status.NON_FINITE
    assert history.num_steps == 4
    assert history.num_records == 2
    assert state["position"].tolist() == [4.0, 4.0]
    assert jnp.isfinite(state["other"]).all()
    states, _ = history.filled()
    assert states["position"].tolist() == [[2.0, 2.0], [4.0, 4.0]]
    assert jnp.isnan(history.records[0]["position"][2:]).all()
    assert "step 4 made state['other'] non-finite" in history.message()
    with pytest.raises(pi.NumericalError, match="state\\['other'\\]") as caught:
        history.check()
    assert caught.value.status == Status.NON_FINITE


def test_vmapped_runs_stop_one_by_one(key):
    state = exploding(0)[1]
    end, history = jax.vmap(lambda after: pi.run(key, exploding(after)[0], state, 8))(
        jnp.array([2.5, 5.5, 99.0])
    )
    assert history.num_steps.tolist() == [2, 5, 8]
    assert history.status.tolist() == [Status.NON_FINITE, Status.NON_FINITE, Status.OK]
    assert end["position"][:, 0].tolist() == [2.0, 5.0, 8.0]


def divide_step(config, key, state):
    return jax.tree.map(lambda leaf: leaf / 0, state), ()


@pytree
class Weighted:
    log_weights: object
    best: object


@pytest.mark.parametrize(
    ("log_weights", "best", "bad"),
    [
        (-1.0, jnp.inf, -1),  # minus infinity is a legal log weight; an infinity may stay
        (1.0, jnp.inf, 0),  # plus infinity is not
        (-1.0, 1.0, 1),
        (-1.0, 0.0, 1),
        (-1.0, jnp.nan, 1),
    ],
)
def test_what_counts_as_non_finite(key, log_weights, best, bad):
    state = Weighted(jnp.asarray(log_weights, float), jnp.asarray(best, float))
    _, history = pi.run(key, algorithm(walk_init, divide_step, Walk(1.0)), state, 1)
    assert history.bad_leaf == bad
    assert history.leaf_names == ("state.log_weights", "state.best")


def far_enough(state, info):
    return jnp.abs(state["position"]).max() > 4


@pytest.mark.parametrize("how", ["plain", "jit", "chunks"])
def test_run_until_stops_after_the_first_step_that_meets_the_rule(key, how):
    full = reference(key, 1.0, start()["position"], 200)
    expected = int(np.argmax(np.abs(full).max(1) > 4)) + 1
    call = partial(pi.run_until, algorithm=walk(1.0), state=start(), stop_fn=far_enough, max_steps=200)
    state, history = jax.jit(call)(key) if how == "jit" else call(key, progress=how == "chunks")
    assert history.num_steps == expected
    assert history.status == Status.OK
    np.testing.assert_allclose(state["position"], full[expected - 1], rtol=1e-5)
    np.testing.assert_allclose(history.filled()[0]["position"], full[:expected], rtol=1e-5, atol=1e-6)


def test_run_until_says_when_the_rule_was_never_met(key):
    _, history = pi.run_until(key, walk(0.0), start(), far_enough, 5)
    assert history.num_steps == 5
    assert history.status == Status.MAX_ITERATIONS
    assert "iteration limit" in history.message()
    history.check()


def test_run_until_stops_on_a_non_finite_state(key):
    alg, state = exploding(2.5)
    _, history = pi.run_until(key, alg, state, lambda state, info: state["count"] > 50, 100)
    assert history.status == Status.NON_FINITE
    assert history.num_steps == 2


@pytest.mark.f32
def test_python_numbers_may_start_a_run(key):
    double = Algorithm(None, lambda key, state: (state * 2, None))
    state, _ = pi.run(key, double, 1.5, 3)
    assert state == 12.0
    assert state.dtype == jnp.result_type(float)
    assert not state.aval.weak_type


def bad_structure(key, state):
    return (state, state), ()


def bad_dtype(key, state):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float16), state), ()


def test_bad_input_is_refused(key):
    good = walk(0.5)
    with pytest.raises(TypeError, match="key"):
        pi.run(jax.random.PRNGKey(0), good, start(), 3)
    with pytest.raises(TypeError, match="step\\(key, state\\)"):
        pi.run(key, "nuts", start(), 3)
    with pytest.raises(TypeError, match="structure"):
        pi.run(key, Algorithm(None, bad_structure), start(), 3)
    with pytest.raises(TypeError, match=r"state\['position'\] from float.* into float16"):
        pi.run(key, Algorithm(None, bad_dtype), start(), 3)
    with pytest.raises(TypeError, match="boolean scalar"):
        pi.run_until(key, good, start(), lambda state, info: state["position"] > 1, 3)
    with pytest.raises(ValueError, match="num_steps >= 0"):
        pi.run(key, good, start(), -1)
    with pytest.raises(ValueError, match="thin >= 1"):
        pi.run(key, good, start(), 3, thin=0)
    unchecked = inspect.unwrap(pi.run)  # without the checks of annotations in tests
    with pytest.raises(TypeError, match="num_steps must be an integer, got 1000"):
        unchecked(key, good, start(), 1e3)
    with pytest.raises(TypeError, match=r"write pi\.Checkpoint\(path\)"):
        unchecked(key, good, start(), 3, checkpoint="folder")
    blackjax_step = Algorithm(None, lambda key, state: (state._replace(position=state.position + 1), ()))
    with pytest.raises(TypeError, match=r"_replace; start from algorithm\.init\(position\)"):
        pi.run(key, blackjax_step, jnp.zeros(3), 3)


def test_progress_and_checkpoint_are_refused_under_jit(key, tmp_path):
    for setting in ({"progress": True}, {"checkpoint": pi.Checkpoint(tmp_path)}):
        with pytest.raises(ValueError, match="outside jit"):
            jax.jit(lambda key, setting=setting: pi.run(key, walk(0.5), start(), 3, **setting))(key)
