"""Tempered SMC and annealing against exact and quadrature evidences; the unbiased evidence; bad input."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probinfer as pi
from probinfer import smc, targets
from probinfer.checks import evidence_sandwich
from probinfer.core.errors import ConvergenceWarning, NumericalError
from probinfer.core.status import Status
from probinfer.numerics import covariance_factor
from probinfer.running.driver import record_nothing, run_until
from probinfer.smc.tempered import initial_distribution, levels, populations
from tests.params import quick
from tests.smc import tempered_cases as cases

SEEDS = 10
RUNS = 256
ENGINE = smc.Tempered(num_particles=256)
CASES = {"normal": cases.NORMAL, "bimodal": cases.BIMODAL, "skewed": cases.SKEWED}


def infer(seed, target, engine=ENGINE, **settings):
    """Return a posterior; its status replaces the warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return pi.infer(jax.random.key(seed), target, engine, progress=False, **settings)


def annealed(seed, case):
    target = cases.target_of(case)
    return smc.anneal(jax.random.key(seed), target, num_particles=RUNS, refine=4, progress=False)


def test_the_reference_is_right():
    log_evidence, mean, covariance = cases.conjugate()
    truth = cases.truth(cases.NORMAL)
    np.testing.assert_allclose(truth.log_evidence, log_evidence, rtol=1e-10)
    np.testing.assert_allclose(truth.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(truth.sd, np.sqrt(np.diag(covariance)), rtol=1e-9)


@pytest.mark.f32
@pytest.mark.parametrize("name", quick(CASES, "bimodal"))
def test_evidence_and_moments(name, dtype):
    exact, target = cases.truth(CASES[name]), cases.target_of(CASES[name])
    posteriors = [infer(seed, target) for seed in range(SEEDS)]
    inside = [low <= exact.log_evidence <= high for low, high in (p.info.interval() for p in posteriors)]
    assert sum(inside) >= SEEDS - 4  # five misses of ten at 95 %: 6e-5
    logs = np.array([p.log_evidence for p in posteriors])
    assert logs.dtype == dtype
    assert np.all([p.info.log_evidence_error > 0.005 for p in posteriors])
    # the mean over seeds of a mean over draws, its error from the seeds: 6 errors of t_9 are one in 5 000 for a number
    for fn, right in ((lambda u: u, exact.mean), (lambda u: (u - exact.mean) ** 2, exact.sd**2)):
        values = np.array([jax.tree.leaves(p.expectation(fn))[0] for p in posteriors])
        error = values.std(axis=0, ddof=1) / np.sqrt(SEEDS)
        assert np.all(np.abs(values.mean(axis=0) - right) < 6 * error)
    info = posteriors[0].info
    assert info.start == "prior"
    assert info.num_undefined == 0
    assert info.temperatures[-1] == 1
    assert np.all(np.diff(info.temperatures) > 0)
    assert info.acceptance.shape == info.particle_ess.shape == (8, len(info.temperatures))
    assert np.all((info.acceptance > 0.15) & (info.acceptance <= 1))
    proposals = int(np.sum(1 + 7 * info.tries[info.tries > 0]))
    # base draws of islands and pilot; 32 ancestors, evaluated and moved 7 times; the pilot makes one proposal a move
    assert info.num_densities == 9 * 256 + 32 * (8 * len(info.tries) + 8 * proposals)
    assert posteriors[0]["value"].shape == (8, 256, 2)
    weights = np.asarray(posteriors[0].log_weights, float)
    assert weights.shape == (8, 256)
    np.testing.assert_allclose(
        posteriors[0].log_evidence, np.log(np.mean(np.exp(weights))), rtol=100 * jnp.finfo(dtype).eps
    )


@pytest.mark.parametrize("finished", quick([0, 1, 3], 0, 1))
def test_islands_that_were_finished_before_ctrl_c_are_returned(finished, press_before):
    target = cases.target_of(cases.NORMAL)
    call = partial(pi.infer, jax.random.key(0), target, ENGINE, progress=False)
    press_before(populations.PopulationRunner, "run", finished + 2)  # the first is the pilot
    if not finished:
        with pytest.raises(KeyboardInterrupt):
            call()
        return
    with pytest.warns(ConvergenceWarning, match=f"{finished} of 8 islands were finished"):
        posterior = call()
    assert posterior.info.status == Status.INTERRUPTED
    np.testing.assert_array_equal(
        posterior.info.log_evidences, infer(0, target).info.log_evidences[:finished]
    )
    # one island has an evidence without an error
    assert np.all(
        np.isfinite([posterior.info.log_evidence_error, *posterior.info.interval()]) == (finished > 1)
    )


@pytest.mark.slow
def test_without_a_prior_the_integral_is_estimated():
    exact = cases.truth(cases.BIMODAL)
    posteriors = [infer(seed, cases.without_prior(cases.BIMODAL)) for seed in range(4)]
    inside = [p.info.interval(0.99) for p in posteriors]
    # two misses of four at 99 %: .0006
    assert sum(low <= exact.log_evidence <= high for low, high in inside) >= 3
    assert {p.info.start for p in posteriors} == {"student-t"}
    assert (
        posteriors[0].info.num_gradients > 4 * initial_distribution._NUM_DRAWS
    )  # those of its pilot are counted


@partial(jax.jit, static_argnames="num")
def log_evidences(algorithm, schedule, keys, *, num):
    def one(key):
        key_begin, key_levels = jax.random.split(key)
        state = levels.init_population(algorithm, key_begin, schedule, jnp.asarray(False), num_particles=num)
        state, _ = run_until(key_levels, algorithm, state, levels.is_finished, 200, collect=record_nothing)
        return state.log_evidence

    return jax.lax.map(one, keys)


@pytest.mark.slow
@pytest.mark.parametrize("waste_free", [True, False])
def test_the_evidence_of_a_frozen_schedule_is_unbiased(waste_free):
    config = smc.Tempered(num_particles=32, waste_free=waste_free)
    initial = initial_distribution.find_initial_distribution(
        jax.random.key(1), cases.target_of(cases.BIMODAL), False, None
    )
    pilot = populations.learn_schedule(ENGINE, initial, jax.random.key(2), False)
    algorithm = populations.PopulationRunner(config, initial.bridge, False, None).algorithm()
    keys = jax.random.split(jax.random.key(3), 1000)
    logs = log_evidences(algorithm, pilot.schedule, keys, num=32)
    ratio = np.exp(np.asarray(logs) - cases.truth(cases.BIMODAL).log_evidence)
    error = ratio.std(ddof=1) / np.sqrt(len(ratio))
    assert error < 0.05
    assert abs(ratio.mean() - 1) < 4.5 * error  # 7e-6 for a normal mean


def test_a_diagonal_factor_is_a_dense_one_without_the_zeros():
    scales, vector = jnp.asarray([0.5, 3.0]), jnp.asarray([-1.0, 2.0])
    for apply in (covariance_factor.apply, covariance_factor.apply_transpose):
        np.testing.assert_allclose(apply(scales, vector), apply(jnp.diag(scales), vector), rtol=1e-12)
    draws = np.random.default_rng(5).normal(size=(30, covariance_factor.MAX_DENSE_DIMENSION + 1))
    wide, narrow = (
        jax.jit(covariance_factor.estimate)(jnp.zeros(30), jnp.asarray(draws[:, :d])) for d in (65, 3)
    )
    assert wide.shape == covariance_factor.identity(65, wide.dtype).shape == (65,)
    np.testing.assert_allclose(wide, draws.std(axis=0, ddof=1), rtol=1e-12)
    covariance, share = np.cov(draws[:, :3].T), 4 / 34  # shrunk by (d + 1) / (d + 1 + n)
    shrunk = (1 - share) * covariance + share * np.diag(np.diag(covariance))
    np.testing.assert_allclose(narrow @ narrow.T, shrunk, rtol=1e-10)


def test_new_data_of_the_same_shape_compile_nothing(count_compiles):
    def both(seed, case):
        infer(seed, cases.target_of(case))
        annealed(seed, case)

    both(0, cases.NORMAL)
    with count_compiles() as compiles:
        both(1, cases.SKEWED)
    assert compiles.count == 0


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    target = cases.target_of(cases.SKEWED)
    plain = infer(5, target)
    checkpoint = pi.Checkpoint(tmp_path / "run", every=1)
    checkpointed = infer(5, target, checkpoint=checkpoint)
    for name in ("pilot", "island-2", "island-3"):  # as if killed after the first steps of the second island
        parts = sorted((tmp_path / "run" / name).glob("step_*.part"))
        assert len(parts) > 1
        parts[-1].unlink()
    again = infer(5, target, checkpoint=checkpoint)
    for posterior in (checkpointed, again):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(posterior), strict=True):
            np.testing.assert_array_equal(a, b)


