"""HMC and NUTS for many data sets: moments of a conjugate model, the same in every mode, and the reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probinfer as pi
from probinfer import mcmc
from probinfer.core.status import Status

SCALE = np.array([1.0, 20.0])  # of prior and noise: the posterior is N(x / 2, SCALE^2 / 2)


def log_joint(position, x):
    scale = jnp.asarray(SCALE, position.dtype)
    return -0.5 * jnp.sum((position / scale) ** 2) - 0.5 * jnp.sum(((x - position) / scale) ** 2)


def init(key, x):
    return jax.random.normal(key, x.shape, x.dtype) * jnp.asarray(SCALE, x.dtype)


@pytest.fixture(scope="module")
def sampler():
    return mcmc.posterior_sampler(log_joint, init, num_warmup=150, num_draws=200, num_leapfrogs=8)


def data_sets(key, num=20):
    key_data, key_runs = jax.random.split(key)
    x = jax.random.normal(key_data, (num, 2)) * np.sqrt(2) * SCALE
    return jax.random.split(key_runs, num), x.astype(jnp.result_type(float))


@pytest.mark.f32(slow=True)
def test_moments(key, sampler, dtype):
    keys, x = data_sets(key)
    many = pi.run_many(sampler, keys, x)
    assert many.mode == "vmap"
    assert many.draws.shape == (20, 200, 2)
    assert many.draws.dtype == dtype
    z = (many.draws - np.asarray(x)[:, None] / 2) / (SCALE / np.sqrt(2))
    sizes = np.minimum(many.ess, 200)[:, None]
    # 40 means and 40 variances at 5 standard errors: fails by chance once in 20 000.
    assert np.all(np.abs(z.mean(axis=1)) < 5 / np.sqrt(sizes))
    assert np.all(np.abs((z**2).mean(axis=1) - 1) < 5 * np.sqrt(4 / sizes))
    assert np.median(many.ess) > 25  # 58 over 300 data sets
    np.testing.assert_array_equal(many.work, np.full(20, 350 * 8))
    assert not many.failed.any()


def test_map_and_vmap_agree(key, sampler):
    """Warm-up and draws: rounded tuning keeps rounding errors from growing if the dynamics are not chaotic."""
    keys, x = data_sets(key)
    mapped, batched = (pi.run_many(sampler, keys, x, mode=mode) for mode in ("map", "vmap"))
    np.testing.assert_allclose(mapped.draws, batched.draws, rtol=1e-9, atol=1e-9)


def test_constrained_thinned_and_broken(key):
    keys, x = data_sets(key, 3)
    broken = mcmc.posterior_sampler(
        lambda position, x: jnp.where(x[0] > 1e3, jnp.nan, log_joint(position, x)),
        init,
        constrain_fn=lambda position: {"first": jnp.exp(position[0])},
        num_warmup=30,
        num_draws=10,
        num_leapfrogs=4,
        thin=3,
    )
    many = pi.run_many(broken, keys, x.at[1, 0].set(1e4))
    assert many.draws["first"].shape == (3, 10)
    assert np.all(many.draws["first"][[0, 2]] > 0)
    assert many.status[1] == Status.NON_FINITE
    np.testing.assert_array_equal(many.failed, [False, True, False])
    np.testing.assert_array_equal(many.work, np.full(3, (30 + 30) * 4))


@pytest.mark.slow
def test_nuts_in_a_queue(key):
    keys, x = data_sets(key)
    nuts = mcmc.posterior_sampler(
        log_joint, init, algorithm="nuts", num_warmup=150, num_draws=200, max_depth=3
    )
    many = pi.run_many(nuts, keys, x)
    assert many.mode == ("queue" if jax.default_backend() == "cpu" else many.mode)
    z = (many.draws - np.asarray(x)[:, None] / 2) / (SCALE / np.sqrt(2))
    sizes = np.minimum(many.ess, 200)[:, None]
    # 40 means and 40 variances at 5 standard errors: fails by chance once in 20 000.
    assert np.all(np.abs(z.mean(axis=1)) < 5 / np.sqrt(sizes))
    assert np.all(np.abs((z**2).mean(axis=1) - 1) < 5 * np.sqrt(4 / sizes))
    assert np.all(many.work <= 350 * (2**3 - 1))
    shallow = mcmc.posterior_sampler(
        log_joint, init, algorithm="nuts", num_warmup=20, num_draws=5, max_depth=1
    )
    few = pi.run_many(shallow, keys, x)
    np.testing.assert_array_equal(few.work, np.full(20, 25))
    assert np.all(few.info.num_capped <= 5)
    assert few.info.num_capped.sum() > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logdensity_fn": 1}, TypeError, "logdensity_fn"),
        ({"init_fn": None}, TypeError, "init_fn"),
        ({"constrain_fn": "exp"}, TypeError, "constrain_fn"),
        ({"num_warmup": 0}, ValueError, "num_warmup must be"),
        ({"num_draws": 0}, ValueError, "num_draws must be"),
        ({"num_leapfrogs": 0}, ValueError, "num_leapfrogs must be"),
        ({"algorithm": "gibbs"}, ValueError, "'hmc' or 'nuts'"),
        ({"algorithm": "nuts", "max_depth": 21}, ValueError, "max_depth must be .* from 1 to 20"),
        ({"thin": 0}, ValueError, "thin must be"),
        ({"target_acceptance": 1.0}, ValueError, "between 0 and 1"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"logdensity_fn": log_joint, "init_fn": init} | change
    with pytest.raises(error, match=message):
        mcmc.posterior_sampler(arguments.pop("logdensity_fn"), arguments.pop("init_fn"), **arguments)
