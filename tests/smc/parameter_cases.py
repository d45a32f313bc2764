"""Models with parameters that the tests of their engines share, and their posteriors by quadrature."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.tree_util import Partial
from scipy.special import logsumexp
from scipy.stats import norm

from probinfer import smc
from tests.reference import hmm, kalman
from tests.smc import models

NUM_STEPS = 6
FIXED = {"noise": 2.0, "start": 2.0}
SLOPE, LOG_PROCESS = (0.5, 0.5), (-0.5, 0.7)  # normal priors: mean and sd


def observations(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal() * np.sqrt(FIXED["start"]), []
    for t in range(NUM_STEPS):
        x = 0.9 * x + rng.normal() * np.sqrt(0.5) if t else x
        y.append(x + rng.normal() * np.sqrt(FIXED["noise"]))
    return np.array(y)


def linear(y, params):
    """The model of ``tests.reference.kalman`` whose slope and process variance are not known."""
    fields = {name: jnp.asarray(value, y.dtype) for name, value in FIXED.items()} | params
    return smc.FeynmanKac(
        Partial(models._linear_start, fields),
        Partial(models._linear_move, fields),
        Partial(models._linear_potential, fields, y),
        Partial(models._linear_transition, fields),
    )


def log_initial(params, x):
    return models.log_normal(x, jnp.asarray(FIXED["start"], x.dtype))


PRIORS = {"process": dist.LogNormal(*LOG_PROCESS), "slope": dist.Normal(*SLOPE)}


def target(y):
    data = jnp.asarray(y, jnp.result_type(float))
    return smc.Parameters(PRIORS, Partial(linear, data), NUM_STEPS, log_initial)


class Truth(NamedTuple):
    log_evidence: float
    mean: dict
    path: np.ndarray  # (T,) posterior means


@cache
def truth(seed, num=161):
    """By the trapezoidal rule over slope and log process variance."""
    y = observations(seed)
    axes = [m + s * np.linspace(-7, 7, num) for m, s in (SLOPE, LOG_PROCESS)]
    slope, log_process = (a.ravel() for a in np.meshgrid(*axes, indexing="ij"))
    settings = {"slope": slope, "process": np.exp(log_process), **FIXED}
    settings = {name: np.broadcast_to(value, slope.shape) for name, value in settings.items()}
    log_density = kalman.kalman(y, **settings)[0] + norm.logpdf(slope, *SLOPE)
    log_density += norm.logpdf(log_process, *LOG_PROCESS)
    log_evidence = logsumexp(log_density) + np.log(np.prod([a[1] - a[0] for a in axes]))
    weight = np.exp(log_density - logsumexp(log_density))
    paths = kalman.smooth(y, **settings)[0]
    mean = {"slope": weight @ slope, "process": weight @ np.exp(log_process)}
    return Truth(log_evidence, mean, np.asarray(paths) @ weight)


# A finite model whose third state is entered by an unknown share of all moves

FINITE = hmm.random_model(7, num_states=3, num_steps=3)


def finite_tables(share):
    """Transition probabilities for a share (or an array of them)."""
    return (1 - share) * FINITE.transition + share * np.array([0.0, 0.0, 1.0])


def finite_log_transition(share):
    with jax.ensure_compile_time_eval():
        transition = jnp.asarray(FINITE.transition, share.dtype)
    return jnp.log((1 - share) * transition + share * jnp.asarray([0.0, 0.0, 1.0], share.dtype))


def finite(params):
    table = finite_log_transition(params["share"])
    dtype = table.dtype
    return smc.FeynmanKac(
        Partial(models.finite_start, jnp.log(jnp.asarray(FINITE.initial, dtype))),
        Partial(models.finite_move, table),
        Partial(models.look_up, jnp.asarray(FINITE.log_potential, dtype)),
        Partial(models.look_up, table),
    )


def finite_initial(params, x):
    return jnp.log(jnp.asarray(FINITE.initial, params["share"].dtype))[x]


def finite_target():
    return smc.Parameters({"share": dist.Uniform(0.0, 1.0)}, finite, FINITE.num_steps, finite_initial)


@cache
def finite_joint(num=400):
    """Midpoints of shares, and masses (num, K^T) of share and path together."""
    shares = (np.arange(num) + 0.5) / num
    masses = [hmm.enumerate_paths(FINITE._replace(transition=finite_tables(share)))[1] for share in shares]
    return shares, np.array(masses) / num
