import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.tree_util import Partial

from probinfer import smc
from probinfer.core.status import Status
from probinfer.running import checkpoint
from tests.smc import models

SIZE, STEPS, LAG = 16, 10, 3


def _walk(slope, x, t):
    return dist.Normal(slope * x, 0.7)


def _observe(x, t):
    return dist.Normal(x, 0.9)


def distributions(dtype):
    initial = dist.Normal(jnp.zeros((), dtype), jnp.ones((), dtype))
    return initial, Partial(_walk, jnp.asarray(0.9, dtype)), _observe


def series(dtype):
    y = np.random.default_rng(5).normal(size=STEPS)
    y[4] = np.nan
    return jnp.asarray(y, dtype)


def filtering(dtype, lag=LAG):
    return smc.online(smc.observing(*distributions(dtype)), SIZE, lag=lag)


def stream(key, algorithm, y):
    """All states and infos of a stream, one call per step."""
    key_init, key_steps = jax.random.split(key)
    states, infos = [algorithm.init(key_init, y[0])], []
    for step_key, row in zip(jax.random.split(key_steps, len(y))[1:], y[1:]):
        state, info = algorithm.step(step_key, states[-1], row)
        states.append(state)
        infos.append(info)
    return states, infos


@pytest.mark.f32
def test_the_numbers_are_those_of_the_particle_filter(key, count_compiles, dtype):
    y = series(dtype)
    batch = smc.particle_filter(key, smc.state_space(*distributions(dtype), y), STEPS, SIZE)
    states, infos = stream(key, filtering(dtype), y)
    last = states[-1]
    rounding = 40 * jnp.finfo(dtype).eps  # programs are compiled apart
    np.testing.assert_allclose(last.particles, batch.particles, rtol=rounding, atol=rounding)
    np.testing.assert_allclose(
        last.log_weights - last.log_weights[0], batch.log_weights - batch.log_weights[0], atol=rounding
    )
    log_evidences = [states[0].log_evidence, *(info.log_evidence for info in infos)]
    np.testing.assert_allclose(log_evidences, batch.log_evidences, rtol=rounding)
    np.testing.assert_allclose(
        np.cumsum([log_evidences[0], *(info.log_predictive for info in infos)]),
        batch.log_evidences,
        rtol=rounding,
    )
    np.testing.assert_allclose([info.ess for info in infos], batch.ess[1:], rtol=rounding)
    assert [bool(info.resampled) for info in infos] == batch.resampled[1:].tolist()
    assert np.array_equal([info.ancestors for info in infos], batch.ancestors[1:])
    assert 0 < batch.resampled.sum() < STEPS - 1
    # the window is the end of the paths
    np.testing.assert_allclose(last.recent.T, batch.paths[:, -LAG - 1 :], rtol=rounding, atol=rounding)
    assert np.all(np.isin(states[1].recent[:-1], states[0].particles))  # step 0 fills the rows before it
    assert last.t == STEPS
    assert {leaf.dtype for leaf in (last.particles, last.log_weights, last.log_evidence, last.recent)} == {
        dtype
    }
    # new data, parameters and algorithm object: the same program
    initial, _, observation = distributions(dtype)
    again = smc.online(
        smc.observing(initial, Partial(_walk, jnp.asarray(0.5, dtype)), observation), SIZE, lag=LAG
    )
    other_key, value = jax.random.key(5), jnp.asarray(0.3, dtype)
    with count_compiles() as compiles:
        state, _ = again.step(other_key, last, value)
    assert compiles.count == 0
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, states[0])


def test_many_steps_in_a_scan_and_side_by_side(key, dtype):
    # 3 streams of 2000 steps in one program; the state has the shapes of the first one
    algorithm = filtering(dtype, lag=0)
    y = jnp.asarray(np.random.default_rng(7).normal(size=(2000, 3)), dtype)
    start = jax.vmap(algorithm.init)(jax.random.split(key, 3), y[0])

    def step(state, row):
        key, values = row
        return jax.vmap(algorithm.step)(jax.random.split(key, 3), state, values)

    end, infos = jax.jit(lambda start, rows: jax.lax.scan(step, start, rows))(
        start, (jax.random.split(key, 1999), y[1:])
    )
    assert jax.tree.map(jnp.shape, end) == jax.tree.map(jnp.shape, start)
    assert end.recent is None
    assert np.all(end.t == 2000)
    assert np.all(end.status == 0)
    sums = np.asarray(start.log_evidence) + np.asarray(infos.log_predictive).sum(axis=0)
    np.testing.assert_allclose(end.log_evidence, sums, rtol=1e-12)


