"""A tabular model, a score of prefixes, and their oracle: what the tests of methods share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import lm
from probinfer.core.types import pytree
from probinfer.lm.facade import run_prepared
from probinfer.lm.generation.prompts import Limits, encode, prepare
from probinfer.lm.rewards.deferred import bind
from probinfer.lm.rewards.meanings import Score
from tests.reference import language as ref

Z_LIMIT = 6.5  # two-sided 8e-11 a comparison: fewer than 10^4 in the tests of lm, so 1e-6 in all
RARE = 0.02  # a class: 40 of 2000 texts and more
SPELL = ("a", ";", ".", "b", "c", "d")  # token 2 ends a text, token 1 a step
PROMPT = (0, 1)


@pytree
class PrefixScore(Score):
    """A logit for every prefix, from a hash of its tokens."""

    table: object
    scale = "logit"

    def step(self, state, view):
        def mix(carry, xs):
            token, j = xs
            return jnp.where(j < view.length, (carry * 5 + token + 1) % self.table.shape[0], carry), None

        start = jnp.zeros_like(view.length)
        found, _ = jax.lax.scan(mix, start, (view.tokens.T, jnp.arange(view.tokens.shape[1])))
        return state, self.table[found]


TABLE = np.random.default_rng(3).normal(size=97) * 2.0


def score(prefix):
    """The probability of ``PrefixScore``, in Python."""
    found = 0
    for token in prefix:
        found = (found * 5 + token + 1) % 97
    return 1 / (1 + np.exp(-TABLE[found]))


def reward(meaning):
    if meaning == "none":
        return None
    return lm.rewards.from_score(PrefixScore(jnp.asarray(TABLE, jnp.result_type(float))), meaning=meaning)


def model(vocab=3, order=2, seed=0):
    """The same table whatever ``--key-offset`` says: it is the case, and not what happens in it."""
    key = jax.random.wrap_key_data(jnp.asarray([0, seed], jnp.uint32))
    network = lm.Tabular.random(key, vocab, order=order)
    return lm.Model(network, lm.Vocabulary(SPELL[:vocab], eos="."))


def token_model(
    method, meaning, max_tokens=4, language_model=None, proposal=None, max_steps=None, stop=(), potential=None
):
    """What ``lm.infer`` hands to a method."""
    language_model = model() if language_model is None else language_model
    limits = Limits(max_tokens, max_steps, stop)
    potential = bind(reward(meaning), language_model.tokenizer) if potential is None else potential
    tokens = encode(language_model, list(PROMPT), False)
    return prepare(
        language_model, [tokens], method, potential, lm.Proposal() if proposal is None else proposal, limits
    )[0]


def oracle(meaning, max_tokens, size, delimiter=None, language_model=None, **law):
    """Posterior of all texts and log evidence, in plain Python."""
    language_model = model() if language_model is None else language_model
    logits, transitions = (
        np.asarray(language_model.network.logits),
        np.asarray(language_model.network.transitions),
    )
    found = ref.texts(logits, transitions, 0, PROMPT, (2,), max_tokens, **law)
    weighted = {}
    for text, log_prob in found:
        cut = ref.steps(text, size, delimiter, SPELL)
        weighted[text] = log_prob + (0 if meaning == "none" else ref.log_reward(text, cut, score, meaning))
    return ref.posterior(weighted)


def repeated(method, prepared, num, seed=0):
    """The texts of many runs of a token model, each with its own key, in one program."""
    keys = jax.random.split(jax.random.key(seed), num)
    return jax.jit(jax.vmap(lambda key: run_prepared(key, prepared, method)))(keys)


def classes(tokens, length):
    """The event that is counted of each text: its first token and its length."""
    return np.asarray(tokens)[..., 0] * 100 + np.asarray(length)


def truth(posterior):
    """Probabilities of the classes that are seen often enough for a normal law of their means."""
    found = {}
    for text, p in posterior.items():
        name = text[0] * 100 + len(text)
        found[name] = found.get(name, 0) + p
    return {name: p for name, p in found.items() if p > RARE}


def z_scores(estimates, exact):
    """Of means over runs."""
    mean, error = estimates.mean(axis=0), estimates.std(axis=0, ddof=1) / np.sqrt(len(estimates))
    return (mean - exact) / np.maximum(error, 1e-12)


def oracle_of(meaning, step):
    delimiter = step.delimiters[0] if step.delimiters else None
    return oracle(meaning, 4, min(step.size, 4), delimiter)


def pairs(methods, meanings, name, num_quick=None):
    """Every method with every meaning; the quick tests take one meaning of each of the first ``num_quick`` methods."""
    taken = [(i, i % len(meanings)) for i in range(len(methods))][:num_quick]
    return [
        pytest.param(
            method, meaning, id=f"{name(method)}-{meaning}", marks=[pytest.mark.slow] * ((i, j) not in taken)
        )
        for i, method in enumerate(methods)
        for j, meaning in enumerate(meanings)
    ]
