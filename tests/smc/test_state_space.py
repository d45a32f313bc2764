import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.tree_util import Partial

from probinfer import smc
from probinfer.core.status import Status
from probinfer.smc.filtering.forward_pass import forward
from probinfer.smc.models.missing import observed_log_prob
from tests.reference import kalman
from tests.smc import models


def _walk(p, x, t):
    return dist.Normal(p["slope"] * x, jnp.sqrt(p["process"]))


def _observe(p, x, t):
    return dist.Normal(x, jnp.sqrt(p["noise"]))


def linear(y, **changes):
    """The model of ``models.linear`` written by distributions."""
    p = {name: jnp.asarray(value, y.dtype) for name, value in (models.LINEAR | changes).items()}
    initial = dist.Normal(jnp.zeros((), y.dtype), jnp.sqrt(p["start"]))
    return smc.state_space(initial, Partial(_walk, p), Partial(_observe, p), y)


def test_it_is_the_model_written_by_hand_and_new_parameters_trace_nothing(key, dtype):
    y = jnp.asarray(np.random.default_rng(5).normal(size=8), dtype)
    actual, plain = (
        smc.particle_filter(key, linear(y), 8, 16),
        smc.particle_filter(key, models.linear(y), 8, 16),
    )
    close = {"rtol": 100 * jnp.finfo(dtype).eps, "atol": 100 * jnp.finfo(dtype).eps}
    np.testing.assert_allclose(actual.paths, plain.paths, **close)
    np.testing.assert_allclose(actual.log_evidences, plain.log_evidences, **close)
    x, z = jnp.asarray(0.3, dtype), jnp.asarray(-0.4, dtype)
    np.testing.assert_allclose(
        linear(y).log_transition(x, z, 1), models.linear(y).log_transition(x, z, 1), **close
    )
    assert actual.paths.dtype == actual.log_evidence.dtype == dtype
    compiled = forward._cache_size()
    smc.particle_filter(key, linear(y + 1, slope=0.5, start=1.0), 8, 16)
    assert forward._cache_size() == compiled


def test_missing_observations_contribute_nothing(key, dtype):
    # against Kalman with the rows left out: both ways of saying so are the same numbers
    y = np.random.default_rng(5).normal(size=8)
    gaps = np.array([1, 0, 0, 1, 0, 0, 0, 1], bool)
    p = models.LINEAR
    mean, variance, expected = 0.0, p["start"], 0.0
    for t, value in enumerate(y):
        if t:
            mean, variance = p["slope"] * mean, p["slope"] ** 2 * variance + p["process"]
        if not gaps[t]:
            expected += kalman.kalman([value - mean], **(p | {"start": variance}))[0]
            gain = variance / (variance + p["noise"])
            mean, variance = mean + gain * (value - mean), (1 - gain) * variance
    absent = linear(jnp.asarray(np.where(gaps, np.nan, y), dtype))
    result = smc.particle_filter(key, absent, 8, 20_000)
    assert abs(result.log_evidence - expected) < 0.05  # over 6 of its standard errors, below sqrt(8 / 20 000)
    assert result.status == 0
    initial, members = dist.Normal(0.0, 1.0), (jnp.asarray(y), jnp.asarray(~gaps))
    masked = smc.state_space(initial, _plain_walk, _plain_observe, members[0], observed=members[1])
    nans = smc.state_space(initial, _plain_walk, _plain_observe, jnp.where(members[1], members[0], jnp.nan))
    x = jnp.linspace(-1.0, 1.0, 8)
    values = [jax.vmap(model.log_potential, (0, 0, 0))(x, x, jnp.arange(8)) for model in (masked, nans)]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    assert np.array_equal(np.asarray(values[0]) == 0, gaps)


def _plain_walk(x, t):
    return dist.Normal(x, 1.0)


def _plain_observe(x, t):
    return dist.Normal(x, 1.0)


def test_a_missing_observation_has_derivative_zero():
    y = jnp.array([jnp.nan, 1.0])

    def potential(scale, t):
        fk = smc.state_space(dist.Normal(0.0, 1.0), _plain_walk, Partial(_scaled, scale), y)
        return fk.log_potential(0.5, 0.5, t)

    assert jax.grad(potential)(1.0, 0) == 0
    assert jax.grad(potential)(1.0, 1) != 0


