"""The planted faults: each is a posterior sampler and a Markov transition with one error."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer import gp

from . import hmc
from .models import (
    COUNTS,
    DIMS,
    GAUSSIAN,
    GRAM,
    KERNEL,
    POINTS,
    PRECISION,
    PROBIT,
    JointModel,
    codes,
    counts_posterior,
    gaussian_moments,
    gaussian_posterior,
)

__all__ = ["APPROXIMATIONS", "FAULTS", "NULLS", "Procedure", "by_name"]

COVARIANCE = np.linalg.inv(PRECISION)
DEVIATIONS = np.sqrt(np.diag(COVARIANCE))
ROOT = np.linalg.cholesky(COVARIANCE)


class Procedure(NamedTuple):
    """An inference procedure with at most one fault."""

    name: str
    model: JointModel
    sample: Callable
    """(key, x, num) -> draws (num, d), as good as independent."""
    transition: Callable
    """(key, state, x) -> state, or (state, info) where there is an ``init``."""
    init: Callable | None
    """(theta, x) -> state; None: the state is theta."""
    description: str
    """Description of the fault."""


def _from_sampler(name: str, model: JointModel, sample: Callable, description: str) -> Procedure:
    """A procedure from an independent sampler; as a transition it ignores its state."""

    def transition(key, theta, x):
        return sample(key, x, 1)[0]

    return Procedure(
        name=name, model=model, sample=sample, transition=transition, init=None, description=description
    )


def _from_transition(name: str, transition: Callable, description: str) -> Procedure:
    return Procedure(
        name=name,
        model=GAUSSIAN,
        sample=partial(hmc.chain, transition),
        transition=transition,
        init=hmc.init,
        description=description,
    )


def _normal(key, num):
    return jax.random.normal(key, (num, DIMS))


def prior_draws(key, x, num):
    return jax.vmap(GAUSSIAN.prior_sample)(jax.random.split(key, num))


def scaled(factor, key, x, num):
    return gaussian_moments(x)[0] + factor * _normal(key, num) @ ROOT.T


def shifted(key, x, num):
    return gaussian_posterior(key, x, num) + 0.3 * DEVIATIONS


def right_marginals(key, x, num):
    return gaussian_moments(x)[0] + DEVIATIONS * _normal(key, num)


def cancelling(key, x, num):
    side = jnp.where(jnp.sum(x) > 0, 0.4, -0.4)
    return gaussian_posterior(key, x, num) + side * DEVIATIONS


def flipped(key, x, num):
    mean = gaussian_moments(x)[0]
    return gaussian_posterior(key, x, num) - 2 * mean * (jnp.arange(DIMS) == 0)


def tempered(key, x, num):
    mean, covariance = gaussian_moments(x, power=0.5)
    return mean + _normal(key, num) @ np.linalg.cholesky(covariance).T


def mean_field(key, x, num):
    """The fully factorized Gaussian of smallest KL(q | p): the variances given the other coordinates."""
    return gaussian_moments(x)[0] + _normal(key, num) / np.sqrt(np.diag(PRECISION))


@lru_cache(maxsize=4)
def _site_posteriors(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Means (1024, 10) and roots of covariances (1024, 10, 10) of the latent values, for every vector of labels."""
    labels = (np.arange(2 ** len(POINTS))[:, None] >> np.arange(len(POINTS))) % 2
    with jax.ensure_compile_time_eval():  # also while a function that calls this is traced
        true = gp.Model(KERNEL, gp.likelihoods.Bernoulli("probit"))
        start = gp.Model(gp.kernels.Matern52(1.0, 1.0), true.likelihood)

        def one(y):
            X = jnp.asarray(POINTS)
            updates = 2 if kind == "one sweep" else 200  # the first of them starts from no sites
            sites = gp.EP(max_updates=updates).condition(start if kind == "frozen" else true, X, y).sites
            covariance = jnp.linalg.solve(jnp.eye(len(POINTS)) + GRAM * sites.lam2, GRAM)
            return covariance @ sites.lam1, jnp.linalg.cholesky(0.5 * (covariance + covariance.T))

        means, roots = jax.jit(lambda labels: jax.lax.map(one, labels))(labels.astype(float))
    return np.asarray(means), np.asarray(roots)


def site_draws(kind, key, x, num):
    means, roots = _site_posteriors(kind)
    number = codes(x)
    normal = jax.random.normal(key, (num, len(POINTS)))
    return jnp.asarray(means)[number] + normal @ jnp.asarray(roots)[number].T


FAULTS = (
    _from_sampler("prior as posterior", GAUSSIAN, prior_draws, "draws of the prior, whatever the data"),
    _from_sampler("too wide", GAUSSIAN, partial(scaled, 1.5), "standard deviations times 1.5"),
    _from_sampler("too narrow", GAUSSIAN, partial(scaled, 0.8), "standard deviations times 0.8"),
    _from_sampler("biased", GAUSSIAN, shifted, "every coordinate 0.3 standard deviations too high"),
    _from_sampler(
        "biases that cancel",
        GAUSSIAN,
        cancelling,
        "0.4 sd too high for half of the data sets, too low for the others",
    ),
    _from_sampler("wrong correlation", GAUSSIAN, right_marginals, "right marginals, no correlation"),
    _from_sampler(
        "mean-field VI", GAUSSIAN, mean_field, "the best factorized Gaussian of a correlated posterior"
    ),
    _from_sampler("sign flip", GAUSSIAN, flipped, "the mean of one coordinate of five with the wrong sign"),
    _from_sampler("wrong temperature", GAUSSIAN, tempered, "square root of the likelihood"),
    _from_sampler(
        "missing Jacobian",
        COUNTS,
        partial(counts_posterior, missing=1.0),
        "log rates without the Jacobian of the log",
    ),
    _from_sampler(
        "EP, frozen sites",
        PROBIT,
        partial(site_draws, "frozen"),
        "sites found at a ninth of the kernel variance",
    ),
    _from_sampler("EP, one sweep", PROBIT, partial(site_draws, "one sweep"), "stopped after one sweep"),
    _from_transition("HMC without accept", hmc.no_accept, "every proposal is accepted"),
    _from_transition("HMC without momenta", hmc.no_momentum, "the acceptance ratio leaves the momenta out"),
    _from_transition(
        "HMC, stale gradient", hmc.stale_gradient, "the first gradient is that of the position before"
    ),
)

NULLS = (
    _from_sampler("none, gaussian", GAUSSIAN, gaussian_posterior, "exact draws"),
    _from_sampler("none, counts", COUNTS, counts_posterior, "exact draws"),
    _from_transition("none, HMC", hmc.right, "the kernel as it should be"),
)

APPROXIMATIONS = (
    _from_sampler(
        "EP, converged", PROBIT, partial(site_draws, "converged"), "a good approximation, not exact"
    ),
)


def by_name(name: str) -> Any:
    """Return the procedure of this name."""
    return next(procedure for procedure in (*NULLS, *APPROXIMATIONS, *FAULTS) if procedure.name == name)
