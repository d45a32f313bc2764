from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.tree_util import Partial

from probinfer import smc
from probinfer.base import Status
from tests.reference import hmm, kalman
from tests.smc import models
from tests.smc.models import Z_LIMIT, z_scores

MODEL = hmm.random_model(17, num_states=3, num_steps=4, dead=0.1)
RUNS = 10_000


def tables(dtype):
    """An artificial prior (T, K), normalised in its last row only, and backward moves (T, K, K)."""
    rng = np.random.default_rng(3)
    prior = rng.dirichlet(np.full(3, 3.0), size=4) * np.array([[0.3], [2.0], [5.0], [1.0]])
    moves = rng.dirichlet(np.full(3, 2.0), size=(4, 3))
    return jnp.asarray(np.log(prior), dtype), jnp.asarray(np.log(moves), dtype)


def artificial(dtype):
    prior, moves = tables(dtype)
    return smc.ArtificialPrior(
        Partial(_row, prior),
        Partial(_last, prior),
        Partial(models.finite_move, moves),
        Partial(models.look_up, moves),
    )


def _row(table, x, t):
    return table[t, x]


def _last(table, key):
    return jax.random.categorical(key, table[-1]).astype(jnp.int32)


@partial(jax.jit, static_argnames="num_particles")
def meetings(keys, fk, prior, num_particles):
    """Evidence where the filters meet (runs, T), smoothing masses (runs, T, K), both unnormalised; status."""

    def one(key):
        result = smc.two_filter(key, fk, 4, num_particles, artificial=prior)
        evidence, weight = jnp.exp(result.log_evidences), jnp.exp(result.log_weights)
        mass = jnp.einsum("tn,tnk->tk", weight, jax.nn.one_hot(result.particles, 3, dtype=weight.dtype))
        mass = jnp.where(evidence[:, None] > 0, evidence[:, None] * mass, 0)
        return evidence, mass, jnp.exp(result.log_evidence), mass / evidence[:, None], result.status

    return jax.vmap(one)(keys)


def test_evidence_and_smoothing_are_unbiased_wherever_the_filters_meet(dtype):
    # 5 particles, some potentials zero: runs in which a filter dies count with estimate 0
    fk, expected = models.finite(MODEL, dtype), hmm.marginals(MODEL)
    evidence, mass, total, _, status = meetings(
        jax.random.split(jax.random.key(0), RUNS), fk, artificial(dtype), 5
    )
    assert np.all(np.abs(z_scores(evidence, expected[0].sum())) < Z_LIMIT)
    assert np.all(np.abs(z_scores(mass, expected)) < Z_LIMIT)
    assert abs(z_scores(total, expected[0].sum())) < Z_LIMIT
    assert set(np.unique(status)) <= {int(Status.OK), int(Status.DEGENERATE_WEIGHTS)}
    assert np.all((status == 0) <= np.all(evidence > 0, axis=1))


def test_a_wrong_artificial_prior_is_seen(dtype):
    # moves that are not what log_propagate says
    right = artificial(dtype)
    wrong = smc.ArtificialPrior(
        right.log_prior, right.sample_last, right.propagate, Partial(models.look_up, tables(dtype)[1][::-1])
    )
    keys = jax.random.split(jax.random.key(1), RUNS)
    mass = meetings(keys, models.finite(MODEL, dtype), wrong, 5)[1]
    assert np.abs(z_scores(mass, hmm.marginals(MODEL))).max() > 2 * Z_LIMIT


def test_total_variation_falls_as_the_root_of_the_number_of_particles(dtype):
    # mean over 200 runs and 4 steps; slope with a standard error below 0.02 (a third of the mean, sqrt(200), log 8)
    model = hmm.random_model(17, num_states=3, num_steps=4)
    expected = hmm.marginals(model)
    expected = expected / expected.sum(axis=1, keepdims=True)
    distances = []
    for size in (25, 200):
        keys = jax.random.split(jax.random.key(size), 200)
        share = meetings(keys, models.finite(model, dtype), artificial(dtype), size)[3]
        distances.append(0.5 * np.abs(np.asarray(share) - expected).sum(axis=2).mean())
    assert abs(np.log(distances[1] / distances[0]) / np.log(8) + 0.5) < 0.12


