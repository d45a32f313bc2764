from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from probinfer import resampling, smc
from probinfer.core.status import Status
from tests.reference import hmm, kalman
from tests.smc import models
from tests.smc.models import P_LIMIT, Z_LIMIT, z_scores

MODEL = hmm.random_model(13, num_states=3, num_steps=4)
EVIDENCE = hmm.enumerate_paths(MODEL)[1].sum()
CHAINS = 4_000


CONDITIONAL = sorted(resampling.CONDITIONAL)


@partial(jax.jit, static_argnames=("ancestor_sampling", "backward_sampling"))
def iterate(keys, references, fk, adaptive, ancestor_sampling, backward_sampling=False):
    """Run four iterations with three particles: the errors of the iterations add up."""

    def run(key, reference):
        sampling = {"ancestor_sampling": ancestor_sampling, "backward_sampling": backward_sampling}
        return smc.particle_gibbs(
            key, fk, MODEL.num_steps, 3, 4, reference=reference, resampling=adaptive, **sampling
        )

    return jax.vmap(run)(keys, references)


def check_stationary(result, name):
    assert models.chi_squared(MODEL, result.paths[:, -1]) > P_LIMIT, name
    assert np.all(result.status == 0)
    # E[1 / Zhat] = 1 / Z at stationarity
    assert abs(z_scores(np.exp(-result.log_evidence[:, 0]), 1 / EVIDENCE)) < Z_LIMIT, name
    assert np.mean(result.update_rate) > 0.1


@pytest.mark.parametrize(
    ("ancestor_sampling", "triggers"),
    [
        (True, ("ess",)),
        pytest.param(True, ("always",), marks=pytest.mark.slow),
        pytest.param(False, ("entropic", "every"), marks=pytest.mark.slow),
    ],
)
def test_a_chain_started_at_the_posterior_stays_there(ancestor_sampling, triggers, dtype):
    fk = models.finite(MODEL, dtype)
    for seed, (scheme, trigger) in enumerate(product(CONDITIONAL, triggers)):
        adaptive = models.any_scheme(scheme, trigger, CONDITIONAL)
        keys, references = (
            jax.random.split(jax.random.key(seed), CHAINS),
            models.exact_paths(MODEL, seed, CHAINS),
        )
        check_stationary(iterate(keys, references, fk, adaptive, ancestor_sampling), (scheme, trigger))


@pytest.mark.slow
def test_backward_sampling_stays_at_the_posterior_and_moves_early_steps_more(dtype):
    fk = models.finite(MODEL, dtype)
    for seed, fraction in enumerate([0.6, 1.0]):
        adaptive = resampling.adaptive("multinomial", resampling.ess_below(fraction))
        keys, references = (
            jax.random.split(jax.random.key(seed), CHAINS),
            models.exact_paths(MODEL, seed, CHAINS),
        )
        result = iterate(keys, references, fk, adaptive, False, True)
        check_stationary(result, fraction)
    plain = iterate(keys, references, fk, models.any_scheme("multinomial", "always", CONDITIONAL), False)
    # standard error below sqrt(2 / (4 CHAINS)) = 0.012
    assert np.mean(result.update_rate, axis=0)[0] > np.mean(plain.update_rate, axis=0)[0] + 0.05


def unconditional(key, log_weights, num):
    ancestors, log_weights = resampling.systematic(key, log_weights, num)
    return ancestors.at[0].set(0), log_weights


def test_a_scheme_that_ignores_the_reference_is_detected(monkeypatch, dtype):
    monkeypatch.setitem(resampling.CONDITIONAL, "systematic", unconditional)
    adaptive, chains = resampling.adaptive("systematic", resampling.always()), 4 * CHAINS
    keys, fk = jax.random.split(jax.random.key(0), chains), models.finite(MODEL, dtype)
    paths = iterate(keys, models.exact_paths(MODEL, 0, chains), fk, adaptive, False).paths[:, -1]
    assert models.chi_squared(MODEL, paths) < P_LIMIT


def _start(key):
    return jax.random.randint(key, (), 0, 10**6)


def _stay(key, x, t):
    return x


def _score(scores, x_previous, x, t):
    return scores[t]


def test_identical_scores_give_the_reference_no_advantage(dtype):
    # four particles, the same score for all: every slot has the same weight after every step, and the others are
    # resampled from the reference with probability 1/4 each (multinomial) or keep their score (the other schemes)
    scores = jnp.log(jnp.asarray([0.2, 0.5, 0.9], dtype))
    fk = smc.FeynmanKac(_start, _stay, Partial(_score, scores))

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def run(key, adaptive):
        result = smc.conditional_filter(key, fk, jnp.full(3, -1), 4, resampling=adaptive)
        return jax.nn.softmax(result.log_weights), result.ancestors[1, 1:], result.log_evidence

    for scheme in CONDITIONAL:
        keys = jax.random.split(jax.random.key(1), 10_000)
        weights, ancestors, log_evidence = run(keys, models.any_scheme(scheme, "always", CONDITIONAL))
        np.testing.assert_allclose(weights, 0.25, rtol=1e-10)
        np.testing.assert_allclose(log_evidence, np.log(0.09), rtol=1e-10)
        share = np.mean(ancestors[:, :, None] == np.arange(4), axis=1)
        expected = 0.25 if scheme == "multinomial" else np.array([0, 1, 1, 1]) / 3
        assert np.all(np.abs(z_scores(share, expected)) < Z_LIMIT), scheme


