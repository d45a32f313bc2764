import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import probinfer as pi
from probinfer import mcmc, targets, vi
from probinfer.inference import diagnostics
from probinfer.inference.engine import check_target
from tests.quick_engine import Cloud

ENGINES = [mcmc.NUTS, mcmc.HMC, vi.MAP, vi.MeanField, vi.FullRank]


def normal_density(values):
    return -0.5 * jnp.sum(values**2)


@pytest.fixture(scope="module")
def target():
    return targets.from_logdensity(normal_density, jnp.zeros(2))


def gaussian_prior(values):
    return -0.5 * values**2


def gaussian_likelihood(values, row):
    return -0.5 * (row - values) ** 2


@pytest.mark.parametrize("engine", [*ENGINES, lambda: mcmc.Blackjax(lambda f: f)])
def test_minibatch_targets_are_refused(engine):
    target = targets.minibatch(gaussian_prior, gaussian_likelihood, jnp.zeros(10), 2, example=jnp.zeros(()))
    with pytest.raises(TypeError, match="minibatches"):
        pi.infer(jax.random.key(0), target, engine())


def test_what_is_no_target_or_key_is_refused(target):
    # the check that every engine makes first; in tests the annotations of infer refuse the same things before
    with pytest.raises(TypeError, match="needs a Target"):
        check_target(jax.random.key(0), normal_density, "NUTS")
    with pytest.raises(TypeError, match="typed key"):
        check_target(0, target, "NUTS")
    with pytest.raises(TypeError, match="typed key"):
        check_target(jax.random.split(jax.random.key(0)), target, "NUTS")


def test_what_is_no_engine_is_refused(target):
    with pytest.raises(TypeError, match=r"call it: NUTS\(\)"):
        pi.infer(jax.random.key(0), target, mcmc.NUTS)
    with pytest.raises(TypeError):
        pi.infer(jax.random.key(0), target, "nuts")


class Fixed:
    """An engine of the user's own."""

    def sample(self, key, target, *, progress=None, checkpoint=None):
        draws = target.init(key, 3)[None]
        return pi.Posterior(draws)


def test_any_object_with_sample_is_an_engine(target):
    assert pi.infer(jax.random.key(0), target, Fixed()).draws.shape == (1, 3, 2)


SCHOOLS = np.array([28.0, 8, -3, 7, -1, 1, 18, 12]), np.array([15.0, 10, 16, 11, 9, 11, 10, 18])


def eight_schools(sd, y=None):
    """Non-centered; the effects are reported as deterministic sites."""
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    z = numpyro.sample("z", dist.Normal(0, 1).expand([8]))
    effects = numpyro.deterministic("effects", mu + tau * z)
    numpyro.sample("y", dist.Normal(effects, sd), obs=y)


def schools_by_quadrature(y, sd):
    """E mu and E log tau: the effects integrate out, y_j ~ N(mu, sd_j^2 + tau^2)."""
    mu, log_tau = np.meshgrid(np.linspace(-25, 35, 601), np.linspace(-12, 6, 601), indexing="ij")
    tau = np.exp(log_tau)
    log_p = -0.5 * (mu / 5) ** 2 - np.log1p((tau / 5) ** 2) + log_tau
    for value, error in zip(y, sd, strict=True):
        variance = error**2 + tau**2
        log_p += -0.5 * np.log(variance) - 0.5 * (value - mu) ** 2 / variance
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    return (p * mu).sum(), (p * log_tau).sum()


@pytest.mark.slow
def test_numpyro_model_through_the_default_engine_against_quadrature(dtype):
    y, sd = (jnp.asarray(x, dtype) for x in SCHOOLS)
    target = targets.from_numpyro(eight_schools, sd, y=y)
    posterior = pi.infer(jax.random.key(0), target, progress=False)
    assert posterior.info.status == pi.Status.OK
    draws = posterior.draws
    assert draws["effects"].shape == (4, 1000, 8)
    np.testing.assert_allclose(
        draws["effects"], draws["mu"][..., None] + draws["tau"][..., None] * draws["z"]
    )
    found = {"mu": draws["mu"], "log_tau": jnp.log(draws["tau"])}
    error = diagnostics.mcse_mean(found)
    # two z-tests at 4.5 standard errors: fail by chance 1 time in 70 000
    for name, expected in zip(("mu", "log_tau"), schools_by_quadrature(*SCHOOLS), strict=True):
        assert abs(float(found[name].mean()) - expected) < 4.5 * float(error[name]), name


class Failing:
    """An engine that fails as one does at a log density that is NaN."""

    def sample(self, key, target, *, progress=None, checkpoint=None):
        raise pi.NumericalError("step 3 made state.warmup.choice.metric.U non-finite", pi.Status.NON_FINITE)


def positive_scale(values):
    return jnp.sum(jnp.log(values["scale"])) - jnp.sum(values["scale"]) - 0.5 * values["loc"] ** 2


def test_a_positive_parameter_without_a_constraint_is_named(key):
    example = {"loc": jnp.zeros(()), "scale": jnp.ones(2)}
    target = pi.targets.from_logdensity(positive_scale, example)
    advice = r"NaN where 'scale' is negative: give constraints=\{'scale': constraints.positive\}"
    with pytest.raises(pi.NumericalError, match=advice + ".*step 3 made"):
        pi.infer(key, target, Failing())
    with pytest.warns(pi.ConvergenceWarning, match=advice), pytest.warns(UserWarning, match="prior draws"):
        pi.infer(key, target, Cloud())
    told = pi.targets.from_logdensity(positive_scale, example, {"loc": None, "scale": constraints.positive})
    with pytest.raises(pi.NumericalError, match=r"^step 3 made"):
        pi.infer(key, told, Failing())
