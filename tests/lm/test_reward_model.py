"""The reward model with its own cache, against scoring every prefix from scratch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.lm.models.base import Context
from probinfer.lm.models.tabular import Tabular
from probinfer.lm.models.transformer import Config, Transformer
from probinfer.lm.rewards.base import View
from probinfer.lm.rewards.model import RewardModel

CONFIG = Config(
    vocab_size=13,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    max_context=64,
)
ROOM = 40


def model_of(key, **settings):
    return RewardModel(
        Transformer.random(key, CONFIG),
        jax.random.normal(key, (16,), jnp.float32),
        jnp.float32(0.3),
        ROOM,
        **settings,
    )


@partial(jax.jit, static_argnums=2)
def start(model, context, num):
    return model.init(context, num)


@jax.jit
def fork(model, state, ancestors):
    return model.gather(state, ancestors)


def view_of(context, step_tokens, step_length, t=0):
    """What a score may look at; ``RewardModel`` reads the step alone."""
    num = len(step_length)
    zeros, active = jnp.zeros(num), step_length > 0
    tokens, length = jnp.zeros((num, ROOM), jnp.int32), jnp.zeros(num, jnp.int32)
    return View(
        context, tokens, length, step_tokens, step_length, active, ~active, ~active, zeros, jnp.asarray(t)
    )


def drawn_steps(seed, num, steps, width):
    """Ragged steps, some empty; what stands behind a step's end is garbage, not zeros."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 13, (steps, num, width)).astype(np.int32)
    length = np.where(rng.random((steps, num)) < 0.2, 0, rng.integers(1, width + 1, (steps, num)))
    return tokens, length.astype(np.int32)


def from_scratch(model, context, texts):
    """Value of each prefix by one whole pass over prompt and prefix."""
    prompt = np.asarray(context.tokens)[: int(context.length)]
    padded = [np.concatenate([prompt, text, np.zeros(64 - len(prompt) - len(text), int)]) for text in texts]
    ends = [len(prompt) + len(text) - 1 for text in texts]
    values = logits(model, jnp.asarray(np.stack(padded), jnp.int32))
    return np.asarray(values)[np.arange(len(texts)), ends]


@jax.jit
def logits(model, tokens):
    return model.logits(tokens)


@pytest.mark.f32
@pytest.mark.parametrize("chunk", [3, 16])
def test_equals_scoring_the_whole_prefix(key, chunk):
    """Seven ragged steps of at most five tokens with resampling between them, chunks shorter and longer than a step."""
    model = model_of(key, chunk=chunk)
    context = Context(jnp.asarray([3, 1, 4, 1, 5, 9, 0, 0], jnp.int32), jnp.int32(6))
    tokens, length = drawn_steps(0, 6, 7, 5)
    state, texts, rng = start(model, context, 6), [np.zeros(0, int)] * 6, np.random.default_rng(1)
    np.testing.assert_allclose(state.value, from_scratch(model, context, texts), atol=2e-5)
    step = jax.jit(lambda state, view: model.step(state, view))
    for t in range(7):
        state, value = step(state, view_of(context, tokens[t], length[t], t))
        texts = [np.concatenate([text, tokens[t, n, : length[t, n]]]) for n, text in enumerate(texts)]
        np.testing.assert_allclose(value, from_scratch(model, context, texts), atol=2e-5)
        ancestors = rng.integers(0, 6, 6)
        state, texts = fork(model, state, jnp.asarray(ancestors)), [texts[a] for a in ancestors]
    assert value.dtype == jnp.float32


def test_any_trunk_serves(key):
    """A table's hidden state is its automaton's state, so the value is known exactly."""
    trunk = Tabular.random(key, vocab_size=3, order=2, max_context=32)
    model = RewardModel(trunk, jnp.array([2.0]), jnp.array(0.5), 16, chunk=2)
    context = Context(jnp.array([1, 2, 0], jnp.int32), jnp.int32(2))
    tokens = jnp.array([[0, 1, 2], [2, 2, 0]], jnp.int32)
    _, value = model.step(model.init(context, 2), view_of(context, tokens, jnp.array([3, 2], jnp.int32)))
    expected = []
    for text in ([1, 2, 0, 1, 2], [1, 2, 2, 2]):
        state = 0
        for token in text:
            state = int(trunk.transitions[state, token])
        expected.append(2.0 * state + 0.5)
    np.testing.assert_array_equal(value, expected)