@pytest.mark.f32
def test_a_long_sum_loses_no_digits(key):
    # 50 000 terms of about 1/3 in float32: compensated to the last digit, where a plain sum is wrong by some 1e-5
    model_fn = Partial(_constant_model)
    algorithm = smc.online(model_fn, 1)
    start = algorithm.init(key, jnp.float32(1 / 3))
    step = lambda state, key: (algorithm.step(key, state, jnp.float32(1 / 3))[0], None)  # noqa: E731
    end = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(key, 50_000))[0])(start)
    exact = 50_001 * float(np.float32(1 / 3))
    assert abs(float(end.log_evidence) - exact) <= 1.5 * np.spacing(np.float32(exact))


def _constant_model(observation):
    return smc.FeynmanKac(_nothing, _stay, Partial(_given, observation))


def _nothing(key):
    return jnp.float32(0)


def _stay(key, x, t):
    return x


def _given(observation, x_previous, x, t):
    return observation + 0 * x


def test_a_saved_state_continues(key, tmp_path, dtype):
    algorithm, y = filtering(dtype), series(dtype)
    state = stream(key, algorithm, y)[0][-1]
    checkpoint.save(tmp_path / "state", state)
    back = checkpoint.restore(tmp_path / "state", state)
    for a, b in zip(
        jax.tree.leaves(algorithm.step(key, state, y[0])),
        jax.tree.leaves(algorithm.step(key, back, y[0])),
        strict=True,
    ):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("value", "status", "evidence"),
    [
        (-np.inf, Status.DEGENERATE_WEIGHTS, -np.inf),
        (np.nan, Status.NON_FINITE, np.nan),
        (np.inf, Status.NON_FINITE, np.nan),
    ],
)
def test_a_failure_stops_the_stream_and_is_reported(key, value, status, evidence):
    algorithm = smc.online(_constant_model, 4, lag=1)
    keys = jax.random.split(key, 3)
    sound = algorithm.init(key, jnp.float32(-1))
    sound, _ = algorithm.step(keys[0], sound, jnp.float32(-1))
    failed, info = algorithm.step(keys[1], sound, jnp.float32(value))
    later, _ = algorithm.step(keys[2], failed, jnp.float32(-1))
    for state in (failed, later):
        assert state.status == status
        assert state.stopped_at == 2
        np.testing.assert_equal(float(state.log_evidence), evidence)
        assert np.array_equal(state.log_weights, sound.log_weights)
        assert np.array_equal(state.recent, sound.recent)
    np.testing.assert_equal(float(info.log_predictive), evidence)
    assert info.ess == 0
    at_start = algorithm.init(key, jnp.float32(value))
    assert at_start.status == status
    assert at_start.stopped_at == 0


def test_bad_input_is_refused(key):
    with pytest.raises(TypeError, match="model_fn must be a function observation -> model, got FeynmanKac"):
        smc.online(models.linear(jnp.ones(3)), 5)
    with pytest.raises(ValueError, match="num_particles must be at least 1"):
        smc.online(_constant_model, 0)
    with pytest.raises(ValueError, match="lag must be 0"):
        smc.online(_constant_model, 5, lag=-1)
    with pytest.raises(TypeError, match="lag must be a Python int"):
        smc.online(_constant_model, 5, lag=True)
    with pytest.raises(ValueError, match="systemic"):
        smc.online(_constant_model, 5, resampling="systemic")
    with pytest.raises(TypeError, match=r"expected a smc.FeynmanKac.*got float"):
        smc.online(lambda observation: 3.0, 5).init(key, 1.0)
    with pytest.raises(TypeError, match="key"):
        smc.online(_constant_model, 5).init(0, 1.0)
