"""A queue for lanes: work that depends on the data, held against one data set after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probinfer as pi
from probinfer.core.types import field, pytree
from probinfer.running.many.lanes import Stepwise, run_alone

S, L = 11, 3
STEPS = np.array([30, 1, 2, 1, 0, 3, 7, 1, 1, 2, 5])
CALLS = []


@pytree
class Walk:
    """L walks of x steps; their squares are summed on the way."""

    scale: jax.Array
    counted: bool = field(static=True, default=False)

    def __call__(self, key, x):
        return run_alone(self, key, x)

    def init(self, key, x):
        here = jnp.zeros(L, self.scale.dtype)
        return {"key": key, "left": x, "here": here, "squares": jnp.sin(here)}

    def step(self, state):
        if self.counted:
            jax.debug.callback(lambda: CALLS.append(1))
        key, key_step = jax.random.split(state["key"])
        here = state["here"] + self.scale * jax.random.normal(key_step, (L,), self.scale.dtype)
        squares = state["squares"] + jnp.exp(-(here**2))
        return {"key": key, "left": state["left"] - 1, "here": here, "squares": squares}

    def done(self, state):
        return state["left"] <= 0

    def finish(self, state):
        return state["here"], {"num_steps": jnp.asarray(1), "squares": state["squares"]}


class Unregistered(Walk):
    """A class that JAX does not know."""


@pytree
class Factorizing(Walk):
    """Steps with a dense factorization."""

    def step(self, state):
        """A step and a factorization."""
        moved = super().step(state)
        chol = jnp.linalg.cholesky(jnp.eye(L) * (1 + moved["here"][0] ** 2))
        return moved | {"here": moved["here"] / chol[0, 0]}


@pytest.fixture
def walk(dtype):
    return Walk(jnp.asarray(0.7, dtype))


def data_sets(key):
    return jax.random.split(key, S), jnp.asarray(STEPS, jnp.int32)


def assert_same_bits(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.f32
def test_one_after_another_is_the_oracle(key, walk, dtype):
    keys, x = data_sets(key)
    many = pi.run_many(walk, keys, x, mode="queue", num_lanes=3)
    assert many.mode == "queue"
    assert many.draws.dtype == dtype
    tolerance = 1e-12 if dtype == jnp.float64 else 1e-5
    for s in range(S):
        state = walk.init(keys[s], x[s])
        for _ in range(STEPS[s]):
            state = walk.step(state)
        np.testing.assert_allclose(many.draws[s], state["here"], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(many.info["squares"][s], state["squares"], rtol=tolerance)
    mapped, batched = (pi.run_many(walk, keys, x, mode=mode) for mode in ("map", "vmap"))
    np.testing.assert_allclose(many.draws, mapped.draws, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(many.draws, batched.draws, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.f32(slow=True)
def test_batches_do_not_change_a_bit_and_lanes_only_rounding(key, walk, dtype):
    keys, x = data_sets(key)
    whole = pi.run_many(walk, keys, x, mode="queue", num_lanes=4)
    for batch_size in (1, 3):
        part = pi.run_many(walk, keys, x, mode="queue", batch_size=batch_size, num_lanes=4)
        assert_same_bits((whole.draws, whole.info), (part.draws, part.info))
    tolerance = 1e-12 if dtype == jnp.float64 else 1e-5
    for num_lanes in (1, 64):
        other = pi.run_many(walk, keys, x, mode="queue", num_lanes=num_lanes)
        np.testing.assert_allclose(whole.draws, other.draws, rtol=tolerance, atol=tolerance)


def test_killed_and_resumed_is_the_same(key, walk, tmp_path):
    keys, x = data_sets(key)
    call = lambda num_lanes=2: pi.run_many(  # noqa: E731
        walk, keys, x, mode="queue", batch_size=4, num_lanes=num_lanes, checkpoint=pi.Checkpoint(tmp_path)
    )
    whole = call()
    sorted(tmp_path.glob("batch_*.part"))[1].unlink()
    resumed = call()
    assert_same_bits((whole.draws, whole.info), (resumed.draws, resumed.info))
    with pytest.raises(ValueError, match=r"different run: .*lanes is"):
        call(num_lanes=3)


def test_a_lane_that_has_finished_takes_the_next(key, dtype):
    keys, x = data_sets(key)
    walk = Walk(jnp.asarray(0.7, dtype), counted=True)
    CALLS.clear()
    pi.run_many(walk, keys, x, mode="queue", num_lanes=2)
    jax.effects_barrier()
    # One call a step of all lanes: one lane does the 23 steps of ten data sets while the other does its 30.
    assert len(CALLS) == STEPS.max()


def test_new_data_compile_nothing(key, walk, count_compiles):
    keys, x = data_sets(key)
    pi.run_many(walk, keys, x, mode="queue", num_lanes=4, batch_size=4)
    other, longer = Walk(walk.scale * 2), x + 1
    with count_compiles() as compiles:
        pi.run_many(other, keys, longer, mode="queue", num_lanes=4, batch_size=4)
    assert compiles.count == 0


def test_auto_looks_at_the_step(key, walk, dtype):
    keys, x = data_sets(key)
    assert isinstance(walk, Stepwise)
    assert pi.run_many(walk, keys, x).mode == "queue"
    found = pi.run_many(Factorizing(walk.scale), keys, x).mode
    assert found == ("map" if jax.default_backend() == "cpu" else "queue")


def test_bad_input(key, walk):
    keys, x = data_sets(key)
    for infer_fn in (lambda key, x: x[None], object.__new__(Unregistered)):
        with pytest.raises(TypeError, match=r"run in steps: a registered class.*use 'map' or 'vmap'"):
            pi.run_many(infer_fn, keys, x, mode="queue")
    for name in ("num_lanes", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1"):
            pi.run_many(walk, keys, x, mode="queue", **{name: 0})
