"""Forks of a cache against indexing, for both ways and both layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.lm.models.transformer.cache import FORK_METHODS, Cache, copy_order, fork, write
from probinfer.resampling import in_place

N = 7
jitted = jax.jit(fork, static_argnums=2)


def filled(key, rows, layout, dtype):
    keys = jax.random.normal(key, (2, 2, rows, 2, 3, 4), dtype)
    if layout == "stacked":
        return Cache(*keys)
    return Cache(*(tuple(layers) for layers in keys))


def stacked(cache):
    return np.stack([np.asarray(jnp.stack(list(part))) for part in (cache.keys, cache.values)])


def all_kinds(rng):
    """Ancestors of every kind: nothing moves, one survivor, cycles, paths into cycles, sorted, in place."""
    some = [np.arange(N), np.full(N, 3), np.roll(np.arange(N), 1), np.array([1, 0, 3, 4, 2, 0, 5])]
    some += [rng.permutation(N) for _ in range(5)] + [rng.integers(0, N, N) for _ in range(10)]
    some += [np.sort(rng.integers(0, N, N)) for _ in range(5)]
    some += [np.asarray(in_place(jnp.asarray(rng.integers(0, N, N)))) for _ in range(5)]
    return [jnp.asarray(ancestors, jnp.int32) for ancestors in some]


@pytest.mark.parametrize("layout", ["layers", "stacked"])
@pytest.mark.parametrize("method", FORK_METHODS)
def test_fork_is_indexing(key, dtype, method, layout):
    cache = filled(key, N, layout, dtype)
    for ancestors in all_kinds(np.random.default_rng(1)):
        want = stacked(cache)[:, :, ancestors]
        np.testing.assert_array_equal(stacked(jitted(cache, ancestors, method)), want)


@pytest.mark.parametrize("layout", ["layers", "stacked"])
@pytest.mark.parametrize("method", FORK_METHODS)
def test_more_or_fewer_rows(key, dtype, method, layout):
    cache = filled(key, N, layout, dtype)
    for ancestors in (jnp.asarray([6, 6, 0], jnp.int32), jnp.arange(12, dtype=jnp.int32) // 2):
        np.testing.assert_array_equal(
            stacked(fork(cache, ancestors, method)), stacked(cache)[:, :, ancestors]
        )


@pytest.mark.parametrize("layout", ["layers", "stacked"])
@pytest.mark.parametrize("method", FORK_METHODS)
def test_several_prompts(key, dtype, method, layout):
    caches = jax.vmap(lambda key: filled(key, N, layout, dtype))(jax.random.split(key, 3))
    ancestors = jax.random.randint(key, (3, N), 0, N)
    made = jax.vmap(lambda cache, a: fork(cache, a, method))(caches, ancestors)
    shared = jax.vmap(lambda a: fork(jax.tree.map(lambda leaf: leaf[0], caches), a, method))(ancestors)
    for i in range(3):
        one, first, same = (
            jax.tree.map(lambda leaf, j=j: leaf[j], t) for t, j in ((caches, i), (caches, 0), (shared, i))
        )
        np.testing.assert_array_equal(
            stacked(jax.tree.map(lambda leaf, i=i: leaf[i], made)), stacked(one)[:, :, ancestors[i]]
        )
        np.testing.assert_array_equal(stacked(same), stacked(first)[:, :, ancestors[i]])


def test_moves_touch_only_what_changes():
    for ancestors in all_kinds(np.random.default_rng(2)):
        slots, count, cyclic = jax.jit(copy_order)(ancestors)
        changed = set(np.flatnonzero(np.asarray(ancestors) != np.arange(N)).tolist())
        done = np.asarray(slots)[: int(count)].tolist()
        rest = set(np.flatnonzero(np.asarray(cyclic)).tolist())
        assert len(done) == len(set(done))
        assert set(done) | rest == changed
        assert not set(done) & rest
        assert set(np.asarray(ancestors)[sorted(rest)].tolist()) == rest  # a permutation of itself


def test_a_fork_in_place_takes_no_second_cache(dtype, optimized):
    cache = Cache(*(tuple(jnp.zeros((64, 2, 64, 16), dtype) for _ in range(4)) for _ in range(2)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    ancestors = jnp.zeros(64, jnp.int32)

    def temporary(method):
        compiled = jax.jit(fork, static_argnums=2, donate_argnums=0).lower(cache, ancestors, method).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary("moved") < 0.3 * size, (temporary("moved"), temporary("copy"), size)


def test_writes_at_ragged_places(key, dtype):
    store = jax.random.normal(key, (3, 2, 5, 4), dtype)
    new = jnp.arange(3 * 2 * 2 * 4, dtype=dtype).reshape(3, 2, 2, 4)
    made = np.asarray(jax.jit(write)(store, new, jnp.asarray([0, 2, 4], jnp.int32)))
    want = np.array(store)
    want[0, :, 0:2], want[1, :, 2:4], want[2, :, 4] = new[0].swapaxes(0, 1), new[1].swapaxes(0, 1), new[2, 0]
    np.testing.assert_array_equal(made, want)


def test_forks_trace_once(key, dtype, count_compiles):
    cache = filled(key, N, "layers", dtype)
    kinds = all_kinds(np.random.default_rng(3))
    jitted(cache, kinds[0], "moved")
    with count_compiles() as counter:
        for ancestors in kinds:
            jitted(cache, ancestors, "moved")
    assert counter.count == 0


def test_an_unknown_way(key, dtype):
    with pytest.raises(ValueError, match="unknown method to fork 'move'; did you mean 'moved'"):
        fork(filled(key, N, "layers", dtype), jnp.arange(N), "move")
