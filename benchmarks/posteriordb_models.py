"""NumPyro ports of eleven models of posteriordb, with conversions of its data files and draws files.

The models follow the Stan programs of posteriordb (Magnusson, Bürkner and Vehtari 2024), parametrization and priors
included, so that its reference draws are draws from these targets. Parameters without a prior there are flat here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from probinfer import targets
from probinfer.targets import Target

__all__ = ["PORTS", "Port", "find_port"]

_Dict = dict[str, Any]


def autoregression(y, num_lags):
    """AR(K): every value is normal around a line in the K values before it."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([num_lags]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = jnp.stack([y[num_lags - k : len(y) - k] for k in range(1, num_lags + 1)], axis=1)
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[num_lags:])


def arma(y):
    """ARMA(1, 1), the value before the first at its mean and the error before the first zero."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = numpyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = numpyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))

    def step(carry, value):
        previous, error = carry
        mean = mu + phi * previous + theta * error
        return (value, value - mean), mean

    _, mean = jax.lax.scan(step, (mu, jnp.zeros_like(mu)), y)
    numpyro.sample("y", dist.Normal(mean, sigma), obs=y)


def eight_schools(y, sigma):
    """Effects of eight schools, non-centered: theta = mu + tau z."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    theta = numpyro.deterministic("theta", mu + tau * z)
    numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def gaussian_process(x, y):
    """Exponentiated quadratic kernel; sigma is the *variance* of the noise."""
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    distance = (x[:, None] - x[None, :]) / rho
    covariance = alpha**2 * jnp.exp(-0.5 * distance**2) + sigma * jnp.eye(len(x), dtype=x.dtype)
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros_like(y), covariance), obs=y)


def hidden_markov(y):
    """Two hidden states with normal emissions of variance 1, summed out; the first state has weight 1, not 1/2."""
    theta1 = numpyro.sample("theta1", dist.Dirichlet(jnp.ones(2)))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(jnp.ones(2)))
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum())
    log_transition = jnp.log(jnp.stack([theta1, theta2]))
    log_emission = dist.Normal(mu, 1.0).log_prob(y[:, None])

    def step(gamma, emission):
        return jax.nn.logsumexp(gamma[:, None] + log_transition, axis=0) + emission, None

    gamma, _ = jax.lax.scan(step, log_emission[0], log_emission[1:])
    numpyro.factor("y", jax.nn.logsumexp(gamma))


def regression(X, y, coefficient_scale, noise):
    """Linear regression; a flat prior on the coefficients where their scale is None.

    Args:
        X: inputs, a column of ones for the intercept included.
        y: outputs.
        coefficient_scale: standard deviation of the normal prior of the coefficients, or None.
        noise: prior of sigma, the standard deviation of the noise.
    """
    if coefficient_scale is None:
        prior = dist.ImproperUniform(constraints.real_vector, (), (X.shape[1],))
    else:
        prior = dist.Normal(0.0, coefficient_scale).expand([X.shape[1]]).to_event(1)
    beta = numpyro.sample("beta", prior)
    sigma = numpyro.sample("sigma", noise)
    numpyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


def trend(x, y, alpha_mean, alpha_scale, beta_mean, beta_scale):
    """A line through temperatures, the years as they are: intercept and slope are correlated by 1 - 1e-5."""
    alpha = numpyro.sample("alpha", dist.Normal(alpha_mean, alpha_scale))
    beta = numpyro.sample("beta", dist.Normal(beta_mean, beta_scale))
    sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    numpyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def mixture(y):
    """Two normals with ordered means, the allocations summed out; theta is the weight of the lower one."""
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    parts = dist.Normal(mu, sigma).log_prob(y[:, None]) + jnp.log(jnp.stack([theta, 1 - theta]))
    numpyro.factor("y", jnp.sum(jax.nn.logsumexp(parts, axis=1)))


