"""Fusion of sub-posteriors against normal and gamma distributions and grids; effect of bad draws (none), bad input."""

import warnings
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.scipy.special import logsumexp
from scipy.special import gammaln

from probinfer import Checkpoint, smc, targets
from probinfer.core.binding import LogDensity
from probinfer.core.errors import ConvergenceWarning, NumericalError
from probinfer.core.status import Status
from probinfer.inference.posterior import Posterior
from probinfer.smc import fusion
from tests.reference import mixtures as reference

ENGINE = smc.Tempered(num_particles=128)
SEEDS, DRAWS = 4, 400
# Of each of the 8 islands of a run, log evidence and means are unbiased given its pilot: 32 replicates, t_31; 6.5 is
# exceeded with probability 3e-7.
LIMIT = 6.5


def fuse(seed, shards, draws, engine=ENGINE, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return smc.fuse(jax.random.key(seed), shards, draws, engine=engine, progress=False, **settings)


def integrals(posteriors, fn, log_integral):
    """Integral of fn (draws (n, 2) -> (n, k)) over the product, over its own integral: one estimate an island."""
    rows = []
    for posterior in posteriors:
        values = np.asarray(jax.tree.leaves(posterior.draws)[0], float)
        scales = np.exp(np.asarray(posterior.log_weights, float)[:, 0] - log_integral)
        rows += [scale * fn(island).mean(axis=0) for scale, island in zip(scales, values)]
    return np.array(rows)


def max_z(values, expected):
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return np.max(np.abs(values.mean(axis=0) - expected) / error)


def log_mixture(weights, locs, precisions, u):
    centered = u - locs
    values = jnp.log(weights) - 0.5 * jnp.einsum("ki,kij,kj->k", centered, precisions, centered)
    return logsumexp(values + 0.5 * jnp.linalg.slogdet(precisions)[1]) - jnp.log(2 * jnp.pi)


class Shards(NamedTuple):
    targets: list
    draws: list
    laws: list


def mixtures(laws, seed=0):
    rng, shard_targets, draws = np.random.default_rng(seed), [], []
    for law in laws:
        data = (law.weights, law.locs, np.linalg.inv(law.covariances))
        arrays = [jnp.asarray(part, jnp.result_type(float)) for part in data]
        shard_targets.append(targets.from_logdensity(LogDensity(log_mixture, *arrays), jnp.zeros(2)))
        which = rng.choice(len(law.weights), DRAWS, p=law.weights)
        roots = np.linalg.cholesky(law.covariances)[which]
        drawn = law.locs[which] + np.einsum("nij,nj->ni", roots, rng.normal(size=(DRAWS, 2)))
        draws.append(jnp.asarray(drawn, jnp.result_type(float)))
    return Shards(shard_targets, draws, laws)


def normals(shift=0.0):
    covariances = [[[2.0, 0.5], [0.5, 1.0]], [[1.0, -0.3], [-0.3, 4.0]], [[3.0, 1.0], [1.0, 2.0]], np.eye(2)]
    locs = [[0.0, 1.0], [1.0, -1.0], [-1.0, 0.0], [0.5, 0.5]]
    return mixtures(
        [
            reference.mixture([0.5, 0.5], [np.add(m, shift)] * 2, [c] * 2)
            for m, c in zip(locs, covariances, strict=True)
        ]
    )


def bimodals():
    shares = [0.5, 0.3, 0.6, 0.5]
    return mixtures(
        [
            reference.mixture([s, 1 - s], [[-3.0, 0.0], [3.0, 1.0]], [np.eye(2), 0.8 * np.eye(2)])
            for s in shares
        ]
    )


def disagreeing():
    """Two shards left, two right, with wide shoulders: the product has a mode on either side and none between."""
    sides = [-5.0, 5.0, -4.5, 5.5]
    return mixtures(
        [
            reference.mixture([0.7, 0.3], [[x, 0.0], [0.0, 0.0]], [0.5 * np.eye(2), 16.0 * np.eye(2)])
            for x in sides
        ]
    )


@pytest.mark.parametrize(
    "make", [pytest.param(make, marks=pytest.mark.slow) for make in (normals, bimodals, disagreeing)]
)
def test_the_product_of_mixtures(make):
    shards, edges = make(), np.array([0.0])
    exact = reference.law(shards.laws, [1.0] * 4, edges)
    posteriors = [fuse(seed, shards.targets, shards.draws) for seed in range(SEEDS)]

    def numbers(x):  # left of zero, means, squares; one for the integral itself
        return np.column_stack([np.ones(len(x)), x[:, 0] < 0, x, (x - exact.mean) ** 2])

    estimates = integrals(posteriors, numbers, exact.log_integral)
    expected = [1, exact.masses[0].sum(), *exact.mean, *np.diag(exact.covariance)]
    assert max_z(estimates, expected) < LIMIT  # six of them: 2e-6
    assert estimates[:, 0].std() < 0.7
    assert posteriors[0].info.start == "student-t"
    assert posteriors[0].unconstrained.shape == (8, 128, 2)


def test_normal_shards_give_the_closed_form():
    shards = normals()
    exact = reference.law(shards.laws, [1.0] * 4, np.array([0.0]))
    precisions = [np.linalg.inv(law.covariances[0]) for law in shards.laws]
    covariance = np.linalg.inv(sum(precisions))
    mean = covariance @ sum(p @ law.locs[0] for p, law in zip(precisions, shards.laws))
    np.testing.assert_allclose(exact.mean, mean, atol=1e-9)
    np.testing.assert_allclose(exact.covariance, covariance, atol=1e-9)


@pytest.mark.slow
def test_bad_draws_change_the_start_and_not_the_result():
    shards = normals()
    exact = reference.law(shards.laws, [1.0] * 4, np.array([0.0]))
    wrong = [draws / 2 + 3 for draws in shards.draws]  # too narrow, and 5 standard deviations off
    posteriors = [fuse(seed, shards.targets, wrong) for seed in range(SEEDS)]
    estimates = integrals(posteriors, lambda x: np.column_stack([np.ones(len(x)), x]), exact.log_integral)
    assert max_z(estimates, [1, *exact.mean]) < LIMIT
    good = fuse(0, shards.targets, shards.draws)
    assert posteriors[0].info.num_gradients > good.info.num_gradients  # the first merges took more levels


def log_gamma(counts, rates, value):
    return jnp.sum(counts * jnp.log(value) - rates * value)


def gammas():
    """Few events in each shard: distributions of a positive rate, far from normal in either coordinate."""
    dtype, rng = jnp.result_type(float), np.random.default_rng(3)
    counts, rates = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 2.0], [2.5, 1.0]])
    shard_targets = [
        targets.from_logdensity(
            LogDensity(log_gamma, jnp.asarray(a, dtype), jnp.asarray(b, dtype)),
            jnp.ones(2),
            constraints=dist.constraints.positive,
        )
        for a, b in zip(counts, rates)
    ]
    draws = [rng.gamma(a + 1, 1 / b, size=(DRAWS, 2)) for a, b in zip(counts, rates)]
    return shard_targets, draws, counts.sum(0) + 1, rates.sum(0)


