"""Many posteriors at once, held against a Python loop; killed and resumed; failures that keep their place."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probinfer as pi
from probinfer.core.status import Status

S, L = 7, 5


class Info(NamedTuple):
    num_gradients: jax.Array
    diverging: jax.Array
    ess: jax.Array
    status: jax.Array


def leapfrog_sampler(key, x):
    """HMC of fixed length on a normal posterior with mean x: no loop of unknown length."""
    scale = jnp.asarray([1.0, 0.2], x.dtype)

    def slope(q):
        return (x - q) / scale**2

    def transition(q, key):
        key_momentum, key_accept = jax.random.split(key)
        p = jax.random.normal(key_momentum, q.shape, q.dtype)

        def leapfrog(carry, _):
            q, p = carry
            p = p + 0.1 * slope(q)
            q = q + 0.2 * p
            return (q, p + 0.1 * slope(q)), None

        (new, turned), _ = jax.lax.scan(leapfrog, (q, p), length=4)

        def energy(q, p):
            return 0.5 * jnp.sum(((x - q) / scale) ** 2) + 0.5 * jnp.sum(p**2)

        ratio = energy(q, p) - energy(new, turned)
        accepted = jnp.log(jax.random.uniform(key_accept, (), q.dtype)) < ratio
        q = jnp.where(accepted, new, q)
        return q, (q, ~accepted)

    _, (draws, rejected) = jax.lax.scan(transition, x, jax.random.split(key, L))
    info = Info(jnp.full(L, 4), rejected, jnp.asarray([3.0, 2.0], x.dtype), jnp.int32(0))
    return {"q": draws}, info


def search(key, x):
    """A loop whose length depends on the data."""
    noise = jax.random.normal(key, (L,), x.dtype)
    num, value = jax.lax.while_loop(
        lambda c: c[1] > 1e-3, lambda c: (c[0] + 1, c[1] / 2), (jnp.int32(0), jnp.abs(x).sum())
    )
    return noise + value, {"num_iterations": num}


def troubled(key, x):
    draws = jax.random.normal(key, (L,), x.dtype) + jnp.where(x[0] > 2, jnp.nan, 0.0)
    status = jnp.where(x[0] < -2, Status.NOT_POSITIVE_DEFINITE, Status.OK)
    return draws, {"status": jnp.where(x[1] > 2, Status.CHAINS_DISAGREE, status)}


CALLS = []  # not in a closure, which would be part of what the function is


def counted(key, x):
    jax.debug.callback(lambda: CALLS.append(1))
    return jax.random.normal(key, (L,))


def data_sets(key, num=S):
    key_data, key_runs = jax.random.split(key)
    return jax.random.split(key_runs, num), jax.random.normal(key_data, (num, 2))


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.f32
def test_a_python_loop_is_the_oracle(key, dtype):
    keys, x = data_sets(key)
    many = pi.run_many(leapfrog_sampler, keys, x, mode="map", batch_size=3)
    jitted = jax.jit(leapfrog_sampler)
    loop = [jitted(k, row) for k, row in zip(keys, x, strict=True)]
    tolerance = 1e-9 if dtype == jnp.float64 else 1e-3
    for s, (draws, info) in enumerate(loop):
        np.testing.assert_allclose(many.draws["q"][s], draws["q"], rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(many.info.diverging[s], info.diverging)
    assert many.draws["q"].shape == (S, L, 2)
    assert many.draws["q"].dtype == dtype
    np.testing.assert_array_equal(many.work, np.full(S, 4 * L))
    np.testing.assert_array_equal(many.divergences, many.info.diverging.sum(axis=1))
    np.testing.assert_array_equal(many.ess, np.full(S, 2.0))
    assert not many.failed.any()
    assert many.failures == ()


@pytest.mark.f32(slow=True)
def test_batches_do_not_change_a_bit(key):
    keys, x = data_sets(key)
    whole = pi.run_many(leapfrog_sampler, keys, x, mode="map")
    for batch_size in (1, 4):
        part = pi.run_many(leapfrog_sampler, keys, x, mode="map", batch_size=batch_size)
        assert_same_bits((whole.draws, whole.info), (part.draws, part.info))


def test_map_and_vmap_agree(key):
    keys, x = data_sets(key)
    mapped = pi.run_many(leapfrog_sampler, keys, x, mode="map", batch_size=4)
    batched = pi.run_many(leapfrog_sampler, keys, x, mode="vmap", batch_size=4)
    np.testing.assert_allclose(mapped.draws["q"], batched.draws["q"], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(mapped.info.diverging, batched.info.diverging)


def test_auto_looks_at_the_function(key):
    keys, x = data_sets(key)
    assert pi.run_many(leapfrog_sampler, keys, x).mode == "vmap"
    found = pi.run_many(search, keys, x)
    assert found.mode == ("map" if jax.default_backend() == "cpu" else "vmap")
    np.testing.assert_array_equal(
        found.work, np.ceil(np.log2(np.abs(x).sum(axis=1) / 1e-3)).astype(int)
    )  # halvings until at most a thousandth is left

    def factorizes(key, x):
        return jnp.linalg.cholesky(jnp.eye(2) * (1 + x[0] ** 2))

    assert pi.run_many(factorizes, keys, x).mode == found.mode


def test_one_program_for_all_batches_and_calls(key, count_compiles):
    keys, x = data_sets(key)
    others = np.asarray(x) + 1
    for mode in ("map", "vmap"):
        pi.run_many(leapfrog_sampler, keys, x, mode=mode, batch_size=4)  # batches of four and of three
        with count_compiles() as compiles:
            pi.run_many(leapfrog_sampler, keys, others, mode=mode, batch_size=4)
        assert compiles.count == 0


def test_killed_and_resumed_is_the_same(key, tmp_path):
    keys, x = data_sets(key)
    for mode in ("map", "vmap"):
        folder = tmp_path / mode
        call = lambda checkpoint=None, mode=mode: pi.run_many(  # noqa: E731
            leapfrog_sampler, keys, x, mode=mode, batch_size=3, checkpoint=checkpoint
        )
        whole = call()
        assert_same_bits(whole.draws, call(pi.Checkpoint(folder)).draws)
        files = sorted(folder.glob("batch_*.part"))
        assert len(files) == 3
        files[1].unlink()  # the second batch never finished; a draft of it was left
        (folder / ".batch_000001.part.123.draft").write_bytes(b"half")
        resumed = call(pi.Checkpoint(folder))
        assert sorted(folder.glob("batch_*")) == files
        assert_same_bits((whole.draws, whole.info), (resumed.draws, resumed.info))
        np.testing.assert_array_equal(whole.status, resumed.status)


def test_a_checkpoint_limits_the_batch(key, tmp_path):
    keys, x = data_sets(key)
    pi.run_many(leapfrog_sampler, keys, x, mode="map", checkpoint=pi.Checkpoint(tmp_path, every=4))
    assert len(list(tmp_path.glob("batch_*.part"))) == -(-S // 4)


def test_finished_batches_are_not_computed_again(key, tmp_path):
    keys, x = data_sets(key)
    CALLS.clear()
    first = pi.run_many(counted, keys, x, mode="map", batch_size=4, checkpoint=pi.Checkpoint(tmp_path))
    jax.effects_barrier()
    assert len(CALLS) == S
    again = pi.run_many(counted, keys, x, mode="map", batch_size=4, checkpoint=pi.Checkpoint(tmp_path))
    jax.effects_barrier()
    assert len(CALLS) == S
    assert_same_bits(first.draws, again.draws)


def test_another_run_is_refused(key, tmp_path):
    keys, x = data_sets(key)
    pi.run_many(search, keys, x, mode="map", batch_size=4, checkpoint=pi.Checkpoint(tmp_path))
    call = lambda fn=search, keys=keys, x=x, batch_size=4: pi.run_many(  # noqa: E731
        fn, keys, x, mode="map", batch_size=batch_size, checkpoint=pi.Checkpoint(tmp_path)
    )
    for change, word in [
        ({"x": x + 1}, "data is"),
        ({"keys": keys[::-1]}, "keys is"),
        ({"fn": troubled}, "infer_fn is"),
        ({"batch_size": 2}, "batch size is"),
        ({"x": x[:-1], "keys": keys[:-1]}, "data sets is"),
        ({"x": x.astype(jnp.float32)}, "data is"),
    ]:
        with pytest.raises(ValueError, match=f"different run: .*{word}.*another path"):
            call(**change)
    (tmp_path / "batch_000000.part").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="delete it, and it is computed again"):
        call()
    (tmp_path / "about.json").unlink()
    with pytest.raises(ValueError, match="no about"):
        call()


def test_narrow_floats_come_back_from_disk(key, tmp_path):
    keys, x = data_sets(key)

    def narrow(key, x):
        return jax.random.normal(key, (L,)).astype(jnp.bfloat16)

    first = pi.run_many(narrow, keys, x, checkpoint=pi.Checkpoint(tmp_path))
    assert first.draws.dtype == jnp.bfloat16
    assert_same_bits(first.draws, pi.run_many(narrow, keys, x, checkpoint=pi.Checkpoint(tmp_path)).draws)
    assert json.loads((tmp_path / "about.json").read_text())["results"] == [f"bfloat16[{L}]"]


@pytest.mark.f32
def test_failures_are_kept_and_counted(key):
    keys, x = data_sets(key)
    x = x.at[:4].set(jnp.asarray([[3.0, 0.0], [-3.0, 0.0], [3.0, 0.0], [0.0, 3.0]])).at[4:].set(0.0)
    many = pi.run_many(troubled, keys, x)
    assert many.draws.shape == (S, L)
    np.testing.assert_array_equal(many.failed, [True, True, True, False, False, False, False])
    expected = [
        Status.NON_FINITE,
        Status.NOT_POSITIVE_DEFINITE,
        Status.NON_FINITE,
        Status.CHAINS_DISAGREE,
        Status.OK,
    ]
    assert many.status[:5].tolist() == expected
    assert [(reason.split(":")[0], num) for reason, num in many.failures] == [
        ("NON_FINITE", 2),
        ("CHAINS_DISAGREE", 1),
        ("NOT_POSITIVE_DEFINITE", 1),
    ]
    assert "3 failed" in repr(many)
    assert many.work is None
    assert many.ess is None


def test_data_may_be_a_tree_or_nothing(key):
    keys, x = data_sets(key)

    def of_tree(key, data):
        return data["x"][None] + data["y"]

    many = pi.run_many(of_tree, keys, {"x": np.asarray(x), "y": np.arange(S)}, batch_size=2)
    np.testing.assert_allclose(many.draws[:, 0], np.asarray(x) + np.arange(S)[:, None])
    alone = pi.run_many(lambda key, _: jax.random.normal(key, (L,)), keys, None)
    np.testing.assert_array_equal(alone.draws, jax.vmap(lambda k: jax.random.normal(k, (L,)))(keys))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"infer_fn": 3}, TypeError, "infer_fn"),
        ({"keys": jax.random.key(0)}, TypeError, "jax.random.split"),
        ({"keys": np.arange(S)}, TypeError, "jax.random.split"),
        ({"keys": jax.random.split(jax.random.key(0), 0)}, ValueError, "no data sets"),
        ({"data": jnp.zeros((S + 1, 2))}, ValueError, "number of keys"),
        ({"data": {"a": jnp.zeros((S, 2)), "b": 1.0}}, ValueError, "'b' is"),
        ({"mode": "lanes"}, ValueError, "'auto', 'map', 'vmap' or 'queue'"),
        ({"mode": "queue"}, TypeError, "run in steps.*posterior_sampler.*use 'map' or 'vmap'"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1"),
        ({"batch_size": 2.5}, TypeError, "batch_size"),
        ({"num_lanes": True}, TypeError, "num_lanes"),
        ({"infer_fn": lambda key, x: x[0]}, ValueError, "axis of length one"),
        ({"infer_fn": lambda key, x: None}, ValueError, "leaves"),
        ({"infer_fn": lambda key, x: (x, {"key": key})}, TypeError, "not random keys"),
    ],
)
def test_bad_input(key, change, error, words):
    keys, x = data_sets(key)
    arguments = {"infer_fn": leapfrog_sampler, "keys": keys, "data": x} | change
    with pytest.raises(error, match=words):
        pi.run_many(arguments.pop("infer_fn"), arguments.pop("keys"), arguments.pop("data"), **arguments)


@pytest.mark.parametrize(
    "leaf",
    [
        np.array([np.zeros(2), np.zeros(3)], dtype=object),
        np.array(["a", "b"]),
        np.zeros(2, dtype=[("x", float)]),
        np.array(["2020-01-01", "2021-01-01"], dtype="datetime64[D]"),
    ],
)
def test_data_that_are_no_numbers_are_refused_in_words(key, leaf):
    with pytest.raises(TypeError, match=r"data must be arrays of numbers, 'x' holds .*pad them"):
        pi.run_many(lambda key, x: jnp.zeros(3), jax.random.split(key, 2), {"x": leaf})