def _scaled(scale, x, t):
    return dist.LogNormal(x, scale)


def _joint(x, t):
    return dist.MultivariateNormal(x, jnp.eye(2))


def _apart(x, t):
    return dist.Normal(x, 1.0)


def test_vectors_and_partly_missing_rows():
    y = jnp.array([[0.5, -1.0], [jnp.nan, 2.0], [jnp.nan, jnp.nan]])
    x, x_previous = jnp.array([0.2, 0.1]), jnp.zeros(2)
    initial = dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2))
    joint, apart = (smc.state_space(initial, _joint, observation, y) for observation in (_joint, _apart))
    logs = -0.5 * (np.log(2 * np.pi) + (np.asarray(y) - np.asarray(x)) ** 2)
    for model in (joint, apart):
        assert np.isclose(model.log_potential(x, x, 0), logs[0].sum())
        assert model.log_potential(x, x, 2) == 0
        assert np.isclose(model.log_transition(x_previous, x, 1), -np.log(2 * np.pi) - 0.5 * np.sum(x**2))
        assert np.isclose(model.log_potential(x, x, 1), logs[1, 1])


SCALE = np.array([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]])
ELLIPTIC = {
    "normal": lambda loc: dist.MultivariateNormal(loc, jnp.asarray(SCALE)),
    "t": lambda loc: dist.MultivariateStudentT(4.0, loc, jnp.linalg.cholesky(jnp.asarray(SCALE))),
}


@pytest.mark.parametrize("name", ELLIPTIC)
def test_missing_coordinates_are_integrated_out(name):
    """Marginals of SciPy, for every pattern of gaps; the derivative is that of what was observed."""
    from scipy import stats

    loc, y = np.array([0.3, -1.0, 2.0]), np.array([1.0, 0.5, -0.7])
    for pattern in range(8):
        observed = np.array([pattern >> i & 1 for i in range(3)], bool)
        value, slope = jax.value_and_grad(
            lambda loc, observed=observed: observed_log_prob(
                ELLIPTIC[name](loc), jnp.where(observed, y, jnp.nan)
            )
        )(jnp.asarray(loc))
        part = SCALE[np.ix_(observed, observed)]
        scipys = {
            "normal": lambda part=part, observed=observed: stats.multivariate_normal(loc[observed], part),
            "t": lambda part=part, observed=observed: stats.multivariate_t(loc[observed], part, df=4.0),
        }
        expected = scipys[name]().logpdf(y[observed]) if observed.any() else 0.0
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-12)
        assert np.all(np.isfinite(slope))
        assert np.all(np.asarray(slope)[~observed] == 0) or name != "normal"


def test_events_that_cannot_miss_a_part_are_refused_when_the_model_is_made():
    def shares(x, t):
        return dist.Dirichlet(jnp.ones(3))

    complete = jnp.array([[0.2, 0.3, 0.5], [jnp.nan, jnp.nan, jnp.nan]])
    model = smc.state_space(dist.Normal(0.0, 1.0), _plain_walk, shares, complete)
    assert model.log_potential(0.0, 0.0, 1) == 0
    partly = complete.at[0, 1].set(jnp.nan)
    with pytest.raises(ValueError, match=r"row 0 of y is NaN in some coordinates.*of a Dirichlet cannot"):
        smc.state_space(dist.Normal(0.0, 1.0), _plain_walk, shares, partly)
    left_out = smc.state_space(
        dist.Normal(0.0, 1.0), _plain_walk, shares, partly, observed=jnp.array([False, True])
    )
    assert left_out.log_potential(0.0, 0.0, 0) == 0


def test_a_filter_with_gaps_inside_events_has_the_evidence_of_its_parts(key):
    """Two independent chains written as one event: the log evidence is the sum of theirs, 4.9 standard errors wide."""

    def walk(x, t):
        return dist.Normal(0.9 * x, 0.5).to_event(1)

    def see(x, t):
        return dist.Normal(x, 0.3).to_event(1)

    y = jnp.array([[0.1, 0.2], [0.3, jnp.nan], [0.2, 0.1]])
    initial = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
    run = jax.jit(lambda key: smc.particle_filter(key, smc.state_space(initial, walk, see, y), 3, 500))
    log_evidences = np.asarray(jax.vmap(lambda k: run(k).log_evidence)(jax.random.split(key, 40)))
    ratios = np.exp(log_evidences - _log_evidence_of_parts(np.asarray(y)))
    assert abs(ratios.mean() - 1) < 4.9 * ratios.std(ddof=1) / np.sqrt(40) + 1e-3


