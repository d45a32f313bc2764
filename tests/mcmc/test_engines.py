"""One density function serves most tests, so that most of them share compiled programs: its arrays are data."""

import re
import warnings

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import mcmc, targets
from probinfer.core.errors import ConvergenceWarning, advice
from probinfer.core.status import Status
from probinfer.mcmc import report
from probinfer.mcmc.adaptation import metric as metrics
from probinfer.mcmc.adaptation import warmup as warmups
from probinfer.running.checkpoint import Checkpoint

LOC = np.array([3.0, -20.0, 0.1, 500.0])
SCALE = np.array([1.0, 10.0, 0.01, 100.0])
ROOT = np.array([[1, 0, 0, 0], [0.9, 0.43, 0, 0], [-0.5, 0.5, 0.7, 0], [0.3, 0, 0.2, 0.9]]) * SCALE[:, None]
COVARIANCE = ROOT @ ROOT.T


def two_normals(first, second, precision, lower, values):
    """Log of the sum of two normal densities of one covariance, the second one lower by ``lower`` nats."""

    def log_normal(loc):
        offset = values - loc
        return -0.5 * offset @ precision @ offset

    return jnp.logaddexp(log_normal(first), log_normal(second) - lower)


def make_target(first, second, covariance, dtype, example=None, lower=0.0):
    arrays = (jnp.asarray(x, dtype) for x in (first, second, np.linalg.inv(covariance), lower))
    start = jnp.zeros(4, dtype) if example is None else jnp.asarray(example, dtype)
    return targets.from_logdensity(targets.LogDensity(two_normals, *arrays), start)


@pytest.fixture(scope="module")
def normal_target():
    return make_target(LOC, LOC, COVARIANCE, jnp.result_type(float))


@pytest.fixture(scope="module")
def nuts(normal_target):
    return mcmc.NUTS().sample(jax.random.key(1), normal_target, progress=False)


@pytest.fixture(scope="module")
def hmc(normal_target):
    return mcmc.HMC().sample(jax.random.key(2), normal_target, progress=False)


def assert_moments(posterior, loc, covariance):
    """z-tests of 4 means and 10 second moments at 5 standard errors: a rate of 1e-5 (standard errors are estimated)."""
    from probinfer.inference import diagnostics

    draws = posterior.draws
    root = np.linalg.cholesky(covariance)
    whitened = np.einsum("ij,cnj->cni", np.linalg.inv(root), np.asarray(draws, float) - loc)
    i, j = np.tril_indices(4)
    quantities = np.concatenate([whitened, whitened[..., i] * whitened[..., j]], axis=2)
    expected = np.concatenate([np.zeros(4), (i == j).astype(float)])
    error = np.asarray(diagnostics.mcse_mean(jnp.asarray(quantities)), float)
    # the rounding of float32 positions is worth a few of its epsilons in units of the narrowest direction
    slack = 0.0 if draws.dtype == jnp.float64 else 0.02
    assert np.all(np.abs(quantities.mean((0, 1)) - expected) < 5 * error + slack)


@pytest.mark.parametrize(
    "sampler", [pytest.param("nuts", marks=pytest.mark.f32), pytest.param("hmc", marks=pytest.mark.slow)]
)
def test_moments_of_a_badly_scaled_correlated_normal(sampler, request):
    posterior = request.getfixturevalue(sampler)
    assert_moments(posterior, LOC, COVARIANCE)
    assert posterior.info.status == Status.OK
    assert posterior.draws.shape == (4, 1000, 4)


@pytest.mark.f32
def test_info_reports_transitions_and_warmup(nuts, dtype):
    info = nuts.info
    for name in ("diverging", "acceptance_rate", "num_leapfrogs", "energy", "tree_depth"):
        assert getattr(info, name).shape == (4, 1000), name
    # the mean acceptance of 4000 draws is within 0.12 of the target of dual averaging
    assert abs(float(info.acceptance_rate.mean()) - 0.8) < 0.12
    assert not info.diverging.any()
    assert info.metric_name != "diagonal"
    assert info.metric_name in info.metric_reason
    assert 0 < int(info.num_warmup) < 1000
    assert int(info.num_warmup_gradients) > int(info.num_warmup)
    assert float(jnp.max(info.rhat)) < 1.01
    assert float(jnp.min(info.ess)) > 400
    # energy is potential plus kinetic energy, so it exceeds minus the log density
    log_density = jax.vmap(jax.vmap(lambda x: two_normals(LOC, LOC, np.linalg.inv(COVARIANCE), 0.0, x)))(
        nuts.draws
    )
    if dtype == jnp.float64:
        assert bool(jnp.all(info.energy >= -log_density - 1e-6))