@pytest.mark.f32
def test_linear_gaussian_model_sets_everything_itself(dtype):
    # mean over 60 runs of smoothing means and variances, bias O(1/N); evidence unbiased
    y = jnp.asarray(np.random.default_rng(5).normal(size=12) * 1.5, dtype)
    means, variances = kalman.smooth(np.asarray(y, float), **models.LINEAR)
    log_evidence = kalman.kalman(np.asarray(y, float), **models.LINEAR)[0]
    run = jax.jit(jax.vmap(lambda key: smc.two_filter(key, models.linear(y), 12, 150)))
    result = run(jax.random.split(jax.random.key(0), 60))
    weight = np.exp(result.log_weights)
    mean = (weight * result.particles).sum(axis=2)
    variance = (weight * (result.particles - means[:, None]) ** 2).sum(axis=2)
    assert np.all(np.abs(mean.mean(axis=0) - means) < 0.005 + Z_LIMIT * mean.std(axis=0) / np.sqrt(60))
    assert np.all(
        np.abs(variance.mean(axis=0) - variances) < 0.005 + Z_LIMIT * variance.std(axis=0) / np.sqrt(60)
    )
    assert abs(z_scores(np.exp(result.log_evidence - log_evidence), 1.0)) < Z_LIMIT
    assert np.all(result.status == 0)
    # the fit is near the law of the filter: most particles count, in every step but the first
    assert np.all(np.asarray(result.ess)[:, 1:].mean(axis=0) > 60)
    assert result.log_weights.dtype == result.particles.dtype == dtype


def _pair_walk(x, t):
    return {"a": dist.Normal(0.9 * x["a"] + 0.3 * x["b"][0], 0.5), "b": dist.Normal(0.5 * x["b"], 1.0)}


def _sum_seen(x, t):
    return dist.Normal(x["a"] + x["b"].sum(), 0.7)


def test_states_that_are_trees_and_one_step(key, dtype):
    start = {"a": dist.Normal(0.0, 1.0), "b": dist.Normal(jnp.zeros(2), 1.0)}
    fk = smc.state_space(start, _pair_walk, _sum_seen, jnp.asarray([0.5, -1.0, 2.0], dtype))
    result = smc.two_filter(key, fk, 3, 200)
    smoothed = smc.backward_smoother(key, fk, 3, 1000)
    assert result.status == 0
    assert result.particles["b"].shape == (3, 200, 2)
    found = np.einsum("tn,tnd->td", np.exp(result.log_weights), result.particles["b"])
    # standard deviations of about 1 over at least 50 effective draws
    np.testing.assert_allclose(found, smoothed.paths["b"].mean(axis=0), atol=6.5 / np.sqrt(50))
    first = smc.two_filter(key, fk, 1, 50)
    assert first.particles["a"].shape == (1, 50)
    assert np.isclose(np.exp(first.log_weights).sum(), 1)
    assert np.isclose(first.log_evidence, first.log_evidences[0])


def _fault(at, value, before, x, t):
    return jnp.where(t == at, value, -0.1 * x**2)


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (-np.inf, Status.DEGENERATE_WEIGHTS),
        (np.nan, Status.NON_FINITE),
        (np.inf, Status.NON_FINITE),
        (0.0, Status.OK),
    ],
)
def test_failures_are_told(key, value, status, dtype):
    good = models.linear(jnp.zeros(4, dtype))
    fault = Partial(_fault, jnp.int32(2), jnp.asarray(value, dtype))
    fk = smc.FeynmanKac(good.init_sample, good.propagate, fault, good.log_transition)
    result = smc.two_filter(key, fk, 4, 40)
    assert result.status == status
    assert np.isfinite(result.log_evidence) == (status == Status.OK)


def test_one_particle_spans_nothing(key, dtype):
    assert smc.two_filter(key, models.linear(jnp.zeros(4, dtype)), 4, 1).status == Status.NON_FINITE


def test_bad_input_is_refused(key, dtype):
    fk = models.linear(jnp.zeros(4, dtype))
    silent = smc.FeynmanKac(fk.init_sample, fk.propagate, fk.log_potential)
    with pytest.raises(ValueError, match="give log_transition"):
        smc.two_filter(key, silent, 4, 5)
    with pytest.raises(TypeError, match=r"expected a smc.FeynmanKac, got BatchedFeynmanKac"):
        smc.two_filter(key, smc.lift(fk), 4, 5)
    with pytest.raises(ValueError, match=r"real states only.*int32"):
        smc.two_filter(key, models.finite(MODEL, dtype), 4, 5)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        smc.two_filter(key, fk, 0, 5)
    with pytest.raises(TypeError, match=r"artificial must be a smc.ArtificialPrior or None, got function"):
        smc.two_filter(key, fk, 4, 5, artificial=_fault)
    with pytest.raises(TypeError, match="log_prior of an ArtificialPrior must be a function, got int"):
        smc.ArtificialPrior(3, abs, abs, abs)