def _log_evidence_of_parts(y):
    """Of each column by its joint normal distribution, gaps left out."""
    from scipy import stats

    total = 0.0
    for column in y.T:
        times = np.arange(len(column))
        variance = [1.0]
        for _ in times[1:]:
            variance.append(0.81 * variance[-1] + 0.25)
        first = np.minimum.outer(times, times)
        cov = 0.9 ** np.abs(np.subtract.outer(times, times)) * np.asarray(variance)[first]
        observed = ~np.isnan(column)
        marginal = stats.multivariate_normal(
            np.zeros(observed.sum()), cov[np.ix_(observed, observed)] + 0.09 * np.eye(observed.sum())
        )
        total += marginal.logpdf(column[observed])
    return total


def _tree_walk(x, t):
    return {"level": dist.Normal(x["level"], 1.0), "on": dist.Bernoulli(0.3)}


def _tree_observe(x, t):
    return {"count": dist.Poisson(jnp.exp(x["level"])), "size": dist.Normal(x["on"] * 2.0, 1.0)}


def test_trees_of_states_and_observations_and_counts(key):
    initial = {"level": dist.Normal(0.0, 1.0), "on": dist.Bernoulli(0.5)}
    y = {"count": jnp.array([3, 1]), "size": jnp.array([0.3, 0.1])}
    fk = smc.state_space(initial, _tree_walk, _tree_observe, y, observed=np.array([True, False]))
    x = {"level": jnp.asarray(0.2), "on": jnp.int32(1)}
    expected = 3 * 0.2 - np.exp(0.2) - np.log(6) - 0.5 * (np.log(2 * np.pi) + 1.7**2)
    assert np.isclose(fk.log_potential(x, x, 0), expected)
    assert fk.log_potential(x, x, 1) == 0
    assert np.isclose(fk.log_transition(x, x, 1), -0.5 * np.log(2 * np.pi) + np.log(0.3))
    drawn = fk.propagate(key, x, 1)
    assert jax.tree.structure(drawn) == jax.tree.structure(x)


def test_a_step_beyond_the_data_is_reported(key, dtype):
    result = smc.particle_filter(key, linear(jnp.ones(3, dtype)), 5, 4)
    assert result.status == Status.NON_FINITE
    assert result.stopped_at == 3


def _number(x, t):
    return 3.0


def _wide(x, t):
    return dist.Normal(jnp.zeros(2), 1.0)


def test_bad_input_is_refused():
    start, y = dist.Normal(0.0, 1.0), jnp.zeros(3)
    good = (start, _plain_walk, _plain_observe, y)
    for i, value, error, match in [
        (0, 3.0, TypeError, r"initial must be a function \(\) -> distribution, or a distribution, got float"),
        (1, start, TypeError, r"transition must be a function \(x, t\) -> distribution, got Normal"),
        (2, 3.0, TypeError, "observation must be a function"),
        (1, _number, TypeError, "transition must give a NumPyro distribution, or a tree of them; got float"),
        (1, _wide, ValueError, r"transition.*of the state.*got \(\(2,\), 'float64'\)"),
        (2, _wide, ValueError, r"observation.*a row of y: expected \(\), got \(2,\)"),
        (3, jnp.zeros((3, 1)), ValueError, r"a row of y: expected \(1,\), got \(\)"),
        (3, jnp.zeros(0), ValueError, "at least one"),
        (3, {"a": jnp.zeros(3), "b": jnp.zeros(2)}, ValueError, "one row per step"),
    ]:
        arguments = (*good[:i], value, *good[i + 1 :])
        with pytest.raises(error, match=match):
            smc.state_space(*arguments)
    with pytest.raises(TypeError, match="observed must be booleans"):
        smc.state_space(*good, observed=jnp.ones(3))
    with pytest.raises(ValueError, match=r"expected \(3,\), got \(2,\)"):
        smc.state_space(*good, observed=jnp.ones(2, bool))