def test_the_chosen_metric_is_the_covariance(nuts):
    # a normal target is identified by d + 1 draws and gradients; low-rank leaves factors of at most 2
    whitened = np.linalg.solve(
        np.linalg.cholesky(nuts.info.inverse_mass_matrix), np.linalg.cholesky(COVARIANCE)
    )
    values = np.linalg.svd(whitened, compute_uv=False)
    assert values.max() / values.min() < 2.1


@pytest.mark.slow
def test_hmc_lengths_are_jittered_and_end_before_the_cap(hmc):
    steps = np.unique(hmc.info.num_leapfrogs)
    assert len(steps) >= 3
    assert steps.max() <= 20
    assert not hmc.info.tree_depth.any()


def test_new_data_compile_nothing(nuts, count_compiles):
    other = make_target(2 * LOC, 2 * LOC, 2.0 * COVARIANCE, jnp.result_type(float))
    mcmc.NUTS().sample(jax.random.key(5), other, progress=False)
    with count_compiles() as compiles:
        again = mcmc.NUTS().sample(jax.random.key(1), other, progress=False)
    assert compiles.count == 0
    assert not np.array_equal(again.draws, nuts.draws)


def test_same_key_same_draws_and_another_key_others(nuts, normal_target):
    again = mcmc.NUTS().sample(jax.random.key(1), normal_target, progress=False)
    np.testing.assert_array_equal(again.draws, nuts.draws)
    other = mcmc.NUTS().sample(jax.random.key(3), normal_target, progress=False)
    assert not np.array_equal(other.draws, nuts.draws)


def test_resumed_run_makes_the_same_draws(nuts, normal_target, tmp_path):
    checkpoint = Checkpoint(tmp_path, every=400)
    mcmc.NUTS().sample(jax.random.key(1), normal_target, progress=False, checkpoint=checkpoint)
    # as if the process had been killed after 400 of the 1000 draws
    for part in sorted((tmp_path / "draws").glob("step_*.part"))[1:]:
        part.unlink()
    resumed = mcmc.NUTS().sample(jax.random.key(1), normal_target, progress=False, checkpoint=checkpoint)
    np.testing.assert_array_equal(resumed.draws, nuts.draws)


def test_chains_in_different_modes_are_reported(dtype):
    target = make_target(LOC - 30 * SCALE, LOC + 30 * SCALE, np.diag(SCALE**2), dtype, example=LOC)
    expected = r"disagree most on value\[\d\] \(R-hat .*fewest effective draws .*look for several modes"
    for seed in range(6):  # all four chains are in one mode at a rate of 1 in 8, six times over of 4e-6
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            posterior = mcmc.NUTS().sample(jax.random.key(seed), target, progress=False)
        differ = np.ptp(np.sign(posterior.draws[:, -1, 0] - LOC[0])) > 0
        assert posterior.info.status == (Status.CHAINS_DISAGREE if differ else Status.OK)
        if differ:
            break
    assert re.search(expected, str(caught[-1].message))
    assert float(jnp.max(posterior.info.rhat)) > 1.5
    assert posterior.info.num_dropped_starts == 0


def test_no_chain_starts_in_a_mode_of_negligible_mass(dtype):
    """The target of the test above, one mode e^100 times lower: a chain there would stay for the whole run.

    All 16 starts are in one mode at a rate of 3e-5.
    """
    apart = 30 * SCALE
    target = make_target(LOC - apart, LOC + apart, np.diag(SCALE**2), dtype, example=LOC, lower=100.0)
    posterior = mcmc.NUTS().sample(jax.random.key(0), target, progress=False)
    assert posterior.info.status == Status.OK
    assert_moments(posterior, LOC - apart, np.diag(SCALE**2))
    num = int(posterior.info.num_dropped_starts)
    assert 0 < num < 16
    expected = f"{num} of 16 starts dropped: log density more than 28 (10 + d log 100) below the best"
    assert posterior.info.starts_reason == expected
    shared = posterior.info._replace(num_dropped_starts=13, num_shared_starts=1)
    assert shared.starts_reason.endswith("; 1 of 4 chains start where another one does")