@pytest.mark.slow
def test_linear_gaussian_smoothing_means(dtype):
    # 40 chains of 60 paths after 15: the mean over chains has the standard error of 40 independent means
    y = jnp.asarray(np.random.default_rng(5).normal(size=20) * 1.5, dtype)
    means, variances = kalman.smooth(np.asarray(y, float), **models.LINEAR)
    run = lambda key: smc.particle_gibbs(key, models.linear(y), 20, 10, 75).paths[15:]  # noqa: E731
    paths = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(2), 40))
    assert np.all(np.abs(z_scores(np.mean(paths, axis=1), means)) < Z_LIMIT)
    squares = np.mean((np.asarray(paths) - means) ** 2, axis=1)
    assert np.all(np.abs(z_scores(squares, variances)) < Z_LIMIT)


@pytest.mark.slow
def test_ancestor_sampling_moves_the_early_steps_of_a_long_path(key, dtype):
    y = jnp.asarray(np.random.default_rng(5).normal(size=50), dtype)
    start = jnp.zeros(50, dtype)
    rates = [
        smc.particle_gibbs(
            key, models.linear(y), 50, 5, 40, reference=start, ancestor_sampling=sampled
        ).update_rate
        for sampled in (True, False)
    ]
    assert rates[0][0] > 0.5
    assert rates[1][0] < 0.2


@pytest.mark.f32
def test_dtypes_repeatability_and_data_that_trace_nothing(key, count_compiles, dtype):
    y = jnp.linspace(0.0, 1.0, 6, dtype=dtype)
    first, other = smc.particle_gibbs(key, models.linear(y), 6, 4, 3), y + jnp.nan
    with count_compiles() as compiles:
        again = smc.particle_gibbs(key, models.linear(y), 6, 4, 3)
        with_nan = smc.particle_gibbs(key, models.linear(other), 6, 4, 3)
    assert compiles.count == 0
    assert np.array_equal(first.paths, again.paths)
    assert first.status == 0
    assert with_nan.status == Status.NON_FINITE  # of the filter that draws the reference
    assert first.paths.dtype == first.log_evidence.dtype == first.update_rate.dtype == dtype
    assert first.paths.shape == (3, 6)
    assert first.ess.shape == (3, 6)


def test_slot_zero_follows_the_reference(key, dtype):
    y = jnp.linspace(0.0, 1.0, 6, dtype=dtype)
    reference = jnp.linspace(-1.0, 1.0, 6, dtype=dtype)
    result = smc.conditional_filter(key, models.linear(y), reference, 5)
    assert np.array_equal(result.paths[0], reference)
    assert np.all(result.ancestors[:, 0] == 0)
    alone = smc.conditional_filter(key, models.linear(y), reference, 1, store="none")
    weight = models.log_normal(y - reference, models.LINEAR["noise"]).sum()
    assert np.isclose(alone.log_evidence, weight)


def _fault(at, value, x_previous, x, t):
    return jnp.where(t == at, value, jnp.zeros_like(x))


@pytest.mark.parametrize(
    ("value", "impossible", "status"),
    [
        (-np.inf, 0.0, Status.DEGENERATE_WEIGHTS),
        (np.nan, 0.0, Status.NON_FINITE),
        (np.inf, 0.0, Status.NON_FINITE),
        (0.0, -np.inf, Status.DEGENERATE_WEIGHTS),  # the model cannot have drawn the reference
        (0.0, np.nan, Status.NON_FINITE),
        (0.0, 0.0, Status.OK),
    ],
)
def test_a_pass_that_fails_leaves_the_path(key, value, impossible, status, dtype):
    good = models.linear(jnp.zeros(4, dtype))
    faults = [Partial(_fault, jnp.int32(2), jnp.asarray(x, dtype)) for x in (value, impossible)]
    fk = smc.FeynmanKac(good.init_sample, good.propagate, *faults)
    reference = jnp.arange(4.0, dtype=dtype)
    result = smc.particle_gibbs(key, fk, 4, 3, 2, reference=reference)
    assert result.status == status
    same = np.array_equal(result.paths, np.stack([reference, reference]))
    assert same == (status != Status.OK)
    assert np.all(result.update_rate == 0) == same


def test_bad_input_is_refused(key, dtype):
    fk = models.linear(jnp.zeros(4, dtype))
    silent = smc.FeynmanKac(fk.init_sample, fk.propagate, fk.log_potential)
    plain = smc.lift(fk)
    recording = smc.BatchedFeynmanKac(
        plain.init, plain.extend, record=lambda x: x, log_suffix=plain.log_suffix
    )
    with pytest.raises(ValueError, match="num_particles >= 2"):
        smc.particle_gibbs(key, fk, 4, 1, 3)
    with pytest.raises(ValueError, match="num_iterations must be at least 1"):
        smc.particle_gibbs(key, fk, 4, 3, 0)
    with pytest.raises(ValueError, match="give log_transition"):
        smc.particle_gibbs(key, silent, 4, 3, 2)
    with pytest.raises(ValueError, match="no conditional form of 'residual'"):
        smc.particle_gibbs(key, fk, 4, 3, 2, resampling="residual")
    with pytest.raises(ValueError, match="use resampling='multinomial'"):
        smc.particle_gibbs(key, fk, 4, 3, 2, resampling="systematic", backward_sampling=True)
    with pytest.raises(ValueError, match="use ancestor_sampling=True"):
        smc.particle_gibbs(key, recording, 4, 3, 2, backward_sampling=True)
    with pytest.raises(ValueError, match=r"expected shapes \(4,\), got \(3,\)"):
        smc.particle_gibbs(key, fk, 4, 3, 2, reference=jnp.zeros(3, dtype))
    with pytest.raises(ValueError, match="at least one"):
        smc.conditional_filter(key, fk, jnp.zeros(0, dtype), 3)
    with pytest.raises(TypeError, match="dtypes of the particles"):
        smc.conditional_filter(key, fk, jnp.zeros(4, jnp.int32), 3)