@pytest.mark.slow
@pytest.mark.f32
def test_skewed_shards_of_a_positive_rate(dtype):
    shard_targets, draws, shape, rate = gammas()
    posteriors = [
        Posterior(jnp.asarray(shard_draws[None], dtype)) for shard_draws in draws
    ]  # constrained draws
    log_integral = np.sum(gammaln(shape) - shape * np.log(rate))
    fused = [fuse(seed, shard_targets, posteriors) for seed in range(SEEDS)]
    assert fused[0].draws.dtype == dtype
    mean, variance = shape / rate, shape / rate**2

    def numbers(x):
        return np.column_stack([np.ones(len(x)), x, (x - mean) ** 2])

    assert max_z(integrals(fused, numbers, log_integral), [1, *mean, *variance]) < LIMIT  # five: 2e-6
    # consensus Monte Carlo: averages of draws, weighted by precision
    logs = np.log(np.array(draws))
    precisions = 1 / logs.var(axis=1)
    consensus = np.exp(np.einsum("ci,cni->ni", precisions, logs) / precisions.sum(0))
    assert np.max(np.abs(consensus.mean(0) - mean) / np.sqrt(variance)) > 0.3  # it is wrong here


def log_normal_likelihood(y, mu):
    return jnp.sum(-0.5 * (y - mu) ** 2 - 0.5 * jnp.log(2 * jnp.pi))