def test_several_prompts_are_one_by_one(key):
    """``vmap`` over prompts of different lengths; the chunks of the longest step serve all."""
    model = model_of(key, chunk=2)
    prompts = Context(jnp.asarray([[1, 2, 3, 0], [4, 5, 6, 7]], jnp.int32), jnp.asarray([3, 4], jnp.int32))
    tokens, length = drawn_steps(2, 2 * 3, 1, 6)
    tokens, length = tokens.reshape(2, 3, 6), jnp.asarray(length.reshape(2, 3)).at[0].min(2)

    @jax.jit
    def score(context, tokens, length):
        return model.step(model.init(context, 3), view_of(context, tokens, length))[1]

    both = jax.vmap(score)(prompts, tokens, length)
    for q in range(2):
        alone = score(Context(prompts.tokens[q], prompts.length[q]), tokens[q], length[q])
        np.testing.assert_allclose(both[q], alone, atol=1e-5)


def test_the_loop_of_several_prompts_copies_no_cache(key):
    """Its bound is one number for all prompts: with one for each, ``vmap`` would select among whole caches."""
    model = model_of(key, chunk=2)
    prompts = Context(jnp.zeros((2, 4), jnp.int32), jnp.asarray([3, 4], jnp.int32))
    tokens, length = jnp.zeros((2, 3, 6), jnp.int32), jnp.ones((2, 3), jnp.int32)

    def score(context, tokens, length):
        return model.step(model.init(context, 3), view_of(context, tokens, length))[1]

    program = jax.jit(jax.vmap(score)).lower(prompts, tokens, length).as_text()
    cache = f"tensor<2x3x2x{ROOM}x4xf32>"
    assert [line for line in program.splitlines() if "stablehlo.while" in line or cache in line]
    assert not [line for line in program.splitlines() if "stablehlo.select" in line and cache in line]


def test_same_shapes_are_not_traced_again(key, count_compiles):
    model = model_of(key)
    step = jax.jit(lambda model, state, view: model.step(state, view))
    context = Context(jnp.asarray([1, 2, 3, 0], jnp.int32), jnp.int32(3))
    tokens, length = drawn_steps(3, 4, 2, 5)
    state, _ = step(model, start(model, context, 4), view_of(context, tokens[0], length[0]))
    other = jax.tree.map(lambda leaf: 2 * leaf, model)
    view = view_of(context, tokens[1], length[1], 1)
    with count_compiles() as compiles:
        step(other, state, view)
    assert compiles.count == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": jnp.ones((16, 1))}, "weight must have 1 axes"),
        ({"bias": jnp.ones(1)}, "bias must have 0 axes"),
        ({"max_tokens": 0}, "max_tokens must be a positive"),
        ({"chunk": 0}, "chunk must be a positive"),
    ],
)
def test_bad_heads_and_counts_are_refused(key, change, message):
    good = {"weight": jnp.ones(16), "bias": jnp.array(0.0), "max_tokens": 8, "chunk": 4}
    with pytest.raises(ValueError, match=message):
        RewardModel(Transformer.random(key, CONFIG), **{**good, **change})


def test_room_beyond_the_context_is_refused(key):
    context = Context(jnp.zeros(32, jnp.int32), jnp.int32(3))
    with pytest.raises(ValueError, match="padded prompt of 32 tokens and 40"):
        model_of(key).init(context, 2)
    assert jax.eval_shape(lambda: model_of(key).with_room(32).init(context, 2)).value.shape == (2,)
    assert RewardModel(Transformer.random(key, CONFIG), jnp.ones(16), 0.0).init(context, 2).value.shape == (
        2,
    )
