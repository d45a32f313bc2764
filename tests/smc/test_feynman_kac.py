from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from probinfer import resampling, smc
from probinfer.smc.models.feynman_kac import as_batched
from tests.reference import hmm
from tests.smc import models
from tests.smc.models import Z_LIMIT, z_scores


class Paged(NamedTuple):
    """Particles of the linear model with values in one buffer; ``page`` is the index that each particle reads."""

    page: object  # (N,)
    buffer: object  # (N,)
    prompt: object  # (3,): common to all, no particle axis
    copies: object  # (): rows moved so far


def _paged_init(plain, key, num):
    values, log_weights = plain.init(key, num)
    return Paged(jnp.arange(num), values, jnp.arange(3.0), jnp.int32(0)), log_weights


def _paged_extend(plain, key, particles, t):
    values, increments = plain.extend(key, _values(particles), t)
    return particles._replace(page=jnp.arange(len(values)), buffer=values), increments


def _paged_gather(particles, ancestors):
    num_copied = jnp.sum(ancestors != jnp.arange(len(ancestors)), dtype=jnp.int32)
    return particles._replace(page=particles.page[ancestors], copies=particles.copies + num_copied)


def _values(particles):
    return particles.buffer[particles.page]


def paged(plain):
    return smc.BatchedFeynmanKac(
        Partial(_paged_init, plain), Partial(_paged_extend, plain), _paged_gather, record=_values
    )


def test_shared_storage_gives_the_same_draws_and_identity_copies_nothing(key, dtype):
    y = jnp.asarray(np.random.default_rng(5).normal(size=12), dtype)
    plain = smc.lift(models.linear(y))
    often, never = (
        resampling.adaptive("systematic", Partial(_maybe, jnp.asarray(yes))) for yes in (True, False)
    )
    expected = smc.particle_filter(key, plain, 12, 30, resampling=often)
    actual = smc.particle_filter(key, paged(plain), 12, 30, resampling=often)
    rounding = 40 * float(jnp.finfo(dtype).eps)  # of programs that are compiled apart
    for name in ("paths", "log_weights", "ess"):
        np.testing.assert_allclose(
            getattr(actual, name), getattr(expected, name), rtol=rounding, atol=rounding, err_msg=name
        )
    num_moved = (actual.ancestors != np.arange(30)).sum()
    assert actual.particles.copies == num_moved > 0
    identity = smc.particle_filter(key, paged(plain), 12, 30, resampling=never)
    assert identity.particles.copies == 0
    assert identity.particles.prompt.shape == (3,)


def _maybe(yes, log_weights, t):
    return yes & (t % 3 != 0)


ABSORBED = 2


def absorbing_model():
    """Three states; the last one is absorbing and not weighed."""
    model = hmm.random_model(4, num_states=3, num_steps=5)
    transition, log_potential = model.transition.copy(), model.log_potential.copy()
    transition[:, ABSORBED] = np.eye(3)[ABSORBED]
    log_potential[1:, ABSORBED, ABSORBED] = 0.0
    return model._replace(transition=transition, log_potential=log_potential)


def _extend_with_noise(plain, key, particles, t):
    propagated, increments = plain.extend(key, particles, t)
    # the increment of a finished particle is not used
    return propagated, jnp.where(particles == ABSORBED, jnp.nan, increments)


def _is_absorbed(particles):
    return particles == ABSORBED


def test_particles_that_are_done_keep_their_weight_and_end_the_loop(dtype):
    model = absorbing_model()
    expected = hmm.marginals(model)
    plain = smc.lift(models.finite(model, dtype))
    stopping = smc.BatchedFeynmanKac(plain.init, Partial(_extend_with_noise, plain), done=_is_absorbed)

    @jax.jit
    @jax.vmap
    def run(key):
        result = smc.particle_filter(key, stopping, 5, 4, store="paths")
        ended = jnp.exp(result.log_weights) / 4 * (result.particles == ABSORBED)
        mass = jnp.sum(
            jnp.exp(result.log_weights)[:, None, None] / 4 * jax.nn.one_hot(result.paths[:, :1], 3), axis=0
        )
        return jnp.exp(result.log_evidence), ended.sum(), mass, result

    evidence, ended, mass, result = run(jax.random.split(jax.random.key(0), 20_000))
    assert abs(z_scores(evidence, expected[0].sum())) < Z_LIMIT
    assert abs(z_scores(ended, expected[-1, ABSORBED])) < Z_LIMIT
    assert np.all(np.abs(z_scores(mass, expected[:1])) < Z_LIMIT)
    early = np.asarray(result.num_steps) < 5
    assert 0.01 < early.mean() < 0.99
    # after the end: identity, nothing recorded, scalars as they were
    early_run = jax.tree.map(lambda leaf: np.asarray(leaf)[np.argmax(early)], result)
    num_steps = early_run.num_steps
    assert np.all(early_run.particles == ABSORBED)
    assert np.all(early_run.ancestors[num_steps:] == np.arange(4))
    assert np.all(early_run.paths[:, num_steps:] == 0)
    assert np.all(early_run.paths[:, num_steps - 1] == ABSORBED)
    assert np.all(early_run.ess[num_steps - 1 :] == early_run.ess[-1])
    assert np.all(early_run.log_evidences[num_steps - 1 :] == early_run.log_evidence)


def _fault(plain, at, key, particles, t):
    propagated, increments = plain.extend(key, particles, t)
    return propagated, jnp.where(t == at, -jnp.inf, increments)


def test_a_model_with_a_cache_stops_at_the_failed_step(key, dtype):
    plain = smc.lift(models.linear(jnp.ones(8, dtype)))
    faulty = smc.BatchedFeynmanKac(plain.init, Partial(_fault, plain, jnp.int32(3)))
    cached = smc.BatchedFeynmanKac(plain.init, Partial(_fault, plain, jnp.int32(3)), record=lambda x: x)
    small, large = (smc.particle_filter(key, model, 8, 20) for model in (faulty, cached))
    assert large.num_steps == 4
    assert small.stopped_at == large.stopped_at == 3
    assert small.log_evidence == large.log_evidence == -np.inf
    assert np.array_equal(small.ancestors, large.ancestors)
    rounding = 40 * float(jnp.finfo(dtype).eps)  # of programs that are compiled apart
    for name in ("log_weights", "ess", "log_evidences"):
        np.testing.assert_allclose(
            getattr(small, name), getattr(large, name), rtol=rounding, atol=rounding, err_msg=name
        )
    np.testing.assert_allclose(small.paths[:, :3], large.paths[:, :3], rtol=rounding, atol=rounding)
    assert np.array_equal(small.particles, small.paths[:, 2])


def test_wrong_models_are_refused(key):
    plain = smc.lift(models.linear(jnp.ones(3)))
    with pytest.raises(TypeError, match="propagate of a FeynmanKac must be a function, got int"):
        smc.FeynmanKac(abs, 3, abs)
    with pytest.raises(TypeError, match="extend of a BatchedFeynmanKac must be a function, got NoneType"):
        smc.BatchedFeynmanKac(abs, None)
    with pytest.raises(
        TypeError, match=r"expected a smc.FeynmanKac or a smc.BatchedFeynmanKac, got function"
    ):
        as_batched(_values)
    with pytest.raises(ValueError, match=r"must have 4 rows.*own gather"):
        smc.particle_filter(key, smc.BatchedFeynmanKac(Partial(_too_few, plain), plain.extend), 3, 4)


def _too_few(plain, key, num):
    particles, log_weights = plain.init(key, num)
    return particles[1:], log_weights
