from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.tree_util import Partial

from probinfer import smc
from probinfer.core.status import Status
from tests.reference import hmm, kalman
from tests.smc import models
from tests.smc.models import Z_LIMIT, z_scores

MODEL = hmm.random_model(17, num_states=3, num_steps=4, dead=0.1)
RUNS = 10_000


def tables(dtype):
    """An artificial prior (T, K), normalized in its last row only, and backward moves (T, K, K)."""
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
    """Evidence where the filters meet (runs, T), smoothing masses (runs, T, K), both unnormalized; status."""

    def run(key):
        result = smc.two_filter(key, fk, 4, num_particles, artificial=prior)
        evidence, weight = jnp.exp(result.log_evidences), jnp.exp(result.log_weights)
        mass = jnp.einsum("tn,tnk->tk", weight, jax.nn.one_hot(result.particles, 3, dtype=weight.dtype))
        mass = jnp.where(evidence[:, None] > 0, evidence[:, None] * mass, 0)
        return evidence, mass, jnp.exp(result.log_evidence), mass / evidence[:, None], result.status

    return jax.vmap(run)(keys)


def test_evidence_and_smoothing_are_unbiased_wherever_the_filters_meet(dtype):
    # 40 particles, some potentials zero: runs in which a filter dies count with estimate 0
    fk, expected = models.finite(MODEL, dtype), hmm.marginals(MODEL)
    evidence, mass, total, _, status = meetings(
        jax.random.split(jax.random.key(0), RUNS), fk, artificial(dtype), 40
    )
    assert np.all(np.abs(z_scores(evidence, expected[0].sum())) < Z_LIMIT)
    assert np.all(np.abs(z_scores(mass, expected)) < Z_LIMIT)
    assert abs(z_scores(total, expected[0].sum())) < Z_LIMIT
    assert set(np.unique(status)) <= {int(Status.OK), int(Status.DEGENERATE_WEIGHTS)}
    assert np.all((status == 0) <= np.all(evidence > 0, axis=1))


@pytest.mark.slow
def test_a_wrong_artificial_prior_is_detected(dtype):
    # log_propagate is not the density of propagate
    right = artificial(dtype)
    wrong = smc.ArtificialPrior(
        right.log_prior, right.sample_last, right.propagate, Partial(models.look_up, tables(dtype)[1][::-1])
    )
    keys = jax.random.split(jax.random.key(1), RUNS)
    mass = meetings(keys, models.finite(MODEL, dtype), wrong, 40)[1]
    assert np.abs(z_scores(mass, hmm.marginals(MODEL))).max() > 2 * Z_LIMIT


@pytest.mark.slow
def test_total_variation_falls_as_the_root_of_the_number_of_particles(dtype):
    # mean over 200 runs and 4 steps; slope with a standard error below 0.02 (a third of the mean, sqrt(200), log 8)
    model = hmm.random_model(17, num_states=3, num_steps=4)
    expected = hmm.marginals(model)
    expected = expected / expected.sum(axis=1, keepdims=True)
    distances = []
    for size in (40, 320):
        keys = jax.random.split(jax.random.key(size), 200)
        share = meetings(keys, models.finite(model, dtype), artificial(dtype), size)[3]
        distances.append(0.5 * np.abs(np.asarray(share) - expected).sum(axis=2).mean())
    assert abs(np.log(distances[1] / distances[0]) / np.log(8) + 0.5) < 0.12


def _walk(x, t):
    parameters = models.LINEAR
    scale = jnp.sqrt(jnp.asarray(parameters["process"], x["a"].dtype))
    return {"a": dist.Normal(parameters["slope"] * x["a"], scale), "b": dist.Normal(0.5 * x["b"], 1.0)}


def _observe(x, t):
    return dist.Normal(x["a"], jnp.sqrt(jnp.asarray(models.LINEAR["noise"], x["a"].dtype)))


@pytest.mark.f32
@pytest.mark.slow
def test_an_artificial_prior_is_fitted_to_a_linear_gaussian_model(dtype):
    # states are trees: the linear model, and two independent ones that are not observed. Mean over 60 runs of smoothing
    # means and variances, bias O(1/N); the evidence is unbiased
    y = jnp.asarray(np.random.default_rng(5).normal(size=8) * 1.5, dtype)
    means, variances = kalman.smooth(np.asarray(y, float), **models.LINEAR)
    log_evidence = kalman.kalman(np.asarray(y, float), **models.LINEAR)[0]
    start = {
        "a": dist.Normal(0.0, float(np.sqrt(models.LINEAR["start"]))),
        "b": dist.Normal(jnp.zeros(2, dtype), 1.0),
    }
    fk = smc.state_space(start, _walk, _observe, y)
    result = jax.jit(jax.vmap(lambda key: smc.two_filter(key, fk, 8, 150)))(
        jax.random.split(jax.random.key(0), 60)
    )
    weight = np.exp(result.log_weights)
    unobserved = np.cumsum(0.25 ** np.arange(8))  # variances of the unobserved states
    expected = {
        "a": (means, variances),
        "b0": (0 * unobserved, unobserved),
        "b1": (0 * unobserved, unobserved),
    }
    b = np.asarray(result.particles["b"])
    for name, values in {"a": np.asarray(result.particles["a"]), "b0": b[..., 0], "b1": b[..., 1]}.items():
        mean, spread = (
            (weight * values).sum(axis=2),
            (weight * (values - expected[name][0][:, None]) ** 2).sum(axis=2),
        )
        for estimates, exact in zip((mean, spread), expected[name], strict=True):
            error = estimates.std(axis=0) / np.sqrt(60)
            assert np.all(np.abs(estimates.mean(axis=0) - exact) < 0.01 + Z_LIMIT * error), name
    assert abs(z_scores(np.exp(result.log_evidence - log_evidence), 1.0)) < Z_LIMIT
    assert np.all(result.status == 0)
    # the fit is near the filtering distribution: many particles have weight, in every step but the first
    assert np.all(np.asarray(result.ess)[:, 1:].mean(axis=0) > 50)
    assert result.log_weights.dtype == result.particles["a"].dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "status"),
    [
        (-np.inf, Status.DEGENERATE_WEIGHTS),
        (np.nan, Status.NON_FINITE),
        pytest.param(np.inf, Status.NON_FINITE, marks=pytest.mark.slow),
    ],
)
def test_failures_are_told(value, status, dtype):
    log_potential = MODEL.log_potential.copy()
    log_potential[2] = value
    fk = models.finite(MODEL._replace(log_potential=log_potential), dtype)
    evidence, _, total, _, actual = meetings(
        jax.random.split(jax.random.key(0), RUNS), fk, artificial(dtype), 40
    )
    assert np.all(actual == status)
    np.testing.assert_equal(np.asarray(total), 0.0 if value == -np.inf else np.nan)
    assert not np.any(evidence > 0)


def test_one_step_is_a_filter_and_one_particle_spans_nothing(key, dtype):
    fk = models.linear(jnp.zeros(4, dtype))
    assert smc.two_filter(key, fk, 4, 1).status == Status.NON_FINITE
    first = smc.two_filter(key, fk, 1, 1)
    assert first.status == 0
    assert first.particles.shape == first.log_weights.shape == (1, 1)
    assert np.isclose(first.log_evidence, models.log_normal(first.particles[0, 0], models.LINEAR["noise"]))


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
        smc.two_filter(key, fk, 4, 5, artificial=_row)
    with pytest.raises(TypeError, match="log_prior of an ArtificialPrior must be a function, got int"):
        smc.ArtificialPrior(3, abs, abs, abs)
