"""Modes of mixtures whose shares are known, against counts and covariances in NumPy; one mode; few particles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from probinfer.coin.engine import modes

pytestmark = pytest.mark.f32


def log_mixture(means, sds, log_shares, x):
    squares = jnp.sum((x - means) ** 2, axis=1) / sds**2
    return jax.scipy.special.logsumexp(log_shares - 0.5 * squares - means.shape[1] * jnp.log(sds))


@jax.jit
def estimate(density, table, mask):
    return modes.estimate_mode_shares(density, table, mask, jax.vmap(density)(table))


def mixture(dims, mass_shares, counts, dtype, seed=0):
    """A density of modes 12 apart with sds 1 and 0.3 in turn, and so many particles in each."""
    rng = np.random.default_rng(seed)
    number = len(mass_shares)
    means = 12.0 * np.arange(number)[:, None] * np.eye(1, dims)
    sds = np.where(np.arange(number) % 2 == 0, 1.0, 0.3)
    rows = [m + s * rng.normal(size=(n, dims)) for m, s, n in zip(means, sds, counts, strict=True)]
    arguments = [jnp.asarray(a, dtype) for a in (means, sds, np.log(mass_shares))]
    table = np.concatenate(rows)
    owner = np.repeat(np.arange(number), counts)
    order = rng.permutation(len(table))
    return jax.tree_util.Partial(log_mixture, *arguments), table[order], owner[order]


@pytest.mark.parametrize("dims", [1, 2, 5])
def test_shares_are_counts_and_masses_are_those_of_the_density(dims, dtype):
    """A normal mode tells its mass but for the error of a covariance of 60 rows: .03 in five dimensions, squared."""
    mass_shares, counts = np.array([0.75, 0.05, 0.2]), (60, 90, 70)
    density, table, owner = mixture(dims, mass_shares, counts, dtype)
    shares = estimate(density, jnp.asarray(table, dtype), jnp.ones(len(table), bool))
    particle_shares, masses_found = np.asarray(shares.particles), np.asarray(shares.mass)
    np.testing.assert_allclose(np.sort(particle_shares), np.sort([*np.array(counts) / 220, 0]), atol=1e-6)
    of_mode = {n / 220: share for n, share in zip(counts, mass_shares, strict=True)}
    for part, mass in zip(particle_shares[:3], masses_found[:3], strict=True):
        share = next(s for n, s in of_mode.items() if abs(n - part) < 1e-6)
        assert abs(np.log(mass / share)) < 0.25
    # the same in NumPy
    values = np.asarray(jax.vmap(density)(jnp.asarray(table, dtype)), float)
    masses = []
    for k in range(3):
        rows = table[owner == k]
        masses.append(
            values[owner == k].mean() + 0.5 * np.linalg.slogdet(np.cov(rows.T, ddof=0).reshape(dims, dims))[1]
        )
    expected = np.exp(masses - logsumexp(masses))
    np.testing.assert_allclose(np.sort(masses_found[:3]), np.sort(expected), rtol=1e-3)
    assert np.all(np.asarray(shares.log_error)[:3] < 0.7)


def test_what_is_one_mode_is_one(dtype):
    """A banana and a ring bend, and lines between their particles leave them: chains do not."""
    rng = np.random.default_rng(1)
    x = 3 * rng.normal(size=200)
    banana = np.stack([x, 0.1 * (x**2 - 9) + rng.normal(size=200)], axis=1)
    angle = rng.uniform(0, 2 * np.pi, 200)
    ring = (3 + 0.3 * rng.normal(size=200))[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    for density, table in (
        (lambda x: -0.5 * (x[0] / 3) ** 2 - 0.5 * (x[1] - 0.1 * (x[0] ** 2 - 9)) ** 2, banana),
        (lambda x: -0.5 * ((jnp.sqrt(jnp.sum(x**2)) - 3) / 0.3) ** 2, ring),
        (lambda x: -0.5 * jnp.sum(x**2), rng.normal(size=(200, 20))),
    ):
        shares = estimate(jax.tree_util.Partial(density), jnp.asarray(table, dtype), jnp.ones(200, bool))
        np.testing.assert_allclose(shares.particles, [1, 0, 0, 0], atol=1e-6)
        np.testing.assert_allclose(shares.mass, [1, 0, 0, 0], atol=1e-6)


def test_modes_of_few_particles_are_counted_and_not_weighed(dtype):
    density, table, _ = mixture(2, np.array([0.5, 0.5]), (95, 5), dtype)
    shares = estimate(density, jnp.asarray(table, dtype), jnp.ones(100, bool))
    np.testing.assert_allclose(np.sort(shares.particles)[::-1][:2], [0.95, 0.05], atol=1e-6)
    assert np.sum(np.asarray(shares.mass) > 0) == 1


def test_particles_that_do_not_count_are_left_out(dtype):
    density, table, owner = mixture(2, np.array([0.5, 0.5]), (100, 100), dtype)
    lost = owner == 1
    bad = np.where(lost[:, None], np.nan, table)
    for rows in (table, bad):
        shares = estimate(density, jnp.asarray(rows, dtype), jnp.asarray(~lost))
        np.testing.assert_allclose(shares.particles, [1, 0, 0, 0], atol=1e-6)
