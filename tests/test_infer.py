import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import probinfer as pi
from probinfer import mcmc, targets, vi
from probinfer.engine import check

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
        check(jax.random.key(0), normal_density, "NUTS")
    with pytest.raises(TypeError, match="typed key"):
        check(0, target, "NUTS")
    with pytest.raises(TypeError, match="typed key"):
        check(jax.random.split(jax.random.key(0)), target, "NUTS")


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


def regression(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    numpyro.deterministic("twice", 2 * slope)
    numpyro.sample("y", dist.Normal(slope * x, noise), obs=y)


def test_numpyro_model_through_two_engines(dtype):
    x = np.linspace(0, 1, 20)
    y = 3 * x + 0.1 * np.random.default_rng(0).normal(size=20)
    target = targets.from_numpyro(regression, jnp.asarray(x, dtype), y=jnp.asarray(y, dtype))
    exact = pi.infer(jax.random.key(0), target, mcmc.NUTS(num_chains=2), progress=False)
    fitted = pi.infer(jax.random.key(0), target, vi.FullRank(), progress=False)
    for posterior in (exact, fitted):
        np.testing.assert_array_equal(posterior.draws["twice"], 2 * posterior.draws["slope"])
        assert bool(jnp.all(posterior.draws["noise"] > 0))
    # 2000 and 1000 draws of a posterior with sd about 0.04: means agree to a tenth of that sd plus 5 standard errors
    sd = float(exact.draws["slope"].std())
    assert abs(float(exact.draws["slope"].mean() - fitted.draws["slope"].mean())) < (0.1 + 0.25) * sd
