import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from probinfer import resampling, smc
from tests.reference import hmm
from tests.smc import models
from tests.smc.models import P_LIMIT, Z_LIMIT, z_scores

MODEL = hmm.random_model(13, num_states=3, num_steps=4)
RUNS, CHAINS, SIZES = 10_000, 5_000, (4, 3, 5)
ADAPTIVE = resampling.adaptive("systematic", resampling.ess_below(0.7))


def check_unbiased(evidence, mass, status):
    expected = hmm.marginals(MODEL)
    assert abs(z_scores(evidence, expected[0].sum())) < Z_LIMIT
    assert np.all(np.abs(z_scores(mass, expected)) < Z_LIMIT)
    assert np.all(status == 0)


def test_nested_steps_are_unbiased_and_less_variable(dtype):
    fk, keys = models.finite(MODEL, dtype), jax.random.split(jax.random.key(0), RUNS)
    plain = models.masses(keys, fk, ADAPTIVE, SIZES)
    lookahead = models.masses(keys, smc.nested(fk, 4), ADAPTIVE, SIZES)
    check_unbiased(*lookahead)
    assert np.std(lookahead[0]) < 0.75 * np.std(plain[0])  # 0.5 expected of four candidates, error 0.01


@pytest.mark.slow
def test_particle_gibbs_with_nested_steps_stays_at_the_posterior(dtype):
    model = smc.nested(models.finite(MODEL, dtype), 2)

    def run(key, path):
        return smc.particle_gibbs(key, model, 4, 2, 4, reference=path, resampling=ADAPTIVE)

    keys = jax.random.split(jax.random.key(0), CHAINS)
    result = jax.jit(jax.vmap(run))(keys, models.exact_paths(MODEL, 0, CHAINS))
    assert models.chi_squared(MODEL, result.paths[:, -1]) > P_LIMIT
    assert np.mean(result.update_rate) > 0.1


def test_candidates_of_particles_that_are_done_keep_their_weight(key, dtype):
    plain = smc.lift(models.linear(jnp.ones(5, dtype)))

    def extend(key, particles, t):
        propagated, increments = plain.extend(key, particles, t)
        stopped = _stopped(particles)
        return jnp.where(stopped, particles, propagated), jnp.where(stopped, jnp.nan, increments)

    model = smc.nested(smc.BatchedFeynmanKac(plain.init, extend, done=_stopped), 3)
    result = smc.particle_filter(key, model, 5, 10)
    assert result.status == 0
    assert np.any(_stopped(result.particles))


def _stopped(particles):
    return particles > 0.5


def _conditional_draw(log_joint, key, x_previous, x, t):
    """Draw x_t from M_t(x_{t-1}, .) G_t(x_{t-1}, .): a move that leaves the target invariant; step 0 is kept."""
    drawn = jax.random.categorical(key, log_joint[t, x_previous]).astype(x.dtype)
    return jnp.where(t == 0, x, drawn)


def test_moves_keep_the_weights_right(dtype):
    fk, keys = models.finite(MODEL, dtype), jax.random.split(jax.random.key(0), RUNS)
    log_joint = jnp.asarray(np.log(MODEL.transition) + MODEL.log_potential, dtype)
    check_unbiased(
        *models.masses(keys, smc.resample_move(fk, Partial(_conditional_draw, log_joint)), ADAPTIVE, SIZES)
    )
    wrong = smc.resample_move(fk, Partial(_conditional_draw, jnp.log(jnp.asarray(MODEL.transition, dtype))))
    _, mass, _ = models.masses(keys, wrong, ADAPTIVE, SIZES)
    assert np.max(np.abs(z_scores(mass, hmm.marginals(MODEL)))) > 2 * Z_LIMIT


def test_bad_input_is_refused(key, dtype):
    fk = models.finite(MODEL, dtype)
    with pytest.raises(ValueError, match="num_candidates must be a positive integer, got 0"):
        smc.nested(fk, 0)
    with pytest.raises(TypeError, match="one-particle form, got BatchedFeynmanKac"):
        smc.resample_move(smc.lift(fk), fk.propagate)
    with_moves = smc.resample_move(fk, Partial(_conditional_draw, jnp.zeros((4, 3, 3), dtype)))
    with pytest.raises(ValueError, match="cannot follow a reference"):
        smc.conditional_filter(key, with_moves, jnp.zeros(4, jnp.int32), 3)
