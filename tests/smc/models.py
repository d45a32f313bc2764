"""Models shared by the tests of smc: a finite one and a linear-Gaussian one, with data bound as arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from scipy import stats

from probinfer import resampling, smc
from probinfer.core.status import Status
from probinfer.core.types import field, pytree
from tests.reference import hmm

P_LIMIT = 1e-9  # of a chi-squared test; fewer than 100 in the tests of smc
Z_LIMIT = 6.5  # two-sided 8e-11 a comparison: fewer than 10^4 in the tests of smc, so 1e-6 in all


def finite(model, dtype):
    """The one-particle form of a ``tests.reference.hmm.FiniteModel``; states are integers."""
    with np.errstate(divide="ignore"):
        tables = [jnp.asarray(table, dtype) for table in (np.log(model.initial), np.log(model.transition))]
    log_initial, log_transition = tables
    log_potential = jnp.asarray(model.log_potential, dtype)
    return smc.FeynmanKac(
        Partial(finite_start, log_initial),
        Partial(finite_move, log_transition),
        Partial(look_up, log_potential),
        Partial(look_up, log_transition),
    )


def finite_start(log_initial, key):
    return jax.random.categorical(key, log_initial).astype(jnp.int32)


def finite_move(log_transition, key, x, t):
    return jax.random.categorical(key, log_transition[t, x]).astype(jnp.int32)


def look_up(table, x_previous, x, t):
    return table[t, x_previous, x]


LINEAR = {"slope": 0.9, "process": 0.5, "noise": 0.8, "start": 2.0}


def linear(y):
    """The one-particle form of the model of ``tests.reference.kalman`` with the parameters ``LINEAR``."""
    parameters = {name: jnp.asarray(value, y.dtype) for name, value in LINEAR.items()}
    return smc.FeynmanKac(
        Partial(_linear_start, parameters),
        Partial(_linear_move, parameters),
        Partial(_linear_potential, parameters, y),
        Partial(_linear_transition, parameters),
    )


def _linear_start(p, key):
    return jnp.sqrt(p["start"]) * jax.random.normal(key, (), p["start"].dtype)


def _linear_move(p, key, x, t):
    return p["slope"] * x + jnp.sqrt(p["process"]) * jax.random.normal(key, (), x.dtype)


def log_normal(x, variance):
    return -0.5 * (jnp.log(2 * jnp.pi * variance) + jnp.square(x) / variance)


def _linear_potential(p, y, x_previous, x, t):
    return log_normal(y[t] - x, p["noise"])


def _linear_transition(p, x_previous, x, t):
    return log_normal(x - p["slope"] * x_previous, p["process"])


TRIGGERS = {
    "ess": resampling.ess_below(0.6),
    "entropic": resampling.entropic_below(0.7),
    "always": resampling.always(),
    "every": resampling.every(2),
}


@pytree
class AnyScheme(resampling.Adaptive):
    """``resampling.Adaptive`` whose scheme and trigger are data: one program serves all of them."""

    scheme: object = field(static=True)  # names of the schemes
    trigger: object  # (number of the scheme, number of the trigger)
    is_conditional: bool = field(static=True, default=False)

    def __call__(self, key, log_weights, num, t):
        table = resampling.CONDITIONAL if self.is_conditional else resampling.SCHEMES
        which_scheme, which_trigger = self.trigger
        rules = [lambda rule=rule: rule(log_weights, t) for rule in TRIGGERS.values()]
        schemes = [lambda name=name: table[name](key, log_weights, num) for name in self.scheme]
        stay = lambda: (jnp.arange(num, dtype=jnp.int32), log_weights)  # noqa: E731
        fires = jax.lax.switch(which_trigger, rules)
        ancestors, log_weights = jax.lax.cond(fires, lambda: jax.lax.switch(which_scheme, schemes), stay)
        return ancestors, log_weights, fires

    def conditional(self):
        return AnyScheme(self.scheme, self.trigger, True)


def any_scheme(scheme, trigger, names):
    """Return the named scheme of a table, with the named trigger."""
    return AnyScheme(tuple(names), (jnp.int32(names.index(scheme)), jnp.int32(list(TRIGGERS).index(trigger))))


@partial(jax.jit, static_argnames="sizes")
def masses(keys, fk, adaptive, sizes):
    """Estimates of evidence (runs,), smoothing masses (runs, T, K), status; ``sizes``: steps, states, particles."""
    num_steps, num_states, num_particles = sizes

    def run(key):
        result = smc.particle_filter(key, fk, num_steps, num_particles, resampling=adaptive)
        weights = jnp.exp(result.log_weights) / num_particles
        states = jax.nn.one_hot(result.paths, num_states, dtype=weights.dtype)
        dead = result.status == int(Status.DEGENERATE_WEIGHTS)
        mass = jnp.where(dead, 0, jnp.einsum("n,ntk->tk", weights, states))
        return jnp.exp(result.log_evidence), mass, result.status

    return jax.vmap(run)(keys)


def exact_paths(model, seed, chains):
    """Draw independent paths (chains, T) from the posterior of a finite model."""
    paths, mass = hmm.enumerate_paths(model)
    drawn = np.random.default_rng(seed).choice(len(paths), chains, p=mass / mass.sum())
    return jnp.asarray(paths[drawn], jnp.int32)


def chi_squared(model, paths):
    """p-value of paths (chains, T) under the posterior of the model; cells with fewer than 10 expected are merged."""
    mass = hmm.enumerate_paths(model)[1]
    counts = np.bincount(hmm.path_index(np.asarray(paths), model.num_states), minlength=len(mass))
    expected = mass / mass.sum() * len(paths)
    rare = expected < 10
    if rare.any():
        counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    return stats.chisquare(counts, expected).pvalue


def z_scores(samples, expected):
    """(mean - expected) / standard error over axis 0; if nothing varies, 0 if equal to rounding, else infinite."""
    samples = np.asarray(samples, float)
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    difference = samples.mean(axis=0) - expected
    flat = error <= 1e-12 * np.abs(expected)
    same = np.abs(difference) <= 1e-6 * np.abs(expected) + 1e-12
    return np.where(flat, np.where(same, 0.0, np.inf), difference / np.where(flat, 1.0, error))