def test_undefined_likelihoods_are_zero_and_counted():
    case = cases.NORMAL._replace(cut=1.5, bad=np.nan)
    with pytest.warns(
        ConvergenceWarning, match=r"of 2304 draws of the prior have an undefined \(NaN\) log likelihood"
    ):
        posterior = pi.infer(jax.random.key(3), cases.target_of(case), ENGINE, progress=False)
    assert posterior.info.status == Status.NON_FINITE
    low, high = posterior.info.interval(0.999)
    assert low <= cases.log_evidence_below(1.5) <= high  # .001
    assert posterior.info.num_undefined == pytest.approx(9 * 256 * 0.067, rel=0.3)  # P(u_0 > 1.5), 4 errors
    assert np.max(jax.tree.leaves(posterior.draws)[0][..., 0]) <= 1.5


def test_plus_infinity_is_an_error():
    # at draws of the prior, and where only the moves come: 1.5 is 8 sd above the prior mean, 1.6 above the posterior's
    far = cases.NORMAL._replace(
        scales=np.array([0.18, 3.0]), locs=np.array([[8.0, -2.0]] * 2), cut=1.5, bad=np.inf
    )
    for case, message in (
        (cases.NORMAL._replace(cut=0.0, bad=np.inf), "draws of the initial distribution"),
        (far, "step"),
    ):
        with pytest.raises(NumericalError, match=message) as caught:
            infer(0, cases.target_of(case))
        assert caught.value.status == Status.NON_FINITE


