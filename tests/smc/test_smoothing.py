from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from probinfer import resampling, smc
from probinfer.core.status import Status
from probinfer.smc.smoothing import backward
from tests.reference import hmm, kalman
from tests.smc import models
from tests.smc.models import Z_LIMIT, z_scores

MODEL = hmm.random_model(13, num_states=3, num_steps=4, dead=0.15)
SCHEMES = ["multinomial", "systematic", "killing"]
RUNS = 10_000


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["all", "some"])
def exact(request, monkeypatch):
    """Choose among all particles, or among the parent and two candidates, so that these nearly always matter."""
    monkeypatch.setattr(backward, "EXACT", 10**9 if request.param else 1)
    if not request.param:
        monkeypatch.setattr(backward, "CANDIDATES", 2)
    yield request.param
    backward._run.clear_cache()


@partial(jax.jit, static_argnames=("sizes", "exact"))
def masses(keys, fk, adaptive, sizes, exact):
    """Evidence (runs,), smoothing masses (runs, T, K), of neighbors (runs, T-1, K, K), update rates, status, step."""
    num_steps, num_states, num_particles, num_paths = sizes

    def run(key):
        result = smc.backward_smoother(
            key, fk, num_steps, num_particles, num_paths=num_paths, resampling=adaptive
        )
        states = jax.nn.one_hot(result.paths, num_states, dtype=result.ess.dtype)
        alive = result.status == int(Status.OK)
        evidence = jnp.where(alive, jnp.exp(result.log_evidence), 0)
        pairs = jnp.einsum("mtk,mtl->tkl", states[:, :-1], states[:, 1:]) / num_paths
        mass = evidence * states.mean(axis=0)
        return evidence, mass, evidence * pairs, result.update_rate, result.status, result.stopped_at

    return jax.vmap(run)(keys)


def pair_masses(model):
    """Unnormalized masses of two successive states (T-1, K, K)."""
    paths, mass = hmm.enumerate_paths(model)
    table = np.zeros((model.num_steps - 1, model.num_states, model.num_states))
    for t in range(model.num_steps - 1):
        np.add.at(table[t], (paths[:, t], paths[:, t + 1]), mass)
    return table


def test_smoothing_is_unbiased_under_every_scheme_and_trigger(exact, dtype):
    # 5 particles, 4 paths; some potentials zero: runs in which all die count with estimate 0. 1.5e3 comparisons in all
    fk, expected, pairs = models.finite(MODEL, dtype), hmm.marginals(MODEL), pair_masses(MODEL)
    common = pairs > 0.01 * expected[0].sum()  # hundreds of draws: the mean of fewer is not Gaussian
    for seed, (scheme, trigger) in enumerate(
        [("multinomial", "always"), ("systematic", "ess"), ("killing", "every")]
    ):
        adaptive = models.any_scheme(scheme, trigger, SCHEMES)
        keys = jax.random.split(jax.random.key(seed), RUNS)
        evidence, mass, both, rate, status, _ = masses(keys, fk, adaptive, (4, 3, 5, 4), exact)
        assert abs(z_scores(evidence, expected[0].sum())) < Z_LIMIT, scheme
        assert np.all(np.abs(z_scores(mass, expected)) < Z_LIMIT), scheme
        assert np.all(np.abs(z_scores(both, pairs))[common] < Z_LIMIT), scheme
        assert set(np.unique(status)) <= {int(Status.OK), int(Status.DEGENERATE_WEIGHTS)}
        assert np.all(rate[:, -1] == 0)
        assert np.all(rate[:, :-1].mean(axis=0) > 0.1)


def _flat(x_previous, x, t):
    return jnp.float32(0) * x - 1.0


@pytest.mark.slow
def test_a_wrong_transition_density_is_detected(dtype):
    fk = models.finite(MODEL, dtype)
    wrong = smc.FeynmanKac(fk.init_sample, fk.propagate, fk.log_potential, _flat)
    adaptive = models.any_scheme("systematic", "always", SCHEMES)
    both = masses(jax.random.split(jax.random.key(0), RUNS), wrong, adaptive, (4, 3, 5, 4), True)[2]
    assert np.abs(z_scores(both, pair_masses(MODEL))).max() > 2 * Z_LIMIT


@pytest.mark.slow
def test_total_variation_falls_as_the_root_of_the_number_of_particles(dtype):
    # as many paths as particles, by both algorithms: 25 are within EXACT, 400 are not. Mean over 200 runs and 3 steps;
    # the slope of its log has a standard error below 0.02 (a third of the mean, sqrt(200), log 16)
    model = hmm.random_model(2, num_states=2, num_steps=3)
    expected = hmm.marginals(model)
    distances = []
    assert 25 <= backward.EXACT < 400
    for size in (25, 400):
        keys = jax.random.split(jax.random.key(size), 200)
        fk, scheme = models.finite(model, dtype), resampling.adaptive()
        evidence, mass, *_ = masses(keys, fk, scheme, (3, 2, size, size), True)
        share = np.asarray(mass) / np.asarray(evidence)[:, None, None]
        distances.append(0.5 * np.abs(share - expected / expected[0].sum()).sum(axis=2).mean())
    assert abs(np.log(distances[1] / distances[0]) / np.log(16) + 0.5) < 0.12


