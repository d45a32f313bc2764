"""Parameters of state-space models: three engines against the Kalman filter and quadrature; faults and bad input."""

import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.tree_util import Partial

import probinfer as pi
from probinfer import mcmc, smc
from probinfer.core.errors import ConvergenceWarning, NumericalError
from probinfer.core.status import Status
from probinfer.mcmc import report
from probinfer.smc.parameters import likelihood, parameter_particles, pilot, pmmh, smc2
from probinfer.smc.parameters import model as parameters
from tests.params import quick
from tests.reference import kalman
from tests.smc import parameter_cases as cases
from tests.smc.models import Z_LIMIT, z_scores

ENGINES = {
    "PMMH": smc.PMMH(num_draws=700, num_warmup=60, keep_paths=True),
    "SMC2": smc.SMC2(num_parameters=128, num_islands=4),
    "ParticleGibbs": smc.ParticleGibbs(num_draws=400, num_warmup=150, keep_paths=True),
}
SEEDS = range(5)


@cache
def infer(name, seed=0, data_seed=0):
    """Return a posterior; its status replaces the warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        target = cases.target(cases.observations(data_seed))
        return pi.infer(jax.random.key(seed), target, ENGINES[name], progress=False)


def errors(posterior, name):
    """(mean - exact) / standard error; the effective sample size is that of the unconstrained coordinate."""
    values = np.asarray(posterior[name], float)
    weights = np.exp(np.asarray(posterior.flat_log_weights(), float)).reshape(values.shape)
    mean = np.sum(weights * values)
    sd = np.sqrt(np.sum(weights * (values - mean) ** 2))
    return (mean - cases.truth(0).mean[name]) / (sd / np.sqrt(float(posterior.info.ess[name])))


def test_quadrature_is_fine_enough():
    for a, b in zip(jax.tree.leaves(cases.truth(0)), jax.tree.leaves(cases.truth(0, 121)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("name", quick(ENGINES, "SMC2"))
def test_posterior_means(name):
    check_means(name)


@pytest.mark.f32(slow=True)
@pytest.mark.parametrize(
    "name", ["SMC2", *(pytest.param(n, marks=pytest.mark.slow) for n in ENGINES if n != "SMC2")]
)
def test_posterior_means_in_either_precision(name):
    check_means(name)


def check_means(name):
    posterior = infer(name)
    assert posterior["slope"].shape[0] == 4
    assert abs(errors(posterior, "slope")) < Z_LIMIT
    assert abs(errors(posterior, "process")) < Z_LIMIT
    assert float(min(posterior.info.ess.values())) > 40  # far from stuck
    assert float(max(posterior.info.rhat.values())) < 1.2


@pytest.mark.parametrize("name", quick(["PMMH", "ParticleGibbs"], "PMMH"))
def test_paths_are_smoothed(name):
    paths = np.asarray(infer(name).info.paths, float)
    assert paths.shape == (4, ENGINES[name].num_draws, cases.NUM_STEPS)
    ess = np.asarray(pi.checks.ess(jnp.asarray(paths)))
    assert ess.min() > 40
    flat = paths.reshape(-1, cases.NUM_STEPS)
    z = (flat.mean(axis=0) - cases.truth(0).path) / (flat.std(axis=0) / np.sqrt(ess))
    assert np.all(np.abs(z) < Z_LIMIT)


def test_what_was_tuned():
    walk, gibbs, population = (infer(name).info for name in ("PMMH", "ParticleGibbs", "SMC2"))
    for info in (walk, population):
        num = int(info.num_particles)
        assert num & (num - 1) == 0
        # measured with a relative error of .18; half as many particles would have more than 1.5
        assert 0.5 < float(info.log_evidence_variance) < 1.5 or num == likelihood.MIN_PARTICLES
    assert np.all((walk.acceptance > 0.05) & (walk.acceptance < 0.4))
    # trajectories of few leapfrogs: .951 over keys, sd .009; a step that was not tuned is accepted at 1
    assert 0.6 < np.mean(gibbs.acceptance) < 0.985
    assert np.min(gibbs.update_rate) > 0.4
    moved = np.asarray(population.num_moves) > 0
    assert moved[-1]
    assert np.all(np.isfinite(population.acceptance) == moved[None, :, None])
    assert walk.num_undefined == population.num_undefined == 0
    assert walk.log_evidences.shape == (4, 700)


def test_the_evidence_lies_in_its_interval():
    exact = cases.truth(0).log_evidence
    posteriors = [infer("SMC2", seed) for seed in SEEDS]
    inside = [low <= exact <= high for low, high in (p.info.interval(0.99) for p in posteriors)]
    assert sum(inside) >= 3  # three misses of five at 99 %: 1e-5
    assert sum(p.info.status == Status.OK for p in posteriors) >= 4  # the rule fails once in 10^4
    ratio = np.exp(np.concatenate([p.info.log_evidences for p in posteriors]) - exact)
    assert ratio.std(ddof=1) < 1
    assert abs(z_scores(ratio, 1.0)) < Z_LIMIT  # every island is unbiased
    logs = np.asarray(posteriors[0].info.log_evidences, float)
    np.testing.assert_allclose(posteriors[0].log_evidence, np.log(np.mean(np.exp(logs))), rtol=1e-5)


def test_new_data_and_keys_compile_nothing(count_compiles):
    for name in ENGINES:
        infer(name)
        with count_compiles() as counter:
            infer(name, 1, 1)
        assert counter.count == 0, name


def test_islands_that_were_finished_before_ctrl_c_are_returned(press_before):
    uninterrupted, target = infer("SMC2"), cases.target(cases.observations(0))
    press_before(smc2, "_run_island", 4)
    with pytest.warns(ConvergenceWarning, match="3 of 4 islands were finished"):
        posterior = pi.infer(jax.random.key(0), target, ENGINES["SMC2"], progress=False)
    assert posterior.info.status == Status.INTERRUPTED
    np.testing.assert_array_equal(posterior.info.log_evidences, uninterrupted.info.log_evidences[:3])


def test_estimates_of_the_likelihood_are_unbiased(dtype):
    target, position = cases.target(cases.observations(0)), jnp.asarray([-0.5, 0.9], dtype)  # by name
    settings = {"slope": 0.9, "process": np.exp(-0.5), **cases.FIXED}
    exact = kalman.kalman(cases.observations(0), **settings)[0]
    keys = jax.random.split(jax.random.key(2), 2000)

    def all_at_once(key):
        return likelihood.estimate_likelihood(key, target, position, 12).log_evidence

    def in_parts(key):
        last = jnp.int32(cases.NUM_STEPS - 1)
        state = likelihood.run_filter(key, target, position, last, 12)
        state = likelihood.extend_filter(jax.random.fold_in(key, 100), target, position, state, last)
        return likelihood.filter_log_evidence(state)[0]

    for fn in (all_at_once, in_parts):
        ratio = np.exp(np.asarray(jax.jit(jax.vmap(fn))(keys)) - exact)
        assert abs(z_scores(ratio, 1.0)) < Z_LIMIT


@pytest.mark.parametrize(
    ("noise", "start", "expected"), [(3.0, 8, 8), (90.0, 8, 64), (90.0, 512, 64), (1e9, 8, 2**15)]
)
def test_the_number_of_particles_follows_the_variance(noise, start, expected, monkeypatch, dtype):
    """A variance of ``noise`` / N; infinite (a filter died) below 32 particles if ``noise`` is large."""

    def variance(key, target, position, num):
        return jnp.asarray(noise / num if num >= 32 or noise < 50 else np.inf, dtype)

    monkeypatch.setattr(likelihood, "_variance", variance)
    target = cases.target(cases.observations(0))
    choice = likelihood.choose_num_particles(jax.random.key(0), target, jnp.zeros(2, dtype), start)
    assert choice.num_particles == expected
    np.testing.assert_allclose(choice.variance, noise / expected, rtol=1e-6)


def test_noisy_filters_are_given_more_particles(monkeypatch):
    """The first population must accept an impossible share; all really have the first number of particles."""
    asked, run = [], pilot.run_population

    def counted(key, target, population, num_particles, *others):
        asked.append(num_particles)
        monkeypatch.setattr(pilot, "_MIN_ACCEPTANCE", 2.0 if len(asked) == 1 else 0.0)
        return run(key, target, population, asked[0], *others)

    monkeypatch.setattr(pilot, "run_population", counted)
    target = cases.target(cases.observations(0))
    stopped, _ = counted(*first_population(target), first_number := 8, "first", False, None)
    assert stopped.needs_more_state_particles
    assert not stopped.finished
    asked.clear()
    learned = pilot.learn_pilot(jax.random.key(1), target, 128, False)
    assert asked == [first_number, 2 * first_number]
    assert learned.population.finished
    assert not learned.population.needs_more_state_particles
    # the standard deviation of the log evidence of 128 parameters is about .15, as in the islands of SMC2
    assert abs(float(learned.population.log_factor) - cases.truth(0).log_evidence) < 1
    slope = np.asarray(learned.population.positions)[:, 1]
    assert abs(slope.mean() - cases.truth(0).mean["slope"]) < 6 * slope.std() / np.sqrt(
        40
    )  # worth more than 40


def first_population(target):
    schedule = parameter_particles.empty_schedule(cases.NUM_STEPS, 2)
    return (
        jax.random.key(1),
        target,
        parameter_particles.init_population(
            jax.random.key(0), target, schedule, jnp.asarray(True), num_parameters=128
        ),
    )


def test_exchanged_filters_weigh_without_bias(dtype):
    """At one parameter in 128 copies: the mean of new over old evidence, tilted by the old one, is 1."""
    target = cases.target(cases.observations(0))
    population = first_population(target)[2]
    population = population._replace(positions=jnp.broadcast_to(jnp.asarray([-0.5, 0.9], dtype), (128, 2)))
    population = population._replace(num_observed=jnp.int32(4))
    settings = {"slope": 0.9, "process": np.exp(-0.5), **cases.FIXED}
    exact = kalman.kalman(cases.observations(0)[:4], **settings)[0]
    sums = []
    for seed in range(20):
        old = parameter_particles.attach_filters(
            jax.random.key(2 * seed), target, population, num_particles=8
        )
        new = parameter_particles.attach_filters(jax.random.key(2 * seed + 1), target, old, num_particles=8)
        sums.append(np.exp(np.asarray(new.log_weights) - exact))
    assert abs(z_scores(np.concatenate(sums), 1.0)) < Z_LIMIT


@pytest.mark.f32
def test_the_joint_density_of_one_observation(dtype):
    data, path, position = jnp.asarray([1.5], dtype), jnp.asarray([0.3], dtype), jnp.zeros(2, dtype)
    target = smc.Parameters(cases.PRIORS, Partial(cases.linear, data), 1, cases.log_initial)
    joint = parameters.log_joint(target, position, path)
    expected = parameters.log_prior(target, position) + cases.log_initial(None, path[0])
    np.testing.assert_allclose(joint, expected + models_potential(data, path), rtol=1e-5)


def models_potential(y, path):
    noise = cases.FIXED["noise"]
    return sum(
        -0.5 * (np.log(2 * np.pi * noise) + (a - b) ** 2 / noise) for a, b in zip(y, path, strict=True)
    )


@pytest.mark.f32
def test_the_joint_density_is_the_sum_of_its_parts(dtype):
    y, path = cases.observations(0), np.linspace(-1.0, 2.0, cases.NUM_STEPS)
    slope, process = 0.4, 0.7
    joint = parameters.log_joint(
        cases.target(y), jnp.asarray([np.log(process), slope], dtype), jnp.asarray(path, dtype)
    )
    normal = lambda x, variance: -0.5 * (np.log(2 * np.pi * variance) + x**2 / variance)  # noqa: E731
    expected = normal(slope - cases.SLOPE[0], cases.SLOPE[1] ** 2)
    expected += normal(np.log(process) - cases.LOG_PROCESS[0], cases.LOG_PROCESS[1] ** 2)
    expected += normal(path[0], cases.FIXED["start"]) + np.sum(normal(path[1:] - slope * path[:-1], process))
    expected += models_potential(y, path)
    np.testing.assert_allclose(joint, expected, rtol=2e-5 if dtype == jnp.float32 else 1e-10)


@pytest.mark.parametrize(
    ("name", "message"), [("PMMH", "all of 128"), ("SMC2", "all of 128"), ("ParticleGibbs", "64 prior")]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])  # the potential is NaN, or minus infinity
def test_no_likelihood_anywhere_is_an_error(name, message, bad):
    y = cases.observations(0)
    y[2] = bad
    with pytest.raises(NumericalError, match=message) as caught:
        pi.infer(jax.random.key(0), cases.target(y), ENGINES[name], progress=False)
    expected = Status.NON_FINITE if name == "ParticleGibbs" else Status.DEGENERATE_WEIGHTS
    assert caught.value.status == expected


def test_a_chain_that_accepts_nothing_is_reported():
    accepted = np.array([[False, False], [True, False]])
    fields = dict.fromkeys(pmmh._PMMHRecord._fields)
    records = pmmh._PMMHRecord(**fields | {"accepted": accepted})
    fine = report.Convergence(None, None, None, Status.OK)
    finding = pmmh._verdict(ENGINES["PMMH"], fine, records)
    assert finding[:2] == (Status.CHAINS_DISAGREE, "1 of 2 chains accepted nothing")


def test_names_and_bijectors(dtype):
    target = cases.target(cases.observations(0))
    assert target.names == ("process", "slope")
    assert target.dimension == 2
    values = {"process": jnp.asarray(0.3, dtype), "slope": jnp.asarray(-0.1, dtype)}
    back = target.constrain(target.unconstrain(values))
    np.testing.assert_allclose(back["process"], 0.3, rtol=1e-6)


def model_of_nothing(params):
    return params["slope"]


def two_numbers(params, x):
    return jnp.zeros(2)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "at least 1"),
        ({"num_steps": True}, TypeError, "num_steps must be a Python int"),
        ({"model_fn": 3}, TypeError, "must be a function"),
        ({"model_fn": model_of_nothing}, TypeError, "must return a smc.FeynmanKac"),
        ({"log_initial": 3}, TypeError, "must be a function"),
        ({"log_initial": two_numbers}, ValueError, "one number"),
        ({"priors": {"slope": 1.0, "process": 1.0}}, TypeError, "distribution"),
        ({"priors": {"slope": dist.Poisson(3.0), "process": dist.LogNormal()}}, ValueError, "discrete"),
        (
            {
                "priors": {
                    "slope": dist.ImproperUniform(dist.constraints.real, (), ()),
                    "process": dist.LogNormal(),
                }
            },
            ValueError,
            "proper",
        ),
    ],
)
def test_bad_parameters_are_refused(settings, error, message, dtype):
    model = Partial(cases.linear, jnp.zeros(cases.NUM_STEPS, dtype))
    good = {"priors": cases.PRIORS, "model_fn": model, "num_steps": cases.NUM_STEPS}
    with pytest.raises(error, match=message):
        smc.Parameters(**(good | settings))


@pytest.mark.parametrize(
    ("engine", "settings", "error", "message"),
    [
        (smc.SMC2, {"num_islands": 1}, ValueError, "2 or more"),
        (smc.SMC2, {"num_parameters": 8}, ValueError, "32 or more"),
        (smc.SMC2, {"num_parameters": True}, TypeError, "integer"),
        (smc.PMMH, {"num_draws": 0}, ValueError, "num_draws >= 1"),
        (smc.PMMH, {"num_warmup": 3}, ValueError, "num_warmup >= 20"),
        (smc.PMMH, {"num_chains": True}, TypeError, "integer"),
        (smc.ParticleGibbs, {"mode": "lanes"}, ValueError, "mode must be"),
    ],
)
def test_bad_settings_are_refused(engine, settings, error, message):
    with pytest.raises(error, match=message):
        engine(**settings)


def without_density(params):
    model = cases.linear(jnp.zeros(cases.NUM_STEPS), params)
    return smc.FeynmanKac(model.init_sample, model.propagate, model.log_potential)


def batched(params):
    return smc.lift(cases.linear(jnp.zeros(cases.NUM_STEPS), params))


def test_bad_targets_are_refused(key):
    density = pi.targets.from_logdensity(lambda x: -(x**2), jnp.zeros(()))
    for engine in ENGINES.values():
        with pytest.raises(TypeError, match="Parameters"):
            pi.infer(key, density, engine)
        with pytest.raises(TypeError, match="key"):
            engine.sample(3, cases.target(cases.observations(0)))
    with pytest.raises(TypeError, match="Target"):
        pi.infer(key, cases.target(cases.observations(0)), mcmc.NUTS())
    gibbs = ENGINES["ParticleGibbs"]
    with pytest.raises(ValueError, match="log_transition of the model and no log_initial"):
        gibbs.sample(key, smc.Parameters(cases.PRIORS, without_density, cases.NUM_STEPS))
    with pytest.raises(TypeError, match=r"must return a smc\.FeynmanKac"):
        gibbs.sample(key, smc.Parameters(cases.PRIORS, batched, cases.NUM_STEPS))