def test_nothing_but_zero_likelihoods_is_an_error():
    for bad in (-np.inf, np.nan):
        with pytest.raises(NumericalError, match="every one of 256 draws") as caught:
            infer(0, cases.target_of(cases.NORMAL._replace(cut=-50.0, bad=bad)))
        assert caught.value.status == Status.DEGENERATE_WEIGHTS


def test_islands_may_die_and_count_as_zero():
    # the likelihood is zero but for 1.5 in 256 prior draws: an island dies with probability .22
    case = cases.NORMAL._replace(cut=-2.52, bad=np.nan)
    flipped = case._replace(locs=-case.locs)
    dead = 0
    for seed in range(6):
        try:
            posterior = infer(seed, cases.target_of(flipped))
        except NumericalError:  # the pilot died
            continue
        died = np.isneginf(posterior.info.log_evidences)
        assert posterior.info.status == (Status.DEGENERATE_WEIGHTS if died.any() else posterior.info.status)
        assert np.array_equal(np.isneginf(posterior.log_weights), np.tile(died[:, None], 256))
        assert np.isfinite(posterior.log_evidence)
        assert np.all(np.isfinite(jax.tree.leaves(posterior.draws)[0]))
        dead += died.sum()
    assert dead > 0


def test_an_initial_distribution_that_cannot_be_fitted_is_an_error():
    nowhere = cases.NORMAL._replace(cut=-1e6, bad=np.nan)
    with pytest.raises(
        NumericalError, match=r"no Student-t could be fitted .* Give the target a prior"
    ) as caught:
        infer(0, cases.without_prior(nowhere))
    assert caught.value.status == Status.NON_FINITE
    assert not np.isfinite(initial_distribution.fit_student(jnp.ones((2, 10, 2)))[2]).all()


def test_a_target_that_is_not_reached_is_an_error():
    timid = smc.Tempered(num_particles=256, ess_fraction=0.9999)  # some thousand levels
    with pytest.raises(NumericalError, match="in 200 levels, not 1") as caught:
        infer(0, cases.target_of(cases.NORMAL), timid)
    assert caught.value.status == Status.MAX_ITERATIONS


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_particles": 24}, ValueError, "32 or more"),
        ({"num_particles": 100}, ValueError, "multiple of 8 .* take 104"),
        ({"num_particles": 64.0}, TypeError, "num_particles"),
        ({"num_islands": 1}, ValueError, "2 or more"),
        ({"ess_fraction": 1.0}, ValueError, "between 0 and 1"),
        ({"ess_fraction": "half"}, TypeError, "ess_fraction"),
        ({"mode": "pmap"}, ValueError, "mode must be"),
    ],
)
def test_settings_out_of_range(settings, error, message):
    with pytest.raises(error, match=message):
        smc.Tempered(**settings)


