"""The transitions of smc leave the joint distribution of paths and data invariant; with a fault they do not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import checks, resampling, smc
from probinfer.app.suite import known_targets
from probinfer.core.types import field, pytree
from probinfer.smc.conditional.gibbs import gibbs_step
from probinfer.smc.tempered.moves import hamiltonian
from tests.smc import models

STEPS, PARTICLES, LANES, LEVEL = 3, 4, 400, 1e-4
SETTINGS = {"num_simulations": LANES, "level": LEVEL, "mode": "vmap", "progress": False}


# A linear-Gaussian state space: theta is the path


def draw_path(key):
    fk = models.linear(jnp.zeros(STEPS))
    keys = jax.random.split(key, STEPS)
    first = fk.init_sample(keys[0])

    def walk(x, key):
        x = fk.propagate(key, x, 1)
        return x, x

    return jnp.append(first, jax.lax.scan(walk, first, keys[1:])[1])


def observe(key, path):
    return path + models.LINEAR["noise"] ** 0.5 * jax.random.normal(key, path.shape)


def log_path(path):
    rest = models.log_normal(path[1:] - models.LINEAR["slope"] * path[:-1], models.LINEAR["process"])
    return models.log_normal(path[0], models.LINEAR["start"]) + jnp.sum(rest)


def log_fit(path, y):
    return jnp.sum(models.log_normal(y - path, models.LINEAR["noise"]))


@pytree
class Favored(resampling.Adaptive):
    """Resample always; then make slot 0, the reference, heavier by a log factor and keep the total weight."""

    scheme: Any = field(static=True)
    trigger: Any  # the log factor

    def __call__(self, key, log_weights, num, t):
        ancestors, equal = self.scheme(key, log_weights, num)
        favored = equal.at[0].add(self.trigger)
        total = jax.nn.logsumexp(equal) - jax.nn.logsumexp(favored)
        return ancestors, favored + total, jnp.asarray(True)


@pytree
class Gibbs:
    """One step of particle Gibbs; the fault of ancestor and backward sampling is to ignore the later steps."""

    fault: Any
    path_update: str = field(static=True)

    def __call__(self, key, path, y):
        scheme = "multinomial" if self.path_update == "backward" else "systematic"
        favor = self.fault * jnp.log(30.0) if self.path_update == "genealogy" else 0.0 * self.fault
        model = smc.lift(models.linear(y))
        suffix = jax.tree_util.Partial(scaled, 1 - self.fault, model.log_suffix)
        model = smc.BatchedFeynmanKac(model.init, model.extend, log_suffix=suffix)
        return gibbs_step(
            key, model, Favored(resampling.conditional(scheme), favor), path, PARTICLES, self.path_update
        )[0]


def scaled(share, log_suffix, particles, records, t):
    return share * log_suffix(particles, records, t)


def judge_gibbs(path_update, fault, seed):
    return checks.joint_test(
        jax.random.key(seed),
        draw_path,
        observe,
        Gibbs(jnp.asarray(fault, float), path_update),
        # not reversible: ancestor sampling changes the reference during the pass
        reverse=None if path_update == "ancestor" else "same",
        log_prior_fn=log_path,
        log_likelihood_fn=log_fit,
        num_draws=15,
        **SETTINGS | {"num_simulations": 10 * LANES},  # the faults are small
    )


@pytest.mark.parametrize(
    "path_update",
    [
        pytest.param(path_update, marks=pytest.mark.slow)
        for path_update in ("genealogy", "ancestor", "backward")
    ],
)
def test_particle_gibbs(path_update):
    right = judge_gibbs(path_update, 0.0, 1)
    assert right.passed, right.verdict  # a false alarm has probability LEVEL
    assert min(right.moved.values()) > 0.9
    broken = judge_gibbs(path_update, 1.0, 2)
    assert broken.passed is False, broken.verdict


# Two temperatures: theta is a path given the data, and one given the data with the likelihood to the power BETA

BETA = 0.3


def gaussian():
    """Means and roots of (cold, hot) and of y given both: all are linear in the path, the noise, a normal vector."""
    lag = models.LINEAR["slope"] * np.eye(STEPS, k=-1)
    innovations = np.diag([models.LINEAR["start"], *[models.LINEAR["process"]] * (STEPS - 1)])
    prior = np.linalg.inv(np.eye(STEPS) - lag) @ innovations @ np.linalg.inv(np.eye(STEPS) - lag).T
    noise, none = models.LINEAR["noise"], np.zeros((STEPS, STEPS))
    spread = np.linalg.inv(np.linalg.inv(prior) + BETA / noise * np.eye(STEPS))
    gain = BETA / noise * spread
    cold = np.hstack([np.linalg.cholesky(prior), none, none])
    y = cold + np.hstack([none, noise**0.5 * np.eye(STEPS), none])
    hot = gain @ y + np.hstack([none, none, np.linalg.cholesky(spread)])
    pair = np.vstack([cold, hot])
    slope = np.linalg.solve(pair @ pair.T, pair @ y.T).T
    rest = y - slope @ pair
    return np.linalg.cholesky(pair @ pair.T), slope, np.linalg.cholesky(rest @ rest.T)


PAIR_ROOT, SLOPE, DATA_ROOT = gaussian()


def draw_pair(key):
    return (PAIR_ROOT @ jax.random.normal(key, (2 * STEPS,))).reshape(2, STEPS)


def observe_pair(key, pair):
    return SLOPE @ pair.ravel() + DATA_ROOT @ jax.random.normal(key, (STEPS,))


@pytree
class Exchange:
    """Two iterations of parallel tempering; the fault is to exchange the paths once more, whatever they are."""

    fault: Any

    def __call__(self, key, pair, y):
        paths = smc.parallel_tempering(
            key,
            models.linear(y),
            STEPS,
            PARTICLES,
            2,
            inverse_temperatures=jnp.asarray([1.0, BETA], pair.dtype),
            references=pair,
        ).paths[-1]
        return jnp.where(self.fault, paths[::-1], paths)


def cold_fit(pair, y):
    return log_fit(pair[0], y)


def hot_fit(pair, y):
    return log_fit(pair[1], y)


def test_the_pair_is_drawn_from_its_law():
    """Covariance of the path as the walk has it; the hot path fits the data worse."""
    pairs = jax.vmap(draw_pair)(jax.random.split(jax.random.key(4), 20_000))
    paths = jax.vmap(draw_path)(jax.random.split(jax.random.key(5), 20_000))
    # 6 errors of a variance of 20 000 normals on either side, 0.014 of it: false alarm 2e-9 for each of six
    np.testing.assert_allclose(np.var(pairs[:, 0], axis=0), np.var(paths, axis=0), rtol=6 * 0.014)
    y = jax.vmap(observe_pair)(jax.random.split(jax.random.key(6), 20_000), pairs)
    np.testing.assert_allclose(np.var(y - pairs[:, 0], axis=0), models.LINEAR["noise"], rtol=6 * 0.01)
    assert np.all(np.var(y - pairs[:, 1], axis=0) > 1.2 * models.LINEAR["noise"])


def judge_exchange(fault, seed):
    return checks.joint_test(
        jax.random.key(seed),
        draw_pair,
        observe_pair,
        Exchange(jnp.asarray(fault)),
        reverse=None,  # iterations and exchanges in this order
        quantities={"cold fit": cold_fit, "hot fit": hot_fit},
        num_draws=7,
        **SETTINGS,
    )


@pytest.mark.slow
def test_parallel_tempering():
    right = judge_exchange(False, 1)
    assert right.passed, right.verdict  # a false alarm has probability LEVEL
    broken = judge_exchange(True, 2)
    assert broken.passed is False, broken.verdict


# The move of tempered SMC, on the location and the scale of five observations

MODEL = known_targets.location_and_scale()


@pytree
class Move:
    """One Hamiltonian move; the fault is to move at another temperature."""

    temperature: Any

    def __call__(self, key, theta, x):
        def evaluate(u):
            def tilted(u):
                return self.temperature * MODEL.log_joint(u, x), jnp.zeros((), u.dtype)

            return jax.value_and_grad(tilted, has_aux=True)(u)

        root, step_size = jnp.asarray([[0.7, 0.0], [-0.1, 0.4]], theta.dtype), jnp.asarray(0.9, theta.dtype)
        moved = hamiltonian.hmc_moves(
            key, evaluate, theta[None], root, step_size, 0 * step_size, num_moves=1, mode="vmap"
        )
        return moved.positions[-1, 0]


def judge_move(temperature, seed):
    return checks.joint_test(
        jax.random.key(seed),
        MODEL.prior_sample,
        MODEL.simulate,
        Move(jnp.asarray(temperature)),
        log_prior_fn=MODEL.log_prior_fn,
        log_likelihood_fn=MODEL.log_likelihood_fn,
        num_draws=15,
        **SETTINGS,
    )


def test_the_move_of_tempered_smc():
    right = judge_move(1.0, 3)
    assert right.passed, right.verdict  # a false alarm has probability LEVEL
    assert min(right.moved.values()) > 0.9
    broken = judge_move(0.5, 2)
    assert broken.passed is False, broken.verdict