@pytest.mark.slow
def test_without_warmup_the_chains_are_blackjax_chains(dtype):
    precision = jnp.asarray(np.linalg.inv(np.diag([1.0, 4.0, 9.0, 16.0])), dtype)
    logdensity_fn = targets.LogDensity(
        two_normals, jnp.zeros(4, dtype), jnp.zeros(4, dtype), precision, jnp.zeros((), dtype)
    )
    config = mcmc.WarmupConfig(jnp.ones(3, bool), jnp.asarray(0.8, dtype), 0, 4)
    algorithm = mcmc.chains(logdensity_fn, mcmc.Trajectories("nuts"), config)
    positions = jax.random.normal(jax.random.key(0), (2, 4), dtype)
    state = jax.jit(algorithm.init)(positions)
    sampler = blackjax.nuts(logdensity_fn, state.warmup.step_size, jnp.ones(4, dtype))
    expected = [sampler.init(position) for position in positions]
    ours, theirs = jax.jit(algorithm.step), jax.jit(sampler.step)
    for key in jax.random.split(jax.random.key(1), 3):
        state, info = ours(key, state)
        steps = [theirs(k, chain) for k, chain in zip(jax.random.split(key, 2), expected, strict=True)]
        expected = [chain for chain, _ in steps]
        positions = [chain.position for chain in expected]
        np.testing.assert_allclose(state.chains.position, positions, atol=1e-10)
        np.testing.assert_array_equal(info.num_leapfrogs, [i.num_integration_steps for _, i in steps])


def judged(num_diverging, num_draws=1000, offset=0.0):
    rng = np.random.default_rng(0)
    draws = jnp.asarray(rng.normal(size=(4, num_draws, 2)) + offset * np.arange(4)[:, None, None])
    diverging = (jnp.arange(4 * num_draws) < num_diverging).reshape(4, num_draws)
    verdict = report.with_divergences(report.convergence({"mu": draws}), diverging)
    return int(verdict.status), report.explain(verdict, 4, num_draws, diverging)


def test_divergences_are_part_of_the_verdict():
    assert judged(0)[0] == judged(3)[0] == Status.OK
    status, text = judged(4)
    assert status == Status.DIVERGENT_TRANSITIONS
    assert text == "4 of 4000 transitions diverged"
    assert "target_acceptance" in advice(status)
    status, text = judged(3, offset=1.0)
    assert status == Status.CHAINS_DISAGREE
    assert text.startswith(
        "3 of 4000 transitions diverged (raise target_acceptance, or reparametrize), the chains"
    )


def test_too_few_draws_are_not_judged():
    assert "3 draws per chain are too few to judge" in judged(0, num_draws=3)[1]
    assert "nan" not in judged(0, num_draws=5)[1]
    constant = report.convergence({"mu": jnp.zeros((2, 50))})
    assert report.explain(constant, 2, 50) == "the draws of mu do not move, or are too few to judge"


@pytest.mark.slow
def test_a_funnel_and_a_cliff_are_reported(dtype):
    """The neck of a funnel is too narrow for any one step size: chains of 500 draws do not agree on its width.

    Over keys R-hat is 1.03 to 2.4 (limit 1.01) and the effective size 3 to 43 (limit 100 a chain), while transitions
    diverge rarely (0 to 2 of 1000). What diverges is a trajectory that falls off a cliff: here most of them.
    """
    engine = mcmc.NUTS(num_warmup=200, num_draws=500, num_chains=2)
    for edge, message in (
        (jnp.inf, "the chains disagree"),
        (1.0, "of 1000 transitions diverged.*target_acceptance"),
    ):
        target = targets.from_logdensity(
            targets.LogDensity(funnel, jnp.asarray(edge, dtype)),
            {"width": jnp.zeros((), dtype), "x": jnp.zeros(9, dtype)},
        )
        with pytest.warns(ConvergenceWarning, match=message):
            posterior = engine.sample(jax.random.key(0), target, progress=False)
        assert posterior.info.status >= Status.DIVERGENT_TRANSITIONS


def funnel(edge, values):
    """Neal's funnel, 5000 nats lower where the width is beyond the edge."""
    width = values["width"]
    log_p = -0.5 * (width / 3) ** 2 - 0.5 * jnp.sum(values["x"] ** 2) * jnp.exp(-width) - 4.5 * width
    return log_p - jnp.where(jnp.abs(width) > edge, 5000, 0)


def normal_draws(root, dtype, steps=30):
    """Draws and gradients of a normal, as the warm-up collects them."""
    z = np.random.default_rng(0).normal(size=(steps, 4, 4))
    precision = np.linalg.inv(root @ root.T)
    x = z @ root.T
    return jnp.asarray(x, dtype), jnp.asarray(-x @ precision, dtype)


WIDE = [1e-3, 1, 10, 1e3]
CORRELATED = np.eye(4)
CORRELATED[1, 0] = 5.0  # one pair with correlation 0.98: eigenvalues 1.98 and 0.02 of the correlation


