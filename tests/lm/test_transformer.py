"""The transformer against a slow NumPy version: ragged rows, windows, garbage, several prompts, both precisions."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.lm.models.base import LanguageModel, bucket, decode
from probinfer.lm.models.transformer import Config, Rope, Transformer
from probinfer.lm.models.transformer.attention import BLOCK, KeysAndValues, attend, causal
from probinfer.lm.models.transformer.rope import frequencies
from tests.params import quick

SMALL = Config(23, 16, 20, 3, 4, 2, max_context=64)
VARIANTS = {
    "plain": SMALL,
    "everything": dataclasses.replace(
        SMALL,
        head_dim=6,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm=True,
        tied=True,
        windows=(0, 3, 5),
    ),
    "windows": dataclasses.replace(SMALL, windows=(4, 4, 4), rope=Rope("llama3", 1e4, 4.0, 16, 1.0, 4.0)),
}


@functools.cache
def made(name, dtype, scanned=None):
    """A model whose biases and norms are random too, drawn by NumPy: nothing to compile."""
    config, rng = VARIANTS[name], np.random.default_rng(3)
    shapes = jax.eval_shape(lambda: Transformer.random(jax.random.key(0), config, dtype, False))

    def draw(leaf):
        mean, scale = (0.5, 0.3) if len(leaf.shape) == 1 else (0.0, leaf.shape[0] ** -0.5)
        return jnp.asarray(rng.normal(mean, scale, leaf.shape), leaf.dtype)

    weights = jax.tree.map(draw, shapes).weights
    return Transformer.from_blocks(weights["ends"], weights["blocks"], config, scanned)


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def turn(x, position, omega, factor):
    half = len(x) // 2
    c, s = np.cos(position * omega) * factor, np.sin(position * omega) * factor
    return np.concatenate([x[:half] * c - x[half:] * s, x[half:] * c + x[:half] * s])


def slow(model, tokens):
    """Logits after each token of one text: a loop over heads and positions, straight from the formulas."""
    c = model.config
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.weights)
    ends, (omega, factor) = weights["ends"], frequencies(c.rope, c.width, c.max_context)
    x = ends["embedding"][np.asarray(tokens)]
    size, d, count = c.num_heads * c.width, c.width, len(tokens)
    for w, window in zip(weights["blocks"], c.windows):
        qkv = norm(x, w["attention_norm"], c.norm_eps) @ w["qkv"] + w.get("qkv_bias", 0.0)
        out = np.zeros((count, size))
        for head in range(c.num_heads):
            kv = head // c.group
            q, k, v = (qkv[:, s : s + d] for s in (head * d, size + kv * d, size + (c.kv_heads + kv) * d))
            if c.qk_norm:
                q, k = norm(q, w["q_norm"], c.norm_eps), norm(k, w["k_norm"], c.norm_eps)
            for i in range(count):
                seen = [j for j in range(i + 1) if not window or i - j < window]
                query = turn(q[i], i, omega, factor)
                scores = np.array([query @ turn(k[j], j, omega, factor) for j in seen]) / np.sqrt(d)
                p = np.exp(scores - scores.max())
                out[i, head * d : (head + 1) * d] = p / p.sum() @ v[seen]
        x = x + out @ w["out"] + w.get("out_bias", 0.0)
        wide = norm(x, w["mlp_norm"], c.norm_eps) @ w["gate_up"] + w.get("gate_up_bias", 0.0)
        gate, up = np.split(wide, 2, axis=-1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["down"] + w.get("down_bias", 0.0)
    return norm(x, ends["norm"], c.norm_eps) @ ends.get("head", ends["embedding"]).T


def close(got, want, dtype):
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-4 if dtype == jnp.float32 else 1e-11)


@jax.jit
def run(model, prompt, length, tokens, start, cache, more, more_start):
    hidden, prompt = model.prefill(prompt, length)
    first, cache = model.extend(prompt, cache, tokens, start)
    second, cache = model.extend(prompt, cache, more, more_start)
    return model.head(hidden), model.head(first), model.head(second), cache


@pytest.mark.f32
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("scanned", quick([False, True], True))
def test_against_numpy_with_ragged_rows(name, scanned, dtype):
    """Rows of unequal lengths, padding behind the prompt, garbage in the cache and in tokens that are overwritten."""
    model, plain = made(name, dtype, scanned), made(name, dtype)
    rng = np.random.default_rng(0)
    prompt, texts, lengths = rng.integers(0, 23, 5), rng.integers(0, 23, (3, 9)), [2, 4, 3]
    first, more = texts[:, :4].copy(), np.stack([t[n : n + 5] for t, n in zip(texts, lengths)])
    for row, n in enumerate(lengths):
        first[row, n:] = rng.integers(0, 23, 4 - n)  # written, then overwritten
    cache = jax.tree.map(lambda leaf: leaf + 1e3, model.init_cache(3, 11))
    padded = jnp.asarray(np.pad(prompt, (0, 3), constant_values=22))
    zero = jnp.zeros(3, jnp.int32)
    last, one, two, _ = run(
        model,
        padded,
        jnp.asarray(5),
        jnp.asarray(first),
        zero,
        cache,
        jnp.asarray(more),
        jnp.asarray(lengths),
    )
    for row, n in enumerate(lengths):
        want = slow(plain, np.concatenate([prompt, texts[row, : n + 5]]))
        close(last, want[4], dtype)
        close(one[row, :n], want[5 : 5 + n], dtype)
        close(two[row], want[5 + n :], dtype)
    both = np.concatenate([np.broadcast_to(prompt, (3, 5)), texts], axis=1)
    close(model.head(model.forward(jnp.asarray(both)))[1], slow(plain, both[1]), dtype)


def test_rows_do_not_see_each_other(dtype):
    """The logits of one particle are the same to the last bit whatever the others hold."""
    model = made("everything", dtype)
    prompt, zero = jnp.arange(8), jnp.zeros(2, jnp.int32)
    tokens = jnp.asarray([[1, 2, 3], [4, 5, 6]])
    other = tokens.at[1].set(jnp.asarray([9, 8, 7]))
    cache = model.init_cache(2, 8)
    spoilt = jax.tree.map(lambda leaf: leaf.at[1].set(1e6).at[0, :, 6:].set(-1e6), cache)
    a = run(model, prompt, jnp.asarray(8), tokens, zero, cache, tokens, zero + 3)
    b = run(model, prompt, jnp.asarray(8), other, zero, spoilt, other, zero + 3)
    np.testing.assert_array_equal(a[2][0], b[2][0])
    assert np.abs(a[2][1] - b[2][1]).max() > 1e-3


def test_tokens_beyond_the_cache_are_dropped(dtype):
    model = made("plain", dtype)
    cache = model.init_cache(2, 4)
    start = jnp.asarray([3, 4], jnp.int32)
    _, prompt = model.prefill(jnp.arange(4), jnp.asarray(4))
    _, after = jax.jit(model.extend)(prompt, cache, jnp.asarray([[1, 2], [3, 4]]), start)
    written = np.stack([np.any(np.asarray(keys) != 0, axis=(1, 3)) for keys in after.keys])
    np.testing.assert_array_equal(written, np.broadcast_to([[False] * 3 + [True], [False] * 4], (3, 2, 4)))


def test_several_prompts_at_once(dtype):
    model = made("everything", dtype)
    prompts, lengths = jnp.asarray([[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 9]]), jnp.asarray([3, 6])
    tokens = jax.random.randint(jax.random.key(0), (2, 3, 2), 0, 23)

    def one(prompt, length, tokens):
        cache = model.init_cache(3, 4)
        return run(model, prompt, length, tokens, jnp.zeros(3, jnp.int32), cache, tokens, jnp.full(3, 2))[:3]

    together = jax.vmap(one)(prompts, lengths, tokens)
    for i in range(2):
        alone = one(prompts[i], lengths[i], tokens[i])
        jax.tree.map(lambda a, b, i=i: close(a[i], b, dtype), together, alone)


def test_a_second_prompt_compiles_nothing(dtype, count_compiles):
    model = made("plain", dtype)

    def answer(text):
        padded = np.pad(text, (0, bucket(len(text)) - len(text)))
        zero = np.zeros(2, np.int32)
        cache = model.init_cache(2, 8)
        tokens = np.ones((2, 2), np.int32)
        return run(model, padded, np.int32(len(text)), tokens, zero, cache, tokens, zero + 2)

    answer(np.arange(9))
    with count_compiles() as counter:
        answer(np.arange(14))
    assert counter.count == 0


def test_bfloat16_is_close_to_float32():
    """Rounding to eight bits in three layers: within a tenth of the spread of the logits."""
    model = made("everything", jnp.float32)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 23)
    logits = jax.jit(lambda model: model.head(model.forward(tokens)))
    want, got = logits(model), logits(half)
    assert got.dtype == jnp.float32
    assert half.init_cache(2, 3).keys[0].dtype == jnp.bfloat16
    assert jnp.sqrt(jnp.mean((got - want) ** 2)) < 0.1 * jnp.std(want)


def test_a_fork_continues_its_ancestor(dtype):
    """After a fork a row goes on as its ancestor would, for both ways and in both layouts."""
    ancestors, token = jnp.asarray([2, 2, 0], jnp.int32), jnp.asarray([5, 6, 7])
    tokens, seen = jnp.asarray([[1, 2], [3, 4], [5, 6]]), []
    for scanned in (False, True):
        model = made("plain", dtype, scanned)
        _, prompt = jax.jit(model.prefill)(jnp.arange(4), jnp.asarray(4))
        _, cache = jax.jit(model.extend)(prompt, model.init_cache(3, 5), tokens, jnp.zeros(3, jnp.int32))
        for way in ("copy", "moved"):
            forking = dataclasses.replace(model, fork=way)
            forked = forking.gather(cache, ancestors)
            seen.append(jax.jit(decode)(model, prompt, forked, token, jnp.full(3, 2))[0])
    plain = made("plain", dtype)
    for row in range(3):
        want = slow(plain, np.concatenate([np.arange(4), tokens[ancestors[row]], token[row : row + 1]]))[-1]
        for logits in seen:
            close(logits[row], want, dtype)


@pytest.mark.parametrize("scanned", quick([False, True], True))
def test_a_token_loop_writes_in_place(scanned, dtype, optimized):
    """The temporary memory of a loop is that of one layer at most: no cache is copied for each token."""
    config = Config(16, 8, 8, 8, 2, 1, head_dim=16, max_context=4096)
    shapes = jax.eval_shape(lambda: Transformer.random(jax.random.key(0), config, dtype, scanned))
    _, prompt = jax.eval_shape(Transformer.prefill, shapes, jnp.zeros(8, jnp.int32), jnp.int32(8))
    cache = jax.eval_shape(lambda model: model.init_cache(4, 4096), shapes)

    def loop(model, prompt, cache, steps):
        def body(state):
            t, token, cache = state
            logits, cache = decode(model, prompt, cache, token, jnp.full(4, t))
            return t + 1, jnp.argmax(logits, 1).astype(jnp.int32), cache

        start = (jnp.int32(0), jnp.zeros(4, jnp.int32), cache)
        return jax.lax.while_loop(lambda state: state[0] < steps, body, start)

    compiled = jax.jit(loop, donate_argnums=2).lower(shapes, prompt, cache, jnp.int32(9)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.4 * shapes.cache_bytes(4, 4096)


@pytest.mark.slow
def test_gradients_of_both_layouts_agree(dtype):
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 23)

    def loss(model):
        return jnp.mean(jax.nn.logsumexp(model.head(model.forward(tokens)), -1))

    one, all_ = (jax.jit(jax.grad(loss))(made("everything", dtype, scanned)) for scanned in (False, True))
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one.weights["blocks"])
    jax.tree.map(lambda a, b: close(a, b, dtype), together, all_.weights["blocks"])
    jax.tree.map(lambda a, b: close(a, b, dtype), one.weights["ends"], all_.weights["ends"])


@pytest.mark.parametrize("truncate", [False, True])
def test_yarn_by_its_definition(truncate):
    """Weights from the number of turns over the original context, a frequency at a time (Peng et al., section 3.2)."""
    dim, base, factor, original = 64, 1e4, 4.0, 2048
    rope = Rope("yarn", base, factor, original, 1.0, 32.0, truncate=truncate)
    got, scale = frequencies(rope, dim, 8192)

    def index(turns):  # where a frequency makes so many turns
        return dim / 2 * math.log(original / (2 * math.pi * turns), base)

    first, last = index(32.0), index(1.0)
    first, last = (math.floor(first), math.ceil(last)) if truncate else (first, last)
    for i, omega in enumerate(got):
        plain = base ** (-2 * i / dim)
        slowed = min(max((i - first) / (last - first), 0.0), 1.0)
        assert omega == pytest.approx((1 - slowed) * plain + slowed * plain / factor, rel=1e-12)
    assert scale == pytest.approx(0.1 * math.log(factor) + 1)
    both = dataclasses.replace(rope, mscale=0.7, mscale_all=0.3)
    want = (0.07 * math.log(factor) + 1) / (0.03 * math.log(factor) + 1)
    assert frequencies(both, dim, 8192)[1] == pytest.approx(want)
    assert frequencies(dataclasses.replace(rope, attention_factor=1.5), dim, 8192)[1] == 1.5


def test_long_texts_in_blocks_of_queries(key, dtype):
    length = 2 * BLOCK
    q = jax.random.normal(key, (1, length, 1, 2, 4), dtype)
    k, v = jax.random.normal(key, (2, 1, 1, length, 4), dtype)
    places = np.arange(length)
    mask = (places <= places[:, None]) & (places[:, None] - places < 700)
    want = attend(q, KeysAndValues(k, v, jnp.asarray(mask)[None]))
    np.testing.assert_allclose(causal(q, k, v, 700), want, atol=1e-10)


def test_the_protocol_and_the_sizes(dtype):
    model = made("everything", dtype)
    assert isinstance(model, LanguageModel)
    assert (model.vocab_size, model.max_context) == (23, 64)
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == model.config.num_parameters()
    _, prompt = model.prefill(jnp.arange(8), jnp.asarray(8))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves((prompt.keys, prompt.values))) == model.prompt_bytes(8)
    deep = dataclasses.replace(SMALL, num_layers=33, windows=())
    assert jax.eval_shape(lambda: Transformer.random(jax.random.key(0), deep)).scanned
    fresh = jax.jit(Transformer.random, static_argnums=(1, 2))(jax.random.key(0), SMALL, dtype)
    spread = jnp.std(jax.jit(lambda model: model.head(model.forward(jnp.arange(20)[None])))(fresh))
    assert 0.5 < spread < 2.0  # logits of order one: a random network is neither flat nor certain
    assert not model.scanned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "multiple"),
        ({"head_dim": 5}, "even"),
        ({"windows": (1, 2)}, "each of the 3 layers"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "yarm"}, "did you mean 'yarn'"),
        ({"theta": 0.5}, "theta > 1"),
        ({"factor": 0.5}, "factor >= 1"),
        ({"kind": "llama3", "low": 4.0, "high": 1.0}, "0 < low < high"),
    ],
)
def test_impossible_rotations(options, message):
    with pytest.raises(ValueError, match=message):
        Rope(**options)
