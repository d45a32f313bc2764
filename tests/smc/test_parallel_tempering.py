import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import smc
from probinfer.smc.conditional.tempering import path_log_potential
from tests.reference import hmm
from tests.smc import models
from tests.smc.models import P_LIMIT

MODEL = hmm.random_model(13, num_states=3, num_steps=4)
BETAS = (1.0, 0.6, 0.2)
CHAINS = 5_000


def tempered(beta):
    return MODEL._replace(log_potential=beta * MODEL.log_potential)


def test_every_chain_keeps_its_distribution(dtype):
    run = lambda key, paths: smc.parallel_tempering(  # noqa: E731
        key, models.finite(MODEL, dtype), 4, 3, 4, inverse_temperatures=BETAS, references=paths
    )
    start = [models.exact_paths(tempered(beta), seed, CHAINS) for seed, beta in enumerate(BETAS)]
    keys = jax.random.split(jax.random.key(0), CHAINS)
    result = jax.jit(jax.vmap(run))(keys, jnp.stack(start, axis=1))
    for k, beta in enumerate(BETAS):
        assert models.chi_squared(tempered(beta), result.paths[:, -1, k]) > P_LIMIT
    assert np.all(result.status == 0)
    assert np.all((np.mean(result.swap_rate, axis=0) > 0.2) & (np.mean(result.swap_rate, axis=0) < 1))
    # the paths of the hot chain do not have the distribution of the cold one
    assert models.chi_squared(tempered(1.0), result.paths[:, -1, 2]) < P_LIMIT


@pytest.mark.slow
def test_paths_are_started_by_filters_and_one_chain_is_particle_gibbs(key, dtype):
    fk = models.finite(MODEL, dtype)
    result = smc.parallel_tempering(key, fk, 4, 3, 5, inverse_temperatures=[1.0])
    assert result.paths.shape == (5, 1, 4)
    assert result.log_evidence.shape == (5, 1)
    assert result.swap_rate.shape == (0,)
    assert result.status == 0


def test_total_potential_of_a_path(dtype):
    path = jnp.asarray([2, 0, 1, 1])
    table = MODEL.log_potential
    expected = table[0, 2, 2] + table[1, 2, 0] + table[2, 0, 1] + table[3, 1, 1]
    np.testing.assert_allclose(path_log_potential(models.finite(MODEL, dtype), path), expected, rtol=1e-6)


def test_bad_input_is_refused(key, dtype):
    fk = models.finite(MODEL, dtype)
    with pytest.raises(TypeError, match=r"a smc.FeynmanKac, got BatchedFeynmanKac"):
        smc.parallel_tempering(key, smc.lift(fk), 4, 3, 2)
    with pytest.raises(ValueError, match="num_particles >= 2"):
        smc.parallel_tempering(key, fk, 4, 1, 2)
    with pytest.raises(ValueError, match="must not be negative"):
        smc.parallel_tempering(key, fk, 4, 3, 2, inverse_temperatures=[1.0, -0.5])
    with pytest.raises(ValueError, match="vector of at least one"):
        smc.parallel_tempering(key, fk, 4, 3, 2, inverse_temperatures=1.0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        smc.parallel_tempering(key, fk, 4, 3, 2, inverse_temperatures=[1.0, np.nan])
    with pytest.raises(ValueError, match="one path per temperature"):
        smc.parallel_tempering(key, fk, 4, 3, 2, references=jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"expected shapes \(4,\), got \(5,\)"):
        smc.parallel_tempering(key, fk, 4, 3, 2, references=jnp.zeros((4, 5), jnp.int32))