@pytest.mark.f32
@pytest.mark.parametrize(
    ("root", "name"),
    [
        (np.diag([1e-3, 1, 10, 1e3]), "diagonal"),
        (np.diag([1e-3, 1, 10, 1e3]) @ CORRELATED, "low-rank"),
        (ROOT, "dense"),
    ],
)
def test_the_simplest_metric_that_whitens_is_chosen(root, name, dtype):
    draws, gradients = normal_draws(root, dtype)
    candidates = jnp.ones(3, bool)
    choice = jax.jit(metrics.choose, static_argnums=4)(draws, gradients, jnp.asarray(30), candidates, 4)
    if name == "dense":  # the divergence of a low-rank metric is small here as well
        assert metrics.NAMES[int(choice.chosen)] != "diagonal"
        assert choice.divergences[2] < 0.01
    else:
        assert metrics.NAMES[int(choice.chosen)] == name
    only = jax.jit(metrics.choose, static_argnums=4)(
        draws, gradients, jnp.asarray(30), jnp.asarray(metrics.allowed_metrics(name, 4)), 4
    )
    assert metrics.NAMES[int(only.chosen)] == name


def test_rows_beyond_the_count_do_not_count(dtype):
    draws, gradients = normal_draws(ROOT, dtype)
    choose = jax.jit(metrics.choose, static_argnums=4)
    clean = choose(draws, gradients, jnp.asarray(20), jnp.ones(3, bool), 4)
    dirty = choose(
        draws.at[20:].set(1e6), gradients.at[20:].set(jnp.nan), jnp.asarray(20), jnp.ones(3, bool), 4
    )
    np.testing.assert_allclose(clean.divergences, dirty.divergences, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(clean.metric.sigma, dirty.metric.sigma, rtol=1e-6)


def test_nothing_changes_once_the_warmup_is_finished(dtype):
    config = warmups.WarmupConfig(jnp.ones(3, bool), jnp.asarray(0.8, dtype), 30, 4)
    state = warmups.init(config, 4, metrics.identity(4, 4, dtype))
    update = jax.jit(warmups.update)
    draws, gradients = normal_draws(np.eye(4), dtype, steps=40)
    for index in range(30):
        assert not bool(warmups.is_finished(state)), index
        state = update(
            config,
            state,
            draws[index],
            gradients[index],
            jnp.zeros(4, dtype),
            jnp.full(4, 0.9, dtype),
            jnp.asarray(7),
        )
    assert bool(warmups.is_finished(state))
    assert int(state.num_gradients) == 30 * 7
    after = update(
        config, state, draws[31], gradients[31], jnp.zeros(4, dtype), jnp.full(4, 0.1, dtype), jnp.asarray(7)
    )
    jax.tree.map(np.testing.assert_array_equal, after, state)


def langevin(logdensity_fn):
    return blackjax.mala(logdensity_fn, 0.6)


def test_any_blackjax_algorithm_is_an_engine(dtype):
    target = make_target(np.zeros(4), np.zeros(4), np.eye(4), dtype)
    engine = mcmc.Blackjax(langevin, num_discard=200, num_draws=1000)
    posterior = engine.sample(jax.random.key(0), target, progress=False)
    assert posterior.draws.shape == (4, 1000, 4)
    assert posterior.info.sampler["acceptance_rate"].shape == (4, 1000)
    assert posterior.info.status == Status.OK
    assert_moments(posterior, np.zeros(4), np.eye(4))


def test_float32_target_in_a_float64_process():
    target = make_target(np.zeros(4), np.zeros(4), np.eye(4), jnp.float32)
    engine = mcmc.Blackjax(langevin, num_draws=50)
    with pytest.warns(
        ConvergenceWarning, match=r"fewest effective draws .*run more draws"
    ):  # 50 draws are few
        posterior = engine.sample(jax.random.key(0), target, progress=False)
    assert posterior.draws.dtype == jnp.float32
    assert bool(jnp.all(jnp.isfinite(posterior.draws)))


def test_blackjax_states_need_a_position(normal_target):
    from probinfer.core.algorithms import Algorithm

    engine = mcmc.Blackjax(Algorithm(lambda position: (position,), lambda key, state: (state, None)))
    with pytest.raises(TypeError, match="position"):
        engine.sample(jax.random.key(0), normal_target, progress=False)


@pytest.mark.parametrize("engine", [mcmc.NUTS, mcmc.HMC])
def test_impossible_settings_are_refused(engine):
    with pytest.raises(TypeError, match="num_warmup"):
        engine(0.8)
    with pytest.raises(TypeError, match="target_acceptance"):
        engine(target_acceptance="high")
    for settings in ({"num_draws": 0}, {"num_chains": 0}, {"num_warmup": -1}):
        with pytest.raises(ValueError, match="expected num_warmup"):
            engine(**settings)
    with pytest.raises(ValueError, match="target_acceptance"):
        engine(target_acceptance=1.0)
    with pytest.raises(ValueError, match="metric must be"):
        engine(metric="riemannian")
    with pytest.raises(ValueError, match="mode must be"):
        engine(mode="pmap")
