"""The bytes of a run, predicted: against what is allocated, and refused before anything is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from degraded import degrade

from probinfer import lm
from probinfer.lm.generation.prompts import Limits, _num_chains, prepare
from probinfer.lm.models import memory
from probinfer.lm.models.base import Context
from probinfer.lm.models.transformer import Config, Transformer
from probinfer.lm.rewards.calibration import Affine
from probinfer.lm.rewards.deferred import bind
from probinfer.lm.rewards.model import RewardModel
from tests.lm import tables

SMALL = {"vocab_size": 8, "intermediate_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2}
KEY = jax.random.key(5)
STEP = lm.every(2)


def reward_model(width=16, max_tokens=None):
    trunk = Transformer.random(KEY, Config(hidden_size=width, max_context=4096, **SMALL))
    return RewardModel(trunk, jnp.ones(width, jnp.float32), jnp.float32(0.3), max_tokens)


def size_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


REWARDS = {
    "model": (lambda score: score, 1),
    "odds": (lambda score: lm.rewards.from_score(score), 1),
    "twist": (lambda score: lm.rewards.from_score(score, meaning="twist"), 1),
    "sum": (lambda score: lm.rewards.from_score(score) + lm.rewards.sharpened(2.0) + _odds(score), 2),
    "power": (lambda score: 0.5 * lm.rewards.from_score(score), 1),
    "calibrated": (lambda score: lm.rewards.calibrated(score, Affine(jnp.ones(()), jnp.zeros(()))), 1),
    "degraded": (lambda score: degrade(score, 1.0), 1),
    "all": (lambda score: 0.5 * _odds(degrade(score, 1.0)) + lm.rewards.self_certainty(), 1),
}


def _odds(score):
    return lm.rewards.from_score(score, meaning="odds")


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_pass_on_the_bytes_of_the_models_in_them(name):
    """Beside the caches a state has a few numbers a particle, far fewer bytes than one more model would."""
    make, num_models = REWARDS[name]
    score = reward_model(max_tokens=40)
    reward = make(score)
    state = reward.init(Context(jnp.zeros(16, jnp.int32), jnp.int32(3)), 5)
    known = reward.cache_bytes(5, 999) + reward.prompt_bytes(16)  # a room of its own, whatever the run has
    trunk = score.trunk
    assert known == num_models * (size_of(trunk.init_cache(5, 40)) + trunk.prompt_bytes(16))
    assert 0 <= size_of(state) - known <= 5 * 64
    free = make(reward_model())
    assert free.cache_bytes(5, 40) == reward.cache_bytes(5, 40)  # room for the texts of the run


def test_rewards_without_caches_need_nothing():
    for reward in (
        tables.reward("twist"),
        lm.rewards.self_certainty(),
        lm.rewards.sharpened(2.0),
        bind(None, None),
    ):
        assert reward.cache_bytes(1000, 1000) == reward.prompt_bytes(1000) == 0


def test_prompts_side_by_side_multiply_everything():
    """Three of five prompts, four texts each: what is allocated, times how often programs hold it."""
    network, reward = reward_model(8).trunk, _odds(reward_model())
    context = Context(jnp.zeros((3, 16), jnp.int32), jnp.full(3, 2, jnp.int32))
    caches = jax.vmap(lambda _: network.init_cache(4, 7))(jnp.arange(3))
    prompt = network.prefill(context.tokens[0], context.length[0])[1]
    parts = memory.Load(4, 16, 7, batch=3, num_prompts=5).parts(network, reward)
    assert parts["the caches of the texts"] == 3 * size_of(caches)
    assert parts["the prompts"] == (5 + 3) * size_of((prompt.keys, prompt.values))
    room = reward.score.with_room(7)
    held = jax.vmap(lambda context: room.init(context, 4))(context)
    assert parts["the caches of the reward"] == 3 * size_of(held.cache) + size_of(
        (held.prompt.keys, held.prompt.values)
    )
    assert sum(parts.values()) == memory.predicted_bytes(network, 4, 16, 7, reward, batch=3, num_prompts=5)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", [lm.ParticleFilter(8, step=STEP), lm.ParticleGibbs(8, 2, step=STEP)])
def test_compiled_programs_hold_what_is_predicted(batch, method):
    """Temporary memory of the program within a tenth, texts and records left out; a fork in place needs less."""
    score = reward_model(32)
    model = lm.Model(score.trunk, lm.Vocabulary("abcdefg."))
    potential = bind(score, model.tokenizer)
    [token_model] = prepare(model, [np.arange(7)], method, potential, lm.Proposal(), Limits(512, 8, ()))
    keys = jax.random.split(KEY, batch)
    run = (
        jax.vmap(lambda key: method.run(key, token_model))
        if batch > 1
        else lambda keys: method.run(keys[0], token_model)
    )
    held = jax.jit(run).lower(keys).compile().memory_analysis().temp_size_in_bytes
    more = {"batch": batch, "chains": _num_chains(method)}
    known = memory.predicted_bytes(model.network, method.num_rows, 16, 512, potential, **more)
    assert known / 3 < held < 1.1 * known


def test_any_network_that_tells_its_bytes_is_checked():
    class Large:
        vocab_size = 10

        def cache_bytes(self, num, size):
            return num * size * 2**30

        def prompt_bytes(self, size):
            return 0

    with pytest.raises(MemoryError, match="lower max_tokens"):
        memory.check_memory(Large(), 1000, 16, 100)


@pytest.fixture
def nothing_is_allocated(monkeypatch):
    def refuse(*args):
        raise AssertionError("allocated")

    for cls in (Transformer, lm.Tabular):
        for name in ("prefill", "init_cache"):
            monkeypatch.setattr(cls, name, refuse)


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        (lm.ParticleFilter(10**9, step=STEP), {}, r"1000000000 texts .* num_particles \(n of a search\)"),
        (lm.ParticleFilter(4, step=STEP), {"batch": 10**9}, "4 prompts side by side"),
        (lm.Adaptive(lm.ParticleGibbs(10**9, 2, step=STEP)), {}, "1000000000 texts"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(
    nothing_is_allocated, monkeypatch, method, settings, words
):
    if settings:
        monkeypatch.setattr(memory, "available_bytes", lambda: 10_000)
    reward = 0.5 * lm.rewards.from_score(reward_model(64))
    prompts = ["a;"] * 4
    with pytest.raises(MemoryError, match=f"{words}.*") as caught:
        lm.infer(KEY, tables.model(), prompts, reward, method, max_tokens=64, progress=False, **settings)
    assert "the largest part is the caches of the reward" in str(caught.value)
    assert "smaller reward model" in str(caught.value)


@pytest.mark.slow
def test_the_reward_and_the_prompts_side_by_side_decide(monkeypatch):
    """Memory for the text alone: refused with a reward model; for two prompts: refused with three, not with one."""
    model, method, settings = (
        tables.model(),
        lm.ParticleFilter(4, step=STEP),
        {"max_tokens": 4, "progress": False},
    )
    reward = lm.rewards.from_score(RewardModel(model.network, jnp.ones(1), 0.0))
    alone = memory.predicted_bytes(model.network, 4, 16, 4)
    monkeypatch.setattr(memory, "available_bytes", lambda: alone)
    assert lm.infer(KEY, model, "a;", None, method, **settings).texts
    with pytest.raises(MemoryError, match="largest part"):
        lm.infer(KEY, model, "a;", reward, method, **settings)
    two = memory.predicted_bytes(model.network, 4, 16, 4, reward, batch=2, num_prompts=3)
    monkeypatch.setattr(memory, "available_bytes", lambda: two)
    assert len(lm.infer(KEY, model, ["a;"] * 3, reward, method, batch=1, **settings)) == 3
    with pytest.raises(MemoryError, match=r"3 prompts side by side.*lower batch to 2"):
        lm.infer(KEY, model, ["a;"] * 3, reward, method, batch=3, **settings)


@pytest.mark.parametrize("chains", [0, 1, 3])
def test_what_is_advised_fits_and_one_more_does_not(monkeypatch, chains):
    network, reward, load = (
        reward_model(8).trunk,
        _odds(reward_model()),
        memory.Load(40, 16, 512, 6, 9, chains),
    )
    there = sum(load.parts(network, reward).values()) // 3
    monkeypatch.setattr(memory, "available_bytes", lambda: there)
    with pytest.raises(MemoryError) as caught:
        memory.check_memory(network, 40, 16, 512, reward, batch=6, num_prompts=9, chains=chains)
    found = re.search(r"batch to (\d+), or .*: (\d+) texts at once .* max_tokens to (\d+)", str(caught.value))
    for name, value in zip(("batch", "num_rows", "max_tokens"), map(int, found.groups()), strict=True):
        sizes = [
            sum(load._replace(**{name: each}).parts(network, reward).values()) for each in (value, value + 1)
        ]
        assert sizes[0] <= there < sizes[1]
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 * network.prompt_bytes(16))
    with pytest.raises(MemoryError, match="no setting alone is enough"):
        memory.check_memory(network, 40, 16, 512, reward, batch=6, num_prompts=9)
    with pytest.raises(MemoryError, match="fewer or shorter prompts"):
        memory.check_memory(network, 1, 1024, 1, None, num_prompts=9)
