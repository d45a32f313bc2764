"""Simulation-based calibration: ranks by brute force, faults that it must detect, failures that it must count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probinfer as pi
from probinfer import checks
from probinfer.checks.calibration.simulation_based import check_functions
from probinfer.core.status import Status

S, L, D = 300, 40, 2


def prior_sample(key):
    return jax.random.normal(key, (D,))


def simulate(key, theta):
    return theta + jax.random.normal(key, (D,))


def log_prior(theta):
    return -0.5 * jnp.sum(theta**2)


def log_likelihood(theta, x):
    return -0.5 * jnp.sum((x - theta) ** 2)


def exact(key, x):
    """The posterior is N(x / 2, I / 2)."""
    return x / 2 + jnp.sqrt(jnp.asarray(0.5, x.dtype)) * jax.random.normal(key, (L, D))


def exact_chains(key, x):
    return exact(key, x).reshape(2, L // 2, D), {"acceptance": jnp.ones(())}


def the_prior(key, x):
    return jax.random.normal(key, (L, D))


def shifted(key, x):
    """A bias with the sign of the data: it cancels over the prior in every parameter."""
    return exact(key, x) + 0.6 * jnp.sign(x)


def fails_far_out(key, x):
    return jnp.where(jnp.abs(x[0]) > 2, jnp.nan, exact(key, x))


def says_it_failed(key, x):
    return exact(key, x), {"status": jnp.where(x[0] > 2, Status.NON_FINITE, Status.OK)}


def run(key, infer_fn, num=S, dense=True, **kwargs):
    densities = {"log_prior_fn": log_prior, "log_likelihood_fn": log_likelihood} if dense else {}
    return checks.sbc(
        key, prior_sample, simulate, infer_fn, num_simulations=num, num_projections=4, **densities, **kwargs
    )


@pytest.fixture(scope="module")
def right():
    return run(jax.random.key(1), exact)


# At level RARE a right posterior fails with this probability; a wrong one listed here passes at .05 with less (1e-6).
RARE = 1e-4


@pytest.mark.f32
def test_a_right_posterior_passes(key, dtype):
    report = run(key, exact, level=RARE)
    assert report.passed, report.verdict
    assert report.posteriors.draws.dtype == dtype
    assert set(report.pvalues) >= {"value[0]", "value[1]", "log_prior", "log_likelihood", "log_joint", "tarp"}
    assert report.power.bias < 0.5


def test_ranks_by_brute_force(right):
    draws, theta, x = right.posteriors.draws, right.theta, right.x
    table = dict(zip(right.ranks.names, right.ranks.ranks.T, strict=True))
    assert draws.shape == (S, L, D)
    np.testing.assert_array_equal(table["value[1]"], np.sum(draws[..., 1] < theta[:, None, 1], axis=1))
    joint = [
        -0.5 * np.sum(t**2, -1) - 0.5 * np.sum((d - t) ** 2, -1) for t, d in ((draws, x[:, None]), (theta, x))
    ]
    np.testing.assert_array_equal(table["log_joint"], np.sum(joint[0] < joint[1][:, None], axis=1))
    uses = dict(zip(right.ranks.names, right.ranks.uses_data, strict=True))
    assert [uses[name] for name in ("tarp", "log_joint", "log_prior", "value[0]")] == [
        True,
        True,
        False,
        False,
    ]


def test_tarp_is_ranked_as_by_tarp_itself(right):
    """The distance is to the references of the report, in their own coordinates."""
    draws, theta = right.posteriors.draws, right.theta
    flat, true = jnp.asarray(draws), jnp.asarray(theta)
    matrix = np.asarray(checks.calibration.whitening.whitening_matrix(flat, true))
    distances = np.sum((draws @ matrix.T - right.references.points[:, None]) ** 2, axis=-1)
    true_distances = np.sum((theta @ matrix.T - right.references.points) ** 2, axis=-1)
    column = right.ranks.ranks[:, right.ranks.names.index("tarp")]
    np.testing.assert_array_equal(column, np.sum(distances < true_distances[:, None], axis=1))


def test_a_posterior_that_ignores_the_data_fails(key):
    blind = run(key, the_prior, dense=False)
    assert "tarp" in blind.rejected
    assert all(p > RARE for name, p in blind.pvalues.items() if name != "tarp")
    assert "without log_prior_fn and log_likelihood_fn" in blind.verdict
    assert {"tarp", "log_joint", "log_likelihood"} <= set(run(key, the_prior).rejected)


def test_chains_are_joined(key):
    one, two = run(key, exact), run(key, exact_chains)
    np.testing.assert_array_equal(one.ranks.ranks, two.ranks.ranks)
    assert two.posteriors.info["acceptance"].shape == (S,)


@pytest.mark.parametrize(
    ("infer_fn", "reason"), [(fails_far_out, "NaN or infinite"), (says_it_failed, "the inference failed")]
)
def test_failures_are_counted(key, infer_fn, reason):
    report = run(key, infer_fn)
    failed = np.sum(np.abs(report.x[:, 0]) > 2 if infer_fn is fails_far_out else report.x[:, 0] > 2)
    assert failed > 10
    assert (report.ranks.ranks[:, 0] < 0).sum() == failed == report.posteriors.failed.sum()
    assert reason in report.verdict
    assert f"{failed} data sets NON_FINITE" in report.verdict
    if failed > 30:  # more than the band could hide
        assert not report.passed


def test_resumed_and_repeated(key, tmp_path, count_compiles):
    first = run(key, exact, batch_size=100, checkpoint=pi.Checkpoint(tmp_path / "kept"))
    with count_compiles() as counter:
        again = run(key, exact, batch_size=100, checkpoint=pi.Checkpoint(tmp_path / "kept"))
        other = run(jax.random.key(5), exact, batch_size=100)
    assert counter.count == 0
    np.testing.assert_array_equal(first.ranks.ranks, again.ranks.ranks)
    assert (first.ranks.ranks != other.ranks.ranks).any()


def test_users_quantities_and_references(key):
    report = run(
        key,
        exact,
        quantities={"first": lambda theta, x: theta[0] - x[0]},
        reference=lambda key, x: x / 3,
        level=RARE,
    )
    assert report.passed
    assert "first" in report.pvalues
    free = run(key, the_prior, dense=False, reference=lambda key, x: jnp.zeros(D), level=RARE)
    assert not free.rejected
    assert "no quantity depends on the data" in free.verdict


def test_the_picture(right):
    assert right.plot().lines
    assert str(right) == right.verdict


def test_bad_input(key):
    with pytest.raises(TypeError, match="prior_sample"):
        checks.sbc(key, None, simulate, exact)
    with pytest.raises(TypeError, match="infer_fn must be a function"):
        check_functions(infer_fn=3)
    with pytest.raises(TypeError, match="key"):
        checks.sbc(0, prior_sample, simulate, exact)
    with pytest.raises(ValueError, match="num_simulations must be a whole number"):
        run(key, exact, num=0)
    with pytest.raises(ValueError, match="structure of theta"):
        run(key, lambda key, x: {"a": exact(key, x)}, num=3)
    with pytest.raises(ValueError, match=r"leaves \(L, ...\) or \(chain, L"):
        run(key, lambda key, x: exact(key, x)[0], num=3)
    with pytest.raises(ValueError, match="match"):
        run(key, lambda key, x: exact(key, x)[:, :1], num=3)
    with pytest.raises(ValueError, match="need different names"):
        run(key, exact, num=3, quantities={"tarp": lambda theta, x: theta[0]})
    with pytest.raises(ValueError, match="must be a scalar"):
        run(key, exact, num=3, quantities=[lambda theta, x: theta])
    with pytest.raises(TypeError, match="reference"):
        run(key, exact, num=3, reference=3.0)
    with pytest.raises(ValueError, match="level"):
        run(key, exact, num=3, level=0.7)


# Around the data that were observed.

X_OBSERVED = np.array([1.5, -1.0])


def exact_from_both(key, x_new):
    """theta ~ N(0, I), two observations: N((x + x_new) / 3, I / 3)."""
    mean = (jnp.asarray(X_OBSERVED, x_new.dtype) + x_new) / 3
    return mean + jnp.sqrt(jnp.asarray(1 / 3, x_new.dtype)) * jax.random.normal(key, (L, D))


def biased_by_sign(key, x_new):
    """A bias with the sign of the observed data: over the prior it would cancel."""
    return exact_from_both(key, x_new) + 0.3 * jnp.sign(jnp.asarray(X_OBSERVED, x_new.dtype))


def log_posterior(theta):
    return log_prior(theta) + log_likelihood(theta, jnp.asarray(X_OBSERVED, theta.dtype))


@pytest.fixture(scope="module")
def observed_draws():
    noise = jax.random.normal(jax.random.key(3), (4, 250, D))
    return jnp.asarray(X_OBSERVED, noise.dtype) / 2 + np.sqrt(0.5).astype(noise.dtype) * noise


@pytest.mark.slow
@pytest.mark.f32(slow=True)
def test_around_the_data(key, observed_draws):
    densities = {"log_posterior_fn": log_posterior, "log_likelihood_fn": log_likelihood}
    good = checks.posterior_sbc(key, observed_draws, simulate, exact_from_both, level=RARE, **densities)
    assert "measured against the exact update of the initial draws" in good.verdict
    assert good.passed, good.verdict
    assert 300 < len(good.theta) <= 500  # half of the effective sample size
    known = np.asarray(observed_draws).reshape(-1, D)
    assert np.isin(good.theta[:, 0], known[:, 0]).all()
    assert len(np.unique(good.theta[:, 0])) == len(good.theta)
    bad = checks.posterior_sbc(key, observed_draws, simulate, biased_by_sign, num_simulations=400)
    assert {"value[0]", "value[1]"} <= set(bad.rejected)


def test_biases_that_cancel_over_the_prior(key):
    """SBC of the parameters alone passes, the joint density detects it; a false pass has probability below 1e-6."""
    report = run(key, shifted, num=400)
    assert "log_joint" in report.rejected or "log_likelihood" in report.rejected


def test_bad_draws(key, observed_draws):
    with pytest.raises(ValueError, match=r"\(chain, draw"):
        checks.posterior_sbc(key, observed_draws[0, 0], simulate, exact_from_both)
    with pytest.raises(ValueError, match="NaN or infinite"):
        checks.posterior_sbc(key, observed_draws * jnp.nan, simulate, exact_from_both)
    with pytest.raises(ValueError, match="independent draws"):
        checks.posterior_sbc(key, observed_draws, simulate, exact_from_both, num_simulations=5000)
    with pytest.raises(ValueError, match="num_simulations"):
        checks.posterior_sbc(key, observed_draws, simulate, exact_from_both, num_simulations=0)
    with pytest.raises(TypeError, match="simulate"):
        checks.posterior_sbc(key, observed_draws, None, exact_from_both)


@pytest.mark.slow
def test_few_draws_are_taken_as_they_are(key, observed_draws):
    report = checks.posterior_sbc(
        key,
        observed_draws[:, :3],
        simulate,
        exact_from_both,
        num_simulations=12,
        num_projections=0,
        level=RARE,
    )
    assert report.passed is None  # twelve simulations cannot tell
    assert sorted(report.theta[:, 0]) == sorted(np.asarray(observed_draws[:, :3, 0]).ravel())
