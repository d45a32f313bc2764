"""Weights of answers: one text drawn by them, and batches pooled by their evidence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import lm
from probinfer.lm.facade import run_prepared
from probinfer.lm.methods.adaptive import _log_weights
from tests.lm import tables

KEY = jax.random.key(11)


def test_texts_are_drawn_by_their_weights_and_never_without():
    model, method = tables.model(), lm.MajorityVote(4, step=1)
    settings = {"answer": lm.answers.text, "max_tokens": 4, "progress": False}
    result = lm.infer(KEY, model, "a;", None, method, **settings)
    result = dataclasses.replace(result, texts=["1", "2", "3", "4"])
    one = dataclasses.replace(result, log_weights=np.array([-np.inf, -np.inf, -3.0, -np.inf]))
    assert {one.sample(key) for key in jax.random.split(KEY, 20)} == {"3"}
    dead = dataclasses.replace(result, log_weights=np.full(4, -np.inf))
    with pytest.raises(ValueError, match=r"all 4 texts have weight zero.*softer reward"):
        dead.sample(KEY)
    with pytest.raises(ValueError, match="finite or minus infinity"):
        dataclasses.replace(result, log_weights=np.full(4, np.nan)).sample(KEY)


def test_batches_that_died_have_no_share_in_the_pool():
    """One batch died in a later step, where its weights still stand as they were; the other one has an evidence."""
    method = lm.ParticleFilter(2, step=1)
    draws = run_prepared(KEY, tables.token_model(method, "odds"), method)
    dead = draws._replace(log_weights=jnp.asarray([0.0, -1.0]), log_evidence=jnp.asarray(-jnp.inf))
    alive = draws._replace(log_weights=jnp.asarray([-2.0, -3.0]), log_evidence=jnp.asarray(-50.0))
    found = _log_weights([dead, alive])
    np.testing.assert_array_equal(found[:2], -np.inf)
    assert np.logaddexp.reduce(found) == pytest.approx(-50)
    np.testing.assert_array_equal(_log_weights([dead, dead]), -np.inf)
