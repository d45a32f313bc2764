"""Distances between two sets of draws: double loops, size, power, blocks for chains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import kernels
from probinfer.checks import energy_distance, mmd, sliced_wasserstein
from probinfer.checks.discrepancy.permutation import pool, random_labels
from probinfer.checks.discrepancy.sliced import directions
from probinfer.checks.draws import collect
from tests.reference import two_sample as oracle

DISTANCES = {"mmd": mmd, "energy": energy_distance, "sliced": sliced_wasserstein}


def pair(dtype=float, n=24, m=20, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(k, 2)) * [1, 3] + [0, 5], dtype) for k in (n, m))


@pytest.mark.f32
def test_statistics_equal_double_loops(dtype):
    a, b = pair(dtype)
    x, z = np.float64(a), np.float64(b)
    exact = {"rtol": 1e-9} if dtype == jnp.float64 else {"rtol": 1e-3, "atol": 2e-5}
    scales = oracle.median_distance(np.concatenate([x, z])) * np.array([0.25, 0.5, 1, 2, 4])
    np.testing.assert_allclose(mmd(a, b, scale=None).statistic, oracle.mmd(x, z, scales), **exact)
    one = mmd(a, b, scale=None, kernel=kernels.RBF(1.0, 1.7)).statistic
    np.testing.assert_allclose(one, oracle.mmd(x, z, [1.7]), **exact)
    np.testing.assert_allclose(energy_distance(a, b, scale=None).statistic, oracle.energy(x, z), **exact)
    lines = directions(16, 2)
    distance = sliced_wasserstein(a, b, scale=None, num_directions=16).statistic
    np.testing.assert_allclose(distance, oracle.sliced(x, z, lines), **exact)


def test_permuted_statistics_are_those_of_permuted_draws(key):
    a, b = pair()
    pooled = pool(collect("a", a), collect("b", b))
    labels = np.asarray(random_labels(key, pooled, 19))
    rows = np.asarray(pooled.rows)
    report = energy_distance(a, b, key=key, scale=None, num_permutations=19)
    expected = [oracle.energy(rows[l], rows[~l]) for l in labels[1:4]]
    np.testing.assert_allclose(report.null[:3], expected, rtol=1e-9)
    report = sliced_wasserstein(a, b, key=key, scale=None, num_permutations=19, num_directions=8)
    expected = [oracle.sliced(rows[l], rows[~l], directions(8, 2)) for l in labels[1:4]]
    np.testing.assert_allclose(report.null[:3], expected, rtol=1e-9)


@pytest.mark.parametrize("name", DISTANCES)
def test_size_and_power(name, key):
    """Size .05: of 60 pairs more than 11 are rejected at rate 1e-4. A shift of 24 + 20 draws by 2 sd: always."""
    options = {"num_permutations": 39, **({"num_directions": 8} if name == "sliced" else {})}
    rejected = sum(
        DISTANCES[name](*pair(seed=s), key=jax.random.fold_in(key, s), **options).pvalue <= 0.05
        for s in range(60)
    )
    assert rejected <= 11
    a, b = pair()
    far = DISTANCES[name](a, b + jnp.asarray([2.0, 0.0]), key=key, **options)
    assert far.pvalue == 1 / 40
    assert far.verdict.startswith("the draws differ")
    assert far.statistic > far.detectable


def chains(seed, coefficient=0.6, shape=(4, 512)):
    rng = np.random.default_rng(seed)
    noise, x = rng.normal(size=(*shape, 1)), np.zeros((*shape, 1))
    x[:, 0] = noise[:, 0] / np.sqrt(1 - coefficient**2)
    for t in range(1, shape[1]):
        x[:, t] = coefficient * x[:, t - 1] + noise[:, t]
    return jnp.asarray(x)


@pytest.mark.slow
def test_blocks_keep_the_size_for_chains(key):
    """Of 20 pairs of chains, correlation time 4, more than 5 are rejected at rate 1e-3 if the size is .07."""
    reports = [
        energy_distance(chains(2 * s), chains(2 * s + 1), key=jax.random.fold_in(key, s), num_permutations=39)
        for s in range(20)
    ]
    assert all(report.block in (32, 64) for report in reports)
    assert sum(report.pvalue <= 0.05 for report in reports) <= 5
    assert energy_distance(chains(0), chains(1) + 1.0, key=key, num_permutations=39).pvalue <= 0.05


def test_default_scale_makes_units_irrelevant(key):
    a, b = pair()
    units = jnp.asarray([1e3, 1e-2])
    for distance in DISTANCES.values():
        np.testing.assert_allclose(
            distance(a, b).statistic, distance(a * units, b * units).statistic, rtol=1e-8
        )


def test_without_a_key_it_cannot_tell():
    report = mmd(*pair())
    assert report.pvalue is None
    assert report.verdict.startswith("cannot tell")


def test_no_difference_says_what_would_have_been_seen(key):
    report = mmd(*pair(), key=key)
    assert report.verdict.startswith("no difference seen")
    assert report.plot().get_xlabel() == "squared MMD"


def test_bad_inputs_are_refused(key):
    a, b = pair()
    with pytest.raises(ValueError, match="scale must be"):
        mmd(a, b, scale="both")
    with pytest.raises(ValueError, match="at least 19"):
        energy_distance(a, b, key=key, num_permutations=5)
    with pytest.raises(ValueError, match="num_directions"):
        sliced_wasserstein(a, b, num_directions=0)
    with pytest.raises(ValueError, match="same coordinates"):
        mmd(a, b[:, :1])
    with pytest.raises(ValueError, match="cannot tell: one draw in"):
        mmd(chains(0, 0.99, (1, 400)), chains(1, 0.99, (1, 400)), key=key)