class Port(NamedTuple):
    """One posterior: a model, its data file, and its reference draws.

    Attributes:
        name: of the posterior in posteriordb, and of its file of draws.
        data: name of its data file.
        model: a NumPyro model.
        arguments: contents of the data file -> keyword arguments of the model.
        latent: stored quantities (arrays with any leading axes) -> values of the latent sites.
    """

    name: str
    data: str
    model: Callable[..., None]
    arguments: Callable[[_Dict], _Dict]
    latent: Callable[[_Dict], _Dict] = lambda stored: stored

    def target(self, data: _Dict) -> Target:
        """Return the posterior of the contents of a data file."""
        return targets.from_numpyro(self.model, **self.arguments(data))

    def positions(self, target: Target, stored: _Dict) -> Any:
        """Unconstrained positions of stored draws.

        Args:
            target: made by this port.
            stored: quantities by name, leaves (chain, draw, ...).
        """
        return jax.jit(jax.vmap(jax.vmap(target.unconstrain_fn)))(jax.tree.map(_array, self.latent(stored)))


def find_port(name: str) -> Port:
    """The port whose name is this or begins like this.

    Raises:
        ValueError: there is none, or more than one.
    """
    matches = [port for port in PORTS if port.name == name] or [p for p in PORTS if p.name.startswith(name)]
    if len(matches) != 1:
        names = ", ".join(port.name for port in PORTS)
        raise ValueError(
            f"{len(matches)} ported posteriors have a name that begins with {name!r}; there is {names}"
        )
    return matches[0]


def _array(values):
    return jnp.asarray(values, jnp.result_type(float))


def _only(*names):
    """Return a function that selects arrays of the data file by their names."""
    return lambda data: {name: _array(data[name]) for name in names}


def _columns(*columns):
    columns = [_array(column) for column in columns]
    return jnp.stack([jnp.ones_like(columns[0]), *columns], axis=1)


def _ark(data):
    return {"y": _array(data["y"]), "num_lags": int(data["K"])}


def _kidiq(data):
    X = _columns(data["mom_hs"], data["mom_iq"])
    return {"X": X, "y": _array(data["kid_score"]), "coefficient_scale": None, "noise": dist.HalfCauchy(2.5)}


def _kilpisjarvi(data):
    names = {
        "x": "x",
        "y": "y",
        "alpha_mean": "pmualpha",
        "alpha_scale": "psalpha",
        "beta_mean": "pmubeta",
        "beta_scale": "psbeta",
    }
    return {ours: _array(data[theirs]) for ours, theirs in names.items()}


def _nes(data):
    age = _array(data["age_discrete"])
    ages = [_array(age == group) for group in (2, 3, 4)]
    X = _columns(data["real_ideo"], data["race_adj"], *ages, data["educ1"], data["gender"], data["income"])
    noise = dist.ImproperUniform(constraints.positive, (), ())
    return {"X": X, "y": _array(data["partyid7"]), "coefficient_scale": None, "noise": noise}


def _blr(data):
    noise = dist.HalfNormal(10.0)
    return {"X": _array(data["X"]), "y": _array(data["y"]), "coefficient_scale": 10.0, "noise": noise}


def _standardized_effects(stored):
    """Convert theta, which the draws store, to z of the model."""
    mu, tau, theta = (_array(stored[name]) for name in ("mu", "tau", "theta"))
    return {"mu": mu, "tau": tau, "z": (theta - mu[..., None]) / tau[..., None]}


PORTS = (
    Port(name="arK-arK", data="arK", model=autoregression, arguments=_ark),
    Port(name="arma-arma11", data="arma", model=arma, arguments=_only("y")),
    Port(
        name="eight_schools-eight_schools_noncentered",
        data="eight_schools",
        model=eight_schools,
        arguments=_only("y", "sigma"),
        latent=_standardized_effects,
    ),
    Port(name="gp_pois_regr-gp_regr", data="gp_pois_regr", model=gaussian_process, arguments=_only("x", "y")),
    Port(name="hmm_example-hmm_example", data="hmm_example", model=hidden_markov, arguments=_only("y")),
    Port(name="kidiq-kidscore_momhsiq", data="kidiq", model=regression, arguments=_kidiq),
    Port(name="kilpisjarvi_mod-kilpisjarvi", data="kilpisjarvi_mod", model=trend, arguments=_kilpisjarvi),
    Port(
        name="low_dim_gauss_mix-low_dim_gauss_mix",
        data="low_dim_gauss_mix",
        model=mixture,
        arguments=_only("y"),
    ),
    Port(name="nes2000-nes", data="nes2000", model=regression, arguments=_nes),
    Port(name="sblrc-blr", data="sblrc", model=regression, arguments=_blr),
    Port(name="sblri-blr", data="sblri", model=regression, arguments=_blr),
)