@pytest.mark.f32
@pytest.mark.slow
def test_linear_gaussian_model_and_early_steps(dtype):
    # mean over 40 runs of the means and variances of 300 paths, bias O(1/N)
    y = jnp.asarray(np.random.default_rng(5).normal(size=20) * 1.5, dtype)
    means, variances = kalman.smooth(np.asarray(y, float), **models.LINEAR)
    run = jax.jit(jax.vmap(lambda key: smc.backward_smoother(key, models.linear(y), 20, 300)))
    result = run(jax.random.split(jax.random.key(0), 40))
    paths = np.asarray(result.paths)
    squares = (paths - means) ** 2
    for estimates, expected in ((paths.mean(axis=1), means), (squares.mean(axis=1), variances)):
        error = estimates.std(axis=0) / np.sqrt(40)
        assert np.all(np.abs(estimates.mean(axis=0) - expected) < 0.01 + Z_LIMIT * error)
    assert np.all(result.status == 0)
    # most paths begin in particles of their own, where those of the filter share a few
    assert np.mean([len(np.unique(row)) for row in paths[:, :, 0]]) > 100
    assert result.paths.dtype == result.log_evidence.dtype == result.update_rate.dtype == dtype


@pytest.mark.slow
def test_paths_in_chunks_new_data_and_limit_cases(key, monkeypatch, count_compiles, dtype):
    fk = models.linear(jnp.linspace(0.0, 1.0, 6, dtype=dtype))
    again, other_key = models.linear(jnp.linspace(1.0, 3.0, 6, dtype=dtype)), jax.random.key(5)
    at_once = smc.backward_smoother(key, fk, 6, 16, num_paths=7)
    with count_compiles() as compiles:
        smc.backward_smoother(other_key, again, 6, 16, num_paths=7)
    assert compiles.count == 0
    monkeypatch.setattr(backward, "_CHUNK", 48)  # three paths at a time
    backward._run.clear_cache()
    in_chunks = smc.backward_smoother(key, fk, 6, 16, num_paths=7)
    backward._run.clear_cache()
    np.testing.assert_allclose(in_chunks.paths, at_once.paths, rtol=1e-12)
    single = smc.backward_smoother(key, fk, 6, 1, num_paths=2)
    assert np.all(single.update_rate == 0)
    assert np.array_equal(single.paths[0], single.paths[1])
    first = smc.backward_smoother(key, fk, 1, 16)
    assert first.paths.shape == (16, 1)
    assert first.update_rate.shape == (1,)
    assert first.status == 0


@pytest.mark.parametrize(
    ("weight", "density", "status"),
    [
        (-np.inf, 0.0, Status.DEGENERATE_WEIGHTS),
        (np.nan, 0.0, Status.NON_FINITE),
        (np.inf, 0.0, Status.NON_FINITE),
        (0.0, -np.inf, Status.DEGENERATE_WEIGHTS),  # no particle can precede a state
        (0.0, np.nan, Status.NON_FINITE),
        (0.0, 0.0, Status.OK),
    ],
)
def test_failures_are_reported(weight, density, status, dtype):
    good = models.finite(MODEL, dtype)
    faults = [np.zeros((4, 3, 3)), np.zeros((4, 3, 3))]
    faults[0][2], faults[1][2] = weight, density
    tables = [Partial(models.look_up, jnp.asarray(fault, dtype)) for fault in faults]
    fk = smc.FeynmanKac(good.init_sample, good.propagate, *tables)
    keys, adaptive = (
        jax.random.split(jax.random.key(0), RUNS),
        models.any_scheme("systematic", "ess", SCHEMES),
    )
    *_, actual, stopped_at = masses(keys, fk, adaptive, (4, 3, 5, 4), True)
    assert np.all(actual == status)
    assert np.all(stopped_at == (-1 if weight == 0 else 2))


def _only_positive(x_previous, x, t):
    return jnp.where(x > 0, 0.0, -jnp.inf)


def _undefined_below(x_previous, x, t):
    return jnp.where((x_previous > 0) & (x > 0), -0.5 * (x - x_previous) ** 2, jnp.nan)


def test_the_density_of_a_dead_particle_is_never_used(key):
    # potentials kill particles that are not positive, and the transition density from them is NaN
    good = models.linear(jnp.zeros(4))
    fk = smc.FeynmanKac(good.init_sample, good.propagate, _only_positive, _undefined_below)
    result = smc.backward_smoother(key, fk, 4, 300, num_paths=500)
    assert result.status == Status.OK
    assert np.all(result.paths > 0)


def test_bad_input_is_refused(key, dtype):
    fk = models.linear(jnp.zeros(4, dtype))
    silent = smc.FeynmanKac(fk.init_sample, fk.propagate, fk.log_potential)
    plain = smc.lift(fk)
    recording = smc.BatchedFeynmanKac(
        plain.init, plain.extend, record=lambda x: x, log_suffix=plain.log_suffix
    )
    with pytest.raises(ValueError, match="give log_transition"):
        smc.backward_smoother(key, silent, 4, 3)
    with pytest.raises(ValueError, match="ancestor_sampling=True"):
        smc.backward_smoother(key, recording, 4, 3)
    with pytest.raises(ValueError, match="num_paths must be at least 1"):
        smc.backward_smoother(key, fk, 4, 3, num_paths=0)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        smc.backward_smoother(key, fk, 0, 3)
    with pytest.raises(TypeError, match="key"):
        smc.backward_smoother(0, fk, 4, 3)
