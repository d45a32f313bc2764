"""Potentials in Python: the same numbers as in JAX, one call per step, and what happens to late and wrong results."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import smc
from probinfer.core.errors import ConvergenceWarning
from probinfer.core.status import Status

STEPS, SIZE = 4, 30


def start(key):
    return {"x": jax.random.normal(key), "step": jnp.int32(0)}


def move(key, state, t):
    return {"x": 0.5 * state["x"] + jax.random.normal(key), "step": t}


def log_potential(x_previous, x, t):
    return -0.5 * (x["x"] - x_previous["x"] - t) ** 2


def run(key, log_potential):
    return smc.particle_filter(key, smc.FeynmanKac(start, move, log_potential), STEPS, SIZE, store="none")


def test_python_weighs_as_jax_does_and_is_called_once_a_step(key, dtype):
    calls = []

    def on_host(x_previous, x, t):
        calls.append((t, type(x["x"]), x["x"].shape, x["step"].shape))
        return log_potential(x_previous, x, t)

    actual, expected = run(key, smc.host_potential(on_host)), run(key, log_potential)
    np.testing.assert_allclose(actual.log_evidence, expected.log_evidence, rtol=1e-5)
    np.testing.assert_allclose(actual.particles["x"], expected.particles["x"], rtol=1e-5)
    assert actual.log_weights.dtype == dtype
    assert calls == [(t, np.ndarray, (SIZE,), (SIZE,)) for t in range(STEPS)]


@pytest.mark.parametrize("kind", ["generator", "verifier"])
def test_a_function_that_is_defined_again_is_another_one(key, kind):
    """A cell that is run twice restarts its generator and counts in its own verifier; no older one is called."""

    class Verifier:
        def __init__(self):
            self.calls, self.rng = 0, np.random.default_rng(0)

        def __call__(self, x_previous, x, t):
            self.calls += 1
            return self.rng.normal(size=x["x"].shape)

    def build():
        verifier = Verifier()
        rng = verifier.rng
        draws = (lambda x_previous, x, t: rng.normal(size=x["x"].shape)) if kind == "generator" else verifier
        return verifier, smc.host_potential(draws)

    (first, potential), (second, again) = build(), build()
    actual = [run(key, each).log_evidence for each in (potential, again, again)]
    assert actual[0] == actual[1] != actual[2]
    assert (first.calls, second.calls) == ((0, 0) if kind == "generator" else (STEPS, 2 * STEPS))


def test_one_particle_and_batches_of_runs(key):
    potential = smc.host_potential(log_potential)
    single = potential({"x": jnp.asarray(1.0)}, {"x": jnp.asarray(2.5)}, 1)
    np.testing.assert_allclose(single, -0.125)
    keys = jax.random.split(key, 3)
    several = jax.vmap(lambda key: run(key, potential).log_evidence)(keys)
    expected = jax.vmap(lambda key: run(key, log_potential).log_evidence)(keys)
    np.testing.assert_allclose(several, expected, rtol=1e-5)


def test_a_late_answer_stops_the_run_and_keeps_what_was_there(key):
    never = threading.Event()

    def hangs(x_previous, x, t):
        if t == 2:
            never.wait()
        return log_potential(x_previous, x, t)

    with pytest.warns(ConvergenceWarning, match="longer than 0.3 s at step 2"):
        actual = jax.block_until_ready(run(key, smc.host_potential(hangs, timeout=0.3)))
    never.set()
    assert int(actual.status) == Status.NON_FINITE
    assert int(actual.stopped_at) == 2
    assert np.all(np.isfinite(actual.log_weights))
    assert np.all(np.isfinite(actual.particles["x"]))
    assert np.all(actual.particles["step"] == 1)


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_failures_of_the_function_are_shown(key, timeout):
    def fails(x_previous, x, t):
        raise RuntimeError("the verifier is out of order")

    def returns_one_number(x_previous, x, t):
        return np.zeros(())

    with pytest.raises(Exception, match="the verifier is out of order"):
        jax.block_until_ready(run(key, smc.host_potential(fails, timeout=timeout)))
    with pytest.raises(Exception, match=rf"of shape \({SIZE},\), got \(\) at step 0"):
        jax.block_until_ready(run(key, smc.host_potential(returns_one_number, timeout=timeout)))


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="got int"):
        smc.host_potential(3)
    with pytest.raises(ValueError, match="positive number of seconds"):
        smc.host_potential(log_potential, timeout=0)
