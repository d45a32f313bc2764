import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.special import logsumexp

from probinfer import resampling, smc
from tests.reference import hmm
from tests.smc import models
from tests.smc.models import P_LIMIT, Z_LIMIT, z_scores

MODEL = hmm.random_model(13, num_states=3, num_steps=4)
RUNS, CHAINS, SIZES = 10_000, 5_000, (4, 3, 5)


def tables(dtype):
    """A proposal between the prior and the best one, with its initial ratio, and the best one-step lookahead (T, K)."""
    with np.errstate(divide="ignore"):
        joint = np.log(MODEL.transition) + 0.5 * MODEL.log_potential
    proposal = joint - logsumexp(joint, axis=2, keepdims=True)
    start = np.array([0.5, 0.3, 0.2])
    ahead = logsumexp(np.log(MODEL.transition) + MODEL.log_potential, axis=2)
    ahead = np.roll(ahead, -1, axis=0)  # row t looks at step t + 1; the last row is not used
    return [jnp.asarray(x, dtype) for x in (proposal, np.log(start), np.log(MODEL.initial / start), ahead)]


def _row(table, x, t):
    return table[t, x]


def _entry(table, x):
    return table[x]


def guided_model(dtype):
    proposal, start, ratio, _ = tables(dtype)
    move, density = Partial(models.finite_move, proposal), Partial(models.look_up, proposal)
    first = {"init_propose": Partial(models.finite_start, start), "log_init_ratio": Partial(_entry, ratio)}
    return smc.guided(models.finite(MODEL, dtype), move, density, **first)


def both(dtype):
    return smc.auxiliary(guided_model(dtype), Partial(_row, tables(dtype)[3]), 4)


def from_start(dtype):
    proposal = tables(dtype)[0]
    move, density = Partial(models.finite_move, proposal), Partial(models.look_up, proposal)
    return smc.auxiliary(
        smc.guided(models.finite(MODEL, dtype), move, density), Partial(_row, tables(dtype)[3]), 4
    )


@pytest.mark.parametrize("build", [both, from_start])
def test_the_target_stays_the_same(build, dtype):
    expected = hmm.marginals(MODEL)
    adaptive, keys = resampling.adaptive("systematic"), jax.random.split(jax.random.key(0), RUNS)
    evidence, mass, status = models.masses(keys, build(dtype), adaptive, SIZES)
    assert abs(z_scores(evidence, expected[0].sum())) < Z_LIMIT
    assert np.all(np.abs(z_scores(mass, expected)) < Z_LIMIT)
    assert np.all(status == 0)


def test_a_missing_correction_is_detected(dtype):
    fk, proposal = models.finite(MODEL, dtype), tables(dtype)[0]
    wrong = smc.FeynmanKac(fk.init_sample, Partial(models.finite_move, proposal), fk.log_potential)
    keys = jax.random.split(jax.random.key(0), 2000)
    evidence, _, _ = models.masses(keys, wrong, resampling.adaptive("systematic"), SIZES)
    assert abs(z_scores(evidence, hmm.marginals(MODEL)[0].sum())) > 2 * Z_LIMIT


@pytest.mark.slow
def test_particle_gibbs_on_a_guided_auxiliary_model_stays_at_the_posterior(dtype):
    adaptive = resampling.adaptive("systematic", resampling.ess_below(0.7))
    run = lambda key, path: smc.particle_gibbs(key, both(dtype), 4, 3, 4, reference=path, resampling=adaptive)  # noqa: E731
    keys = jax.random.split(jax.random.key(0), CHAINS)
    result = jax.jit(jax.vmap(run))(keys, models.exact_paths(MODEL, 0, CHAINS))
    assert models.chi_squared(MODEL, result.paths[:, -1]) > P_LIMIT
    assert np.mean(result.update_rate) > 0.3


def test_the_best_proposal_has_no_variance_in_its_last_step(key, dtype):
    # fully adapted: q = M G / sum and eta = the one-step sum, so that all weights after the first step are equal
    joint = np.log(MODEL.transition) + MODEL.log_potential
    best = jnp.asarray(joint - logsumexp(joint, axis=2, keepdims=True), dtype)
    move, density = Partial(models.finite_move, best), Partial(models.look_up, best)
    adapted = smc.auxiliary(
        smc.guided(models.finite(MODEL, dtype), move, density), Partial(_row, tables(dtype)[3]), 4
    )
    adaptive = resampling.adaptive("systematic", resampling.always())
    result = smc.particle_filter(key, adapted, 4, 20, resampling=adaptive)
    np.testing.assert_allclose(result.ess[-1], 20, rtol=1e-8)


def test_power_tempers_the_potentials(dtype):
    dead = hmm.random_model(1, num_states=3, num_steps=4, dead=0.1)
    tempered = dead._replace(log_potential=0.4 * dead.log_potential)
    adaptive, keys = resampling.adaptive("systematic"), jax.random.split(jax.random.key(0), RUNS)
    fk = smc.power(models.finite(dead, dtype), 0.4)
    evidence, _, _ = models.masses(keys, fk, adaptive, SIZES)
    assert abs(z_scores(evidence, hmm.marginals(tempered)[0].sum())) < Z_LIMIT
    fk = smc.power(models.finite(dead, dtype), 0.0)
    assert not np.any(np.isnan(models.masses(keys, fk, adaptive, SIZES)[0]))


def test_bad_input_is_refused(dtype):
    fk = models.finite(MODEL, dtype)
    silent = smc.FeynmanKac(fk.init_sample, fk.propagate, fk.log_potential)
    with pytest.raises(ValueError, match="give log_transition"):
        smc.guided(silent, fk.propagate, fk.log_transition)
    with pytest.raises(ValueError, match="give both or neither"):
        smc.guided(fk, fk.propagate, fk.log_transition, init_propose=fk.init_sample)