def sharing(scales=(2.0, 2.0, 2.0)):
    data = [jnp.asarray(np.random.default_rng(i).normal(size=(4, 2)) + 1) for i in range(len(scales))]
    shard_targets = [
        targets.from_prior(dist.Normal(jnp.zeros(2), s), LogDensity(log_normal_likelihood, y))
        for s, y in zip(scales, data)
    ]
    draws = [np.random.default_rng(i).normal(size=(DRAWS, 2)) / 2 + y.mean(0) for i, y in enumerate(data)]
    return shard_targets, [jnp.asarray(x) for x in draws], np.concatenate(data)


def test_a_shared_prior_counts_once():
    shard_targets, draws, y = sharing((2.0, 2.0))
    fused = [fuse(seed, shard_targets, draws, share_prior=True) for seed in range(SEEDS)]
    precision = len(y) + 1 / 4
    mean = y.sum(0) / precision
    log_evidence = np.sum(
        -len(y) / 2 * np.log(2 * np.pi)
        - 0.5 * np.log(4 * precision)
        - 0.5 * ((y**2).sum(0) - y.sum(0) ** 2 / precision)
    )
    estimates = integrals(
        fused, lambda x: np.column_stack([np.ones(len(x)), x, (x - mean) ** 2]), log_evidence
    )
    assert max_z(estimates, [1, *mean, 1 / precision, 1 / precision]) < LIMIT  # five: 2e-6
    low, high = fused[0].info.interval(0.9999)
    assert low < log_evidence < high


def test_shards_outside_a_group_do_not_count():
    shards = normals()
    product = fusion._product(tuple(shards.targets), jnp.zeros(2), False)
    moments = fusion.GroupMoments(jnp.zeros(2), jnp.eye(2))
    u = jnp.asarray([0.3, -0.4])
    terms = jax.jit(lambda bridge: bridge.terms(u))(product.bridge(1, 3, moments, moments))
    expected = sum(reference.log_density(law, np.asarray(u)) for law in shards.laws[1:3])
    np.testing.assert_allclose(sum(terms), expected, rtol=1e-6)


@pytest.mark.f32
def test_the_start_is_the_product_of_normal_distributions(dtype):
    rng, tight = np.random.default_rng(0), 2000 * float(jnp.finfo(dtype).eps)
    roots = [
        np.diag([1e3, 1.0, 1e-3]) @ np.linalg.cholesky(np.cov(rng.normal(size=(3, 9)))) for _ in range(2)
    ]
    means = [roots[0] @ rng.normal(size=3) for _ in range(2)]
    groups = [fusion.GroupMoments(*(jnp.asarray(x, dtype) for x in pair)) for pair in zip(means, roots)]
    loc, factor, inverse = fusion.combine(*groups)
    precisions = [np.linalg.inv(r @ r.T) for r in roots]
    covariance = np.linalg.inv(sum(precisions))
    middle = covariance @ sum(p @ m for p, m in zip(precisions, means))
    covariance = covariance + sum(np.outer(m - middle, m - middle) for m in means) / 2
    unit = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose((loc - middle) / unit, 0, atol=tight)
    ours = np.asarray(factor, float) @ np.asarray(factor, float).T
    np.testing.assert_allclose(
        ours / np.outer(unit, unit), 0.9 * covariance / np.outer(unit, unit), atol=tight
    )
    np.testing.assert_allclose(np.asarray(inverse, float) @ np.asarray(factor, float), np.eye(3), atol=tight)
    narrow = [
        fusion.GroupMoments(b.mean, jnp.asarray(np.abs(np.diag(r)), dtype)) for b, r in zip(groups, roots)
    ]
    wide = [fusion.GroupMoments(b.mean, jnp.diag(b.factor)) for b in narrow]
    one, other = fusion.combine(*narrow), fusion.combine(*wide)
    np.testing.assert_allclose(one[0] / unit, other[0] / unit, atol=tight)
    # beyond 64 dimensions the start is diagonal
    np.testing.assert_allclose(one[1] ** 2, jnp.diag(other[1] @ other[1].T), rtol=tight)


