"""Verdicts on clouds against NumPy, and the rule that ends a run on scripted reports."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.coin.cloud_descent import CloudInfo
from probinfer.coin.engine import diagnostics, stopping
from probinfer.core.algorithms import algorithm
from tests.reference import stein as oracle

RNG = np.random.default_rng(0)


def test_identities_and_discrepancy_of_the_particles_that_count():
    x = RNG.normal(size=(12, 3)) * [1, 2, 3] + 4
    s = -(x - 4) / np.array([1, 4, 9])
    mask = np.arange(12) < 10
    z, pulled = x / [1, 2, 3], s * [1, 2, 3]
    bad = np.where(mask[:, None], s, np.nan)
    result = diagnostics.diagnose(*map(jnp.asarray, (x, bad, z, np.where(mask[:, None], pulled, 0), mask)))
    x, s, z, pulled = (a[:10] for a in (x, s, z, pulled))
    np.testing.assert_allclose(result.virial, np.mean((x - x.mean(0)) * s, axis=0))
    np.testing.assert_allclose(result.location, s.mean(0) * x.std(0))
    squares = np.sum((z[:, None] - z[None]) ** 2, axis=-1)[np.triu_indices(10, 1)]
    scale = np.full(3, np.sort(squares)[22] ** 0.5)  # the 23rd of 45
    expected = np.sqrt(np.mean(oracle.gram(z, pulled, z, pulled, scale, 0.5)))
    np.testing.assert_allclose(result.ksd, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("ratio", "size", "dims", "message"),
    [
        (1.0, 100, 10, ""),
        (0.7, 100, 10, "too narrow"),
        (0.9, 100, 60, "too narrow"),  # theory says so, though the scores do not yet
        (0.01, 100, 10, "does not hold the cloud"),
        (1.5, 100, 10, "wider than its density"),
    ],
)
def test_complaints(ratio, size, dims, message):
    result = diagnostics.describe_misfit(np.full(dims, -ratio), size)
    assert (message in result) if message else (result == "")


class Cloud(NamedTuple):
    """As much of a cloud as the watch looks at."""

    positions: Any
    z: Any
    spread: Any
    step: Any
    age: Any


class Script(NamedTuple):
    """Virials and norms, step by step, and the last step with a stale metric."""

    virials: Any
    norms: Any
    stale: Any


def script_init(script, positions):
    return Cloud(positions, positions, jnp.zeros(1), jnp.int32(0), jnp.int32(0))


def script_step(script, key, state):
    zero = jnp.int32(0)
    t = state.step
    info = CloudInfo(script.norms[t], script.virials[t][None], 1.0, False, zero, zero)
    return state._replace(step=t + 1, age=t + 1 - jnp.maximum(script.stale, 0)), info


def steps_until_settled(virials, norms, stale=-1):
    script = Script(jnp.asarray(virials), jnp.asarray(norms), jnp.int32(stale))
    loop = stopping.monitor_epochs(algorithm(script_init, script_step, script))
    state = loop.init(jnp.zeros((2, 1)))
    for t in range(len(norms)):
        state, info = loop.step(jax.random.key(0), state)
        if bool(stopping.has_settled(state, info)):
            return t + 1
    return None


@pytest.mark.slow
def test_a_run_ends_where_an_epoch_changed_nothing():
    t = np.arange(1, 300)
    level, falling = np.full(299, 1.0), 10.0 / t**2
    at_rest = np.full(299, -1.0)
    assert steps_until_settled(at_rest, level) == 128
    assert steps_until_settled(at_rest, 1e-3 * level) == 128
    assert steps_until_settled(at_rest, level, stale=100) == 256
    drifting = -np.log(t) / 10  # 0.07 a doubling
    assert steps_until_settled(drifting, level) is None
    assert steps_until_settled(np.where(t < 140, drifting, -0.6), level) is None
    assert steps_until_settled(at_rest, falling * 1e3) is None
    assert steps_until_settled(at_rest, falling) == 128  # small by then


def test_a_cloud_in_the_wrong_place_is_complained_of():
    result = diagnostics.describe_misfit(np.full(3, -1.0), 200, np.array([0.1, -1.5, 0.0]))
    assert "not where its density is" in result
    assert "1.5" in result
    assert not diagnostics.describe_misfit(np.full(3, -1.0), 200, np.array([0.1, -0.5, 0.0]))
