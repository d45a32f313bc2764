"""Ranks: brute force, failures with a reason, ties, constants, thinning, and the verdict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.checks import holm, rank_table, uniformity
from probinfer.checks.calibration.whitening import whitening_matrix

S, L, D = 400, 60, 2


def log_prior(theta):
    return -0.5 * jnp.sum(theta**2)


def log_likelihood(theta, x):
    return -0.5 * jnp.sum((x - theta) ** 2)


def conjugate(key, shape=(S, L, D)):
    """theta ~ N(0, I), x ~ N(theta, I): the posterior is N(x / 2, I / 2)."""
    keys = jax.random.split(key, 3)
    theta = jax.random.normal(keys[0], (shape[0], shape[-1]))
    x = theta + jax.random.normal(keys[1], theta.shape)
    noise = jax.random.normal(keys[2], shape)
    return theta, x, x[:, None] / 2 + np.sqrt(0.5) * noise, noise


def judge(key, draws, theta, x=None, level=0.05, **kwargs):
    densities = {"log_prior_fn": log_prior, "log_likelihood_fn": log_likelihood} if x is not None else {}
    table = rank_table(key, draws, theta, x, num_projections=4, thin=1, **densities, **kwargs)
    return uniformity(table, level=level)


@pytest.mark.f32
def test_ranks_are_counts(key, dtype):
    theta, x, draws, _ = conjugate(key)
    table = rank_table(key, draws, theta, x, log_prior_fn=log_prior, log_likelihood_fn=log_likelihood, thin=1)
    assert table.names[: D + 3] == ("value[0]", "value[1]", "log_prior", "log_likelihood", "log_joint")
    assert table.ranks.shape == (S, D + 3 + 20)
    assert table.num_draws == L
    assert draws.dtype == dtype
    np.testing.assert_array_equal(table.ranks[:, :D], np.sum(draws < theta[:, None], axis=1))
    joint = [
        -0.5 * (t**2).sum(-1) - 0.5 * ((x_ - t) ** 2).sum(-1) for t, x_ in [(draws, x[:, None]), (theta, x)]
    ]
    off = np.abs(table.ranks[:, 4] - np.sum(joint[0] < joint[1][:, None], axis=1))
    assert off.max() <= (0 if dtype == jnp.float64 else 1)  # sums in another order round differently
    assert table.uses_data[:5] == (False, False, False, True, True)


def test_trees_chains_and_user_quantities(key):
    theta, x, draws, _ = conjugate(key)
    tree = {"a": theta[:, 0], "b": theta[:, 1:]}
    chained = {"a": draws[..., 0].reshape(S, 3, 20), "b": draws[..., 1:].reshape(S, 3, 20, 1)}
    table = rank_table(
        key, chained, tree, x, quantities={"sum": lambda t, x: t["a"] + t["b"][0]}, chain_axis=True, thin=1,
        num_projections=0,
    )  # fmt: skip
    assert table.names == ("a", "b[0]", "sum")
    np.testing.assert_array_equal(table.ranks[:, 2], np.sum(draws.sum(-1) < theta.sum(-1)[:, None], axis=1))


@pytest.mark.slow
def test_size_of_the_verdict(key):
    # 60 data sets at level .05: 11 false alarms or more have probability 1e-4 if the level is kept.
    alarms = 0
    for k in jax.random.split(key, 60):
        theta, x, draws, _ = conjugate(k, (100, 30, D))
        alarms += judge(k, draws, theta, x).passed is False
    assert alarms <= 10


def test_the_prior_passes_marginals_and_fails_the_joint_density(key):
    theta, x, _, noise = conjugate(key)
    marginal = judge(key, noise, theta)
    assert min(marginal.pvalues.values()) > 1e-4  # the rate of false alarms
    assert "ignores the data is not detected" in marginal.verdict
    joint = judge(key, noise, theta, x)
    assert joint.passed is False
    assert "log_joint" in joint.rejected
    assert "log_joint" in joint.verdict


@pytest.mark.parametrize(("shift", "factor"), [(0.4, 1.0), (0.0, 1.5), (0.0, 0.65)])
def test_what_it_says_it_could_find_it_finds(key, shift, factor):
    theta, x, _, noise = conjugate(key)
    draws = x[:, None] / 2 + np.sqrt(0.5) * (shift + factor * noise)
    report = judge(key, draws, theta, x)
    assert report.power.bias < 0.4
    assert report.power.too_wide < 1.5
    assert report.power.too_narrow > 0.65
    assert report.passed is False  # each has power above .9 by one quantity, and there are nine


def test_failures_are_counted_with_a_reason(key):
    theta, x, draws, _ = conjugate(key)
    draws = draws.at[:3, 0, 0].set(jnp.nan)
    theta = theta.at[5].set(jnp.inf)
    strange = lambda t, x: jnp.where(jnp.abs(t[0]) > 2.5, jnp.nan, t[0])  # noqa: E731
    report = judge(key, draws, theta, x, quantities={"strange": strange})
    reasons = dict(report.ranks.failures)
    assert reasons["a draw is NaN or infinite"] == 3
    assert reasons["the true value is NaN or infinite"] == 1
    assert reasons["strange is NaN"] > 3
    assert np.all(report.ranks.ranks[:3] == -1)
    assert "3 simulations failed: a draw is NaN" in report.verdict


def test_many_failures_cannot_tell(key):
    theta, _, draws, _ = conjugate(key)
    report = judge(key, draws.at[:150].set(jnp.nan), theta, level=1e-4)  # the rate of false alarms
    assert report.passed is None
    assert "150 of 400 simulations failed" in report.verdict
    nothing = judge(key, draws * jnp.nan, theta)
    assert nothing.passed is None
    assert "no quantity could be ranked" in nothing.verdict


def test_constants_and_ties(key):
    theta, x, draws, _ = conjugate(key)
    report = judge(
        key, draws, theta, x, quantities={"one": lambda t, x: 1.0, "sign": lambda t, x: jnp.sign(t[0])}
    )
    assert report.ranks.constant == ("one",)
    assert "one" not in report.pvalues
    assert "cannot tell about one" in report.verdict
    # Discrete values tie often; ranks are uniform all the same. Fails with probability 1e-4.
    assert report.raw_pvalues["sign"] > 1e-4


def test_too_few_simulations_say_how_many_are_needed(key):
    theta, _, draws, _ = conjugate(key)
    report = judge(key, draws[:15], theta[:15], level=1e-4)  # the rate of false alarms
    assert report.passed is None
    assert 15 < report.needed < 200
    assert f"about {report.needed} simulations are needed" in report.verdict


def test_autocorrelated_draws_are_thinned(key):
    theta, x, _, _ = conjugate(key)
    keys = jax.random.split(key)
    innovations = np.sqrt(1 - 0.95**2) * jax.random.normal(keys[0], (300, S, D))
    start = jax.random.normal(keys[1], (S, D))
    _, path = jax.lax.scan(lambda c, e: (0.95 * c + e,) * 2, start, innovations)
    draws = x[:, None] / 2 + np.sqrt(0.5) * jnp.moveaxis(path, 1, 0)
    report = uniformity(rank_table(key, draws, theta, num_projections=0), level=1e-4)  # false alarms
    assert 40 <= report.ranks.thin <= 160  # twice the autocorrelation time of 39
    assert report.passed is not False
    assert "th draw was used" in report.verdict
    assert judge(key, draws, theta).passed is False


def test_independent_draws_are_not_thinned(key):
    theta, _, draws, _ = conjugate(key)
    assert rank_table(key, draws, theta).thin == 1


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.03])), [0.06, 0.03, 0.06])


@pytest.mark.parametrize("whiten", ["pooled", "prior"])
def test_whitening_takes_units_out(key, whiten):
    theta, _, draws, _ = conjugate(key)
    units = jnp.asarray([1e3, 1e-3])
    raw = draws @ whitening_matrix(draws, theta, whiten=whiten).T
    scaled = (draws * units) @ whitening_matrix(draws * units, theta * units, whiten=whiten).T
    np.testing.assert_allclose(raw, scaled, rtol=1e-6, atol=1e-9)


def test_pooled_whitening_removes_correlation(key):
    theta, _, draws, _ = conjugate(key)
    mix = jnp.asarray([[1.0, 0.9], [0.0, 0.3]])
    white = (draws @ mix) @ whitening_matrix(draws @ mix, theta @ mix).T
    inside = white - white.mean(axis=1, keepdims=True)
    covariance = np.einsum("sli,slj->ij", inside, inside) / (S * L)
    np.testing.assert_allclose(covariance, np.eye(D), atol=0.1)  # median against mean scale: a few per cent


def test_plot_shows_what_failed(key):
    theta, x, _, noise = conjugate(key)
    axes = judge(key, noise, theta, x).plot()
    assert "log_joint" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert axes.get_ylabel() == "ECDF - diagonal"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"key": 3}, TypeError, "key"),
        ({"theta": jnp.zeros((S - 1, D))}, ValueError, "simulations"),
        ({"theta": jnp.zeros((S, D + 1))}, ValueError, "match"),
        ({"theta": {"a": jnp.zeros((S, D))}}, ValueError, "structure"),
        ({"draws": jnp.zeros((S, 0, D))}, ValueError, "empty"),
        ({"x": jnp.zeros((S + 1, D))}, ValueError, "x must have leaves"),
        ({"log_likelihood_fn": log_likelihood}, ValueError, "needs the data"),
        ({"quantities": [lambda t, x: t]}, ValueError, "must be a scalar"),
        ({"quantities": {"value[0]": lambda t, x: t[0]}}, ValueError, "two test quantities"),
        ({"whiten": "posterior"}, ValueError, "whiten must be"),
        ({"thin": 0}, ValueError, "thin"),
        ({"thin": L + 1}, ValueError, "thin"),
    ],
)
def test_bad_input(key, change, error, words):
    arguments = {"key": key, "draws": jnp.zeros((S, L, D)), "theta": jnp.zeros((S, D))} | change
    with pytest.raises(error, match=words):
        rank_table(arguments.pop("key"), arguments.pop("draws"), arguments.pop("theta"), **arguments)


def test_bad_level(key):
    theta, _, draws, _ = conjugate(key)
    with pytest.raises(ValueError, match="false alarm"):
        uniformity(rank_table(key, draws, theta, num_projections=0, thin=1), level=0.95)
