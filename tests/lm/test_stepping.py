"""One step by its definition: the distribution of a token under potentials, and a forced step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import lm
from probinfer.lm.generation.stepping import next_token_distributions
from probinfer.lm.generation.texts import Record
from probinfer.lm.generation.token_model import extend_particles, init_particles
from probinfer.lm.rewards.deferred import bind
from tests.lm import tables

METHOD = lm.ParticleFilter(3, step=lm.until(";", max_tokens=3))


def test_the_law_of_a_token_is_the_models_times_its_factors_normalized():
    constraint = bind(lm.rewards.regex("a+"), tables.model().tokenizer)
    token_model = tables.token_model(METHOD, "none", potential=constraint)
    start = init_particles(token_model, 3)
    log_prior, log_proposal, log_potentials = next_token_distributions(
        token_model.setup, start.text.logits, start.potential_state, start.text.tokens, start.text.length
    )
    assert np.isneginf(np.asarray(log_potentials)).any()
    product = np.exp(np.asarray(log_prior)) * np.exp(np.asarray(log_potentials))
    np.testing.assert_allclose(
        np.exp(log_proposal), product / product.sum(1, keepdims=True), rtol=1e-12, atol=0
    )
    np.testing.assert_allclose(
        log_prior, jax.nn.log_softmax(token_model.logits)[None] * np.ones((3, 1)), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("tokens", "length", "possible"), [([0, 1, 0], 2, True), ([0, 1, 0], 3, False), ([0, 0, 0], 3, True)]
)
def test_a_forced_step_is_taken_or_has_weight_zero(key, tokens, length, possible):
    """A step ends with ";", token 1: no step goes on behind it. The other particles are free."""
    token_model = tables.token_model(METHOD, "none")
    forced = Record(jnp.asarray(tokens, jnp.int32), jnp.int32(length))
    particles, log_weights = extend_particles(token_model, key, init_particles(token_model, 3), forced)
    np.testing.assert_array_equal(np.asarray(log_weights), [0.0 if possible else -np.inf, 0, 0])
    if possible:
        np.testing.assert_array_equal(particles.last_step.tokens[0, :length], tokens[:length])
        assert particles.last_step.length[0] == length
