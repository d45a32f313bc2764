"""Particle Gibbs over texts leaves text and data distributed as they were; with a fault, which is data, it does not.

A text of a tabular model is the parameter. Each of its steps is seen through a noisy channel: a class of the prefix,
told rightly with probability RIGHT. The texts' posterior given what was told is what a pass must leave alone.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from probinfer import checks, lm
from probinfer.core.types import field, pytree
from probinfer.lm.generation.texts import Record
from probinfer.lm.generation.token_model import feynman_kac
from probinfer.lm.methods.filters import resampler_for
from probinfer.lm.rewards.algebra import Potential
from probinfer.smc.conditional.gibbs import gibbs_step
from tests.lm import tables

LENGTH, CLASSES, RIGHT, EOS, PARTICLES = 3, 3, 0.9, 2, 4
METHOD = lm.ParticleGibbs(PARTICLES, 1, step=lm.every(1))


def class_of(prefix_code):
    return (prefix_code * 7 // 5) % CLASSES


@pytree
class Told(Potential):
    """What was told of each step, (T,) classes: its likelihood against a channel that tells nothing."""

    told: Any

    def init(self, context, num):
        return jnp.zeros(num, jnp.int32)

    def advance(self, state, view):
        code = (state * 5 + view.step_tokens[:, 0] + 1) % 97
        hit = class_of(code) == self.told[view.t]
        chance = jnp.where(hit, RIGHT, (1 - RIGHT) / (CLASSES - 1))
        return jnp.where(view.active, code, state), jnp.log(CLASSES * chance).astype(view.step_log_prob.dtype)


@cache
def network():
    with jax.ensure_compile_time_eval():
        return tables.model().network


def draw_text(key):
    """Tokens (T,) of the model, the end token repeated after the end."""
    table = network()

    def walk(carry, key):
        state, ended = carry
        token = jax.random.categorical(key, table.logits[state])
        token = jnp.where(ended, EOS, token)
        return (table.transitions[state, token], ended | (token == EOS)), token.astype(jnp.int32)

    state = table.start
    for token in tables.PROMPT:
        state = table.transitions[state, token]
    return jax.lax.scan(walk, (state, jnp.asarray(False)), jax.random.split(key, LENGTH))[1]


def tell(key, text):
    """Classes (T,) through the channel; after the end, all alike."""

    def walk(carry, xs):
        code, ended = carry
        token, key = xs
        code = (code * 5 + token + 1) % 97
        others = (1 - RIGHT) / (CLASSES - 1)
        chance = jnp.where(jnp.arange(CLASSES) == class_of(code), RIGHT, others)
        told = jax.random.categorical(key, jnp.where(ended, 0.0, jnp.log(chance)))
        return (code, ended | (token == EOS)), told

    start = (jnp.int32(0), jnp.asarray(False))
    return jax.lax.scan(walk, start, (text, jax.random.split(key, LENGTH)))[1]


def fit(text, told):
    """Log likelihood of what was told."""

    def walk(carry, xs):
        code, ended, total = carry
        token, said = xs
        code = (code * 5 + token + 1) % 97
        chance = jnp.where(class_of(code) == said, RIGHT, (1 - RIGHT) / (CLASSES - 1))
        total = total + jnp.where(ended, 0.0, jnp.log(chance))
        return (code, ended | (token == EOS), total), None

    start = (jnp.int32(0), jnp.asarray(False), jnp.zeros(()))
    return jax.lax.scan(walk, start, (text, told))[0][2]


def length_of(text, told):
    return 1.0 * jnp.sum(jnp.cumsum(text == EOS) == 0)


@pytree
class Pass:
    """One pass; the fault of ancestor sampling is to take what follows upside down, ten times as strongly, otherwise
    to drop the reward.
    """

    model: Any
    fault: Any
    ways: str = field(static=True)

    def __call__(self, key, text, told):
        fault = jnp.asarray(self.fault)
        potential = lm.rewards.algebra.temper(Told(told), 1 - fault * (self.ways == "genealogy"))
        fk = feynman_kac(replace(self.model, setup=replace(self.model.setup, potential=potential)))
        if self.ways == "ancestor":
            fk = replace(fk, log_suffix=jax.tree_util.Partial(scaled, 1 - 10 * fault, fk.log_suffix))
        ended = jnp.cumsum(text == EOS) - (text == EOS)
        path = Record(text[:, None], jnp.where(ended > 0, 0, 1).astype(jnp.int32))
        scheme = resampler_for(METHOD.trigger, METHOD.resampling, LENGTH).conditional()
        path, _ = gibbs_step(key, fk, scheme, path, PARTICLES, self.ways)
        return jnp.where(path.length > 0, path.tokens[:, 0], EOS)


def scaled(share, log_suffix, particles, records, t):
    found = log_suffix(particles, records, t)
    return jnp.where(found > -jnp.inf, share * found, found)


def judge(ways, fault, seed):
    token_model = tables.token_model(
        METHOD, None, max_tokens=LENGTH, potential=Told(jnp.zeros(LENGTH, jnp.int32))
    )
    return checks.joint_test(
        jax.random.key(seed),
        draw_text,
        tell,
        Pass(token_model, jnp.asarray(fault, float), ways),
        reverse="same" if ways == "genealogy" else None,  # ancestor sampling is not reversible
        quantities={"fit": fit, "length": length_of},
        num_simulations=3000,
        num_draws=25,
        level=1e-4,
        mode="vmap",
        progress=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("ways", ["genealogy", "ancestor"])
def test_particle_gibbs_over_texts(ways):
    right = judge(ways, 0.0, 1)
    assert right.passed, right.verdict  # a false alarm has probability 1e-4
    broken = judge(ways, 1.0, 2)
    assert broken.passed is False, broken.verdict  # over keys p is below 1e-10