@pytest.mark.slow
def test_new_data_compile_nothing_and_a_resumed_run_is_the_same(count_compiles, tmp_path):
    shards, other = normals(), normals(shift=2.0)
    checkpoint = Checkpoint(tmp_path / "run", every=2)
    uninterrupted = fuse(7, shards.targets, shards.draws, checkpoint=checkpoint)
    assert {"shards-1-to-2", "shards-3-to-4"} <= {path.name for path in (tmp_path / "run").iterdir()}
    with count_compiles() as compiles:
        fuse(1, other.targets, other.draws)
    assert compiles.count == 0
    again = fuse(7, shards.targets, shards.draws, checkpoint=checkpoint)
    for a, b in zip(jax.tree.leaves(uninterrupted), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_input():
    shard_targets, draws, _ = sharing()
    call = partial(smc.fuse, jax.random.key(0), progress=False)
    with pytest.raises(
        ValueError, match="two or more targets and one set of draws for each, got 1 targets and 1"
    ):
        call(shard_targets[:1], draws[:1])
    with pytest.raises(ValueError, match="got 3 targets and 2 sets"):
        call(shard_targets, draws[:2])
    with pytest.raises(TypeError, match="fuse needs a Target, got int"):
        call([shard_targets[0], 3], draws[:2])
    with pytest.raises(TypeError, match="engine must be a smc"):
        call(shard_targets, draws, engine=3)
    with pytest.raises(TypeError, match="key"):
        smc.fuse(0, shard_targets, draws)
    with pytest.raises(ValueError, match="draws of shard 2 must be unconstrained positions"):
        call(shard_targets, [draws[0], draws[1][:, :1], draws[2]])
    with pytest.raises(ValueError, match=r"share one prior: .* in target 1 and .* in target 3"):
        call(sharing((2.0, 2.0, 3.0))[0], draws, share_prior=True)
    with pytest.raises(ValueError, match=r"one set of constraints: .* in target 1 and .* in target 2"):
        call([gammas()[0][0], normals().targets[0]], draws[:2])
    with pytest.raises(ValueError, match="target 1 does not"):
        call(normals().targets[:3], draws, share_prior=True)
    for bad in (draws[1].at[0, 0].set(jnp.nan), draws[1] * jnp.asarray([1.0, 0.0]), draws[1][:1]):
        with pytest.raises(NumericalError, match="draws of shard 2 are not finite or do not vary") as caught:
            call(shard_targets, [draws[0], bad, draws[2]])
        assert caught.value.status == Status.NON_FINITE


def test_a_merge_without_mass_names_its_shards():
    shards = normals()
    law = shards.laws[3]
    arrays = [jnp.asarray(part) for part in (np.zeros(2), law.locs, np.linalg.inv(law.covariances))]
    shard_targets = [
        *shards.targets[:3],
        targets.from_logdensity(LogDensity(log_mixture, *arrays), jnp.zeros(2)),
    ]
    with pytest.raises(
        NumericalError, match="merging shards 3 to 4: all particles of the pilot died"
    ) as caught:
        fuse(0, shard_targets, shards.draws)
    assert caught.value.status == Status.DEGENERATE_WEIGHTS