def test_targets_that_are_refused():
    def log_likelihood(position, row):
        return -0.5 * jnp.sum((row - position) ** 2)

    minibatch = targets.minibatch(
        lambda p: -0.5 * jnp.sum(p**2), log_likelihood, jnp.ones((6, 2)), 2, example=jnp.zeros(2)
    )
    with pytest.raises(TypeError, match="minibatches"):
        infer(0, minibatch)
    with pytest.raises(TypeError, match="checkpoint"):
        infer(0, cases.target_of(cases.NORMAL), checkpoint="here")


# Annealed importance sampling


@pytest.fixture(scope="module")
def frozen():
    return smc.annealing(
        jax.random.key(1), cases.target_of(cases.NORMAL), num_particles=RUNS, refine=4, progress=False
    )


def exact_draws(num):
    _, mean, covariance = cases.conjugate()
    draws = np.random.default_rng(5).multivariate_normal(mean, covariance, num)
    return jnp.asarray(draws, jnp.result_type(float))


@pytest.mark.slow
def test_the_sandwich_holds_the_evidence(frozen):
    log_evidence = cases.conjugate()[0]
    forward = np.asarray(frozen.forward_all(jax.random.key(2), RUNS), float)
    reverse = np.asarray(frozen.reverse_all(jax.random.key(3), exact_draws(RUNS)), float)
    report = evidence_sandwich(forward, reverse, level=0.001)
    low, high = report.interval
    assert low < log_evidence < high  # .001
    assert not report.contradiction
    assert 0 < report.gap < 4  # nats
    for logs, sign in ((forward, 1), (reverse, -1)):  # E w = Z, E 1/w = 1/Z: 4.5 errors are 7e-6
        ratio = np.exp(sign * (logs - log_evidence))
        assert abs(ratio.mean() - 1) < 4.5 * ratio.std(ddof=1) / np.sqrt(RUNS)


@pytest.mark.slow
def test_single_runs_are_what_the_check_takes(frozen):
    report = evidence_sandwich(
        frozen.forward, frozen.reverse(exact_draws(50)), key=jax.random.key(4), num_runs=40, level=0.001
    )
    low, high = report.interval
    assert low < cases.conjugate()[0] < high  # .001
    assert report.gap < 6


def test_anneal_draws_and_weighs(dtype):
    log_evidence, mean, covariance = cases.conjugate()
    posterior = annealed(6, cases.NORMAL)
    info = posterior.info
    assert info.status == Status.OK
    assert info.start == "prior"
    assert posterior.log_weights.shape == (1, RUNS)
    assert posterior.log_weights.dtype == dtype
    assert abs(posterior.log_evidence - log_evidence) < 4 * info.log_evidence_error  # 6e-5
    means = jax.tree.leaves(posterior.expectation(lambda draw: draw))[0]
    assert np.all(np.abs(means - mean) < 4 * np.sqrt(np.diag(covariance) / info.ess))  # 6e-5 each
    assert info.num_gradients > RUNS


def test_undefined_likelihoods_weigh_nothing_when_annealed():
    case = cases.NORMAL._replace(cut=1.5, bad=np.nan)
    with pytest.warns(ConvergenceWarning, match=r"draws of the prior have an undefined"):
        posterior = annealed(7, case)
    dead = posterior.log_weights == -jnp.inf
    assert np.sum(dead) == posterior.info.num_undefined > 0
    log_evidence = cases.log_evidence_below(1.5)
    assert abs(posterior.log_evidence - log_evidence) < 4 * posterior.info.log_evidence_error  # 6e-5


def test_bad_input_of_annealing():
    target, key = cases.target_of(cases.NORMAL), jax.random.key(0)
    with pytest.raises(ValueError, match="refine must be 1"):
        smc.annealing(key, target, refine=0)
    with pytest.raises(TypeError, match="refine"):
        smc.anneal(key, target, refine=2.5)
    with pytest.raises(TypeError, match=r"[Tt]arget"):
        smc.annealing(key, lambda u: -jnp.sum(u**2))


def test_weights_on_few_runs_are_warned_of():
    narrow = cases.bumps([1.0, 0.0], [[4.0, -9.0]] * 2, [np.eye(2) * 1e-4] * 2, [1.0, 3.0])
    with pytest.warns(ConvergenceWarning, match="carry the weight; raise refine"):
        posterior = annealed(8, narrow)
    assert posterior.info.status == Status.POOR_APPROXIMATION
