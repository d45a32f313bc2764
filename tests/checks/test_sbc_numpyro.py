"""Calibration of NumPyro models: sites are classified, densities are the model's, wrong samplers are detected."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from scipy import stats

from probinfer import checks, mcmc

NOISE = np.array([0.5, 1.0, 2.0])


def model(noise, y=None):
    mean = numpyro.sample("mean", dist.Normal(1.0, 2.0))
    rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0))
    with numpyro.plate("rows", 3):
        numpyro.sample("y", dist.Normal(mean * rate, noise), obs=y)


def improper(y=None):
    mean = numpyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def with_factor():
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    numpyro.factor("penalty", -(mean**2))


def two_outcomes(y=None, z=None):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    numpyro.sample("z", dist.Normal(mean, 1.0), obs=z)


def in_a_loop(y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))

    def walk(last, row):
        return numpyro.sample("y", dist.Normal(last, scale), obs=row), None

    scan(walk, jnp.zeros(()), y)


def with_param(y=None):
    spread = numpyro.param("spread", 1.5, constraint=dist.constraints.positive)
    mean = numpyro.sample("mean", dist.Normal(0.0, spread))
    numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


short = functools.partial(mcmc.posterior_sampler, num_warmup=100, num_draws=100, num_leapfrogs=8)


def overconfident(logdensity_fn, init_fn, *, constrain_fn):
    """Samples the square of the posterior density."""
    return short(lambda position, x: 2 * logdensity_fn(position, x), init_fn, constrain_fn=constrain_fn)


@pytest.fixture(scope="module")
def report():
    settings = {"num_simulations": 300, "num_projections": 4, "level": 1e-4}
    return checks.sbc_numpyro(jax.random.key(2), model, NOISE, observed="y", sampler=short, **settings)


@pytest.mark.slow
def test_a_right_sampler_passes(report):
    """A false alarm has probability 1e-4."""
    assert report.passed, report.verdict
    assert set(report.theta) == {"mean", "rate"}
    assert set(report.x) == {"y"}
    assert report.x["y"].shape == (300, 3)
    assert {"mean", "rate", "log_prior", "log_likelihood", "log_joint", "tarp"} <= set(report.pvalues)
    assert (report.posteriors.draws["rate"] > 0).all()


def test_simulated_as_the_model_says(report):
    """Kolmogorov-Smirnov tests against the prior and the noise; together they fail by chance once in 10^4."""
    mean, rate, y = report.theta["mean"], report.theta["rate"], report.x["y"]
    noise = (y - (mean * rate)[:, None]) / NOISE
    for values, law in (
        (mean, stats.norm(1, 2)),
        (rate, stats.gamma(3, scale=0.5)),
        (noise.ravel(), stats.norm()),
    ):
        assert stats.kstest(values, law.cdf).pvalue > 3e-5


def test_the_densities_are_those_of_the_constrained_values(report):
    """Ranks of the log joint density by SciPy."""

    def log_joint(mean, rate, y):
        prior = stats.norm(1, 2).logpdf(mean) + stats.gamma(3, scale=0.5).logpdf(rate)
        return prior + stats.norm(np.multiply(mean, rate)[..., None], NOISE).logpdf(y).sum(axis=-1)

    thin = report.ranks.thin
    draws = {name: leaf[:, thin - 1 :: thin] for name, leaf in report.posteriors.draws.items()}
    true_values = log_joint(report.theta["mean"], report.theta["rate"], report.x["y"])
    draw_values = log_joint(draws["mean"], draws["rate"], report.x["y"][:, None])
    column = report.ranks.ranks[:, report.ranks.names.index("log_joint")]
    np.testing.assert_array_equal(column, np.sum(draw_values < true_values[:, None], axis=1))


def test_a_wrong_sampler_fails(key):
    """Standard deviations too small by the factor 0.7: passes with probability below 1e-6."""
    settings = {"sampler": overconfident, "num_simulations": 400, "num_projections": 0}
    assert checks.sbc_numpyro(key, model, NOISE, y=np.zeros(3), **settings).passed is False


@pytest.mark.slow
def test_parameters_keep_their_values(key):
    """Simulated and sampled with the spread 1.5: a false alarm of the three statements has probability 3e-4."""
    settings = {"sampler": short, "num_simulations": 300, "num_projections": 0, "level": 1e-4}
    report = checks.sbc_numpyro(key, with_param, observed="y", **settings)
    assert report.passed, report.verdict
    assert set(report.theta) == {"mean"}
    assert stats.kstest(report.theta["mean"], stats.norm(0, 1.5).cdf).pvalue > 1e-4
    assert stats.kstest(report.x["y"], stats.norm(0, np.hypot(1.5, 1)).cdf).pvalue > 1e-4


@pytest.mark.slow
def test_observed_by_name_or_by_value(key):
    settings = {"sampler": short, "num_simulations": 12, "num_projections": 0}
    named = checks.sbc_numpyro(key, model, NOISE, observed=["y"], **settings)
    given = checks.sbc_numpyro(key, model, NOISE, y=np.array([5.0, 6.0, 7.0]), **settings)
    np.testing.assert_allclose(named.x["y"], given.x["y"], rtol=1e-12)
    np.testing.assert_array_equal(named.ranks.ranks, given.ranks.ranks)


def test_the_same_model_compiles_once(key, count_compiles):
    """Three draws are too few for a diagnosis: nothing is thinned, and all shapes are known in advance."""
    few = functools.partial(short, num_draws=3)
    settings = {"observed": "y", "sampler": few, "num_simulations": 12, "num_projections": 0}
    checks.sbc_numpyro(key, model, NOISE, **settings)
    with count_compiles() as counter:
        checks.sbc_numpyro(jax.random.key(9), model, 2 * NOISE, **settings)
    assert counter.count == 0


@pytest.mark.slow
def test_data_inside_a_loop(key):
    """A random walk by numpyro's scan: its data are simulated anew, its likelihood is that of the increments."""
    report = checks.sbc_numpyro(
        key, in_a_loop, jnp.zeros(4), sampler=short, num_simulations=12, num_projections=0
    )
    walks, scales = report.x["y"], report.theta["scale"]
    assert len(np.unique(walks)) == walks.size
    steps = np.diff(walks, axis=1, prepend=0.0)
    thin = report.ranks.thin
    draws = report.posteriors.draws["scale"][:, thin - 1 :: thin]
    true_values = stats.norm(0, scales[:, None]).logpdf(steps).sum(axis=-1)
    draw_values = stats.norm(0, draws[..., None]).logpdf(steps[:, None]).sum(axis=-1)
    column = report.ranks.ranks[:, report.ranks.names.index("log_likelihood")]
    np.testing.assert_array_equal(column, np.sum(draw_values < true_values[:, None], axis=1))


def test_bad_input(key):
    with pytest.raises(ValueError, match="no site of the model is observed"):
        checks.sbc_numpyro(key, model, NOISE)
    with pytest.raises(ValueError, match="must name sample sites"):
        checks.sbc_numpyro(key, model, NOISE, observed="Y")
    with pytest.raises(ValueError, match="factor sites"):
        checks.sbc_numpyro(key, with_factor)
    with pytest.raises(ValueError, match="no proper prior"):
        checks.sbc_numpyro(key, improper, observed="y")
    with pytest.raises(ValueError, match="are observed too"):
        checks.sbc_numpyro(key, two_outcomes, y=1.0, z=2.0, observed="y")
    with pytest.raises(TypeError, match="key"):
        checks.sbc_numpyro(0, model, NOISE, observed="y")
