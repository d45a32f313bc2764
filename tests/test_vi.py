"""One density function serves most tests, so that they share compiled programs: its arrays are data."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

from probinfer import targets, vi
from probinfer.core.errors import ConvergenceWarning
from probinfer.core.status import Status
from probinfer.vi import gaussian, point
from tests.params import quick

LOC = np.array([3.0, -20.0, 500.0])
ROOT = np.array([[1.0, 0, 0], [6.0, 8.0, 0], [-30.0, 40.0, 70.0]])
COVARIANCE = ROOT @ ROOT.T
PRECISION = np.linalg.inv(COVARIANCE)
LOG_NORMALIZER = 0.5 * np.linalg.slogdet(2 * np.pi * COVARIANCE)[1]


def skewed_normal(loc, precision, skew, box, values):
    """A normal density; ``skew`` makes one coordinate skewed, outside the box it is zero."""
    offset = values - loc
    log_p = -0.5 * offset @ precision @ offset - skew * (jnp.exp(offset[0]) - offset[0])
    return jnp.where(jnp.max(jnp.abs(offset)) < box, log_p, -jnp.inf)


def make_target(skew=0.0, loc=LOC, precision=PRECISION, box=jnp.inf):
    arrays = [jnp.asarray(x, jnp.result_type(float)) for x in (loc, precision, skew, box)]
    return targets.from_logdensity(targets.LogDensity(skewed_normal, *arrays), jnp.zeros(3))


@pytest.fixture(scope="module")
def mean_field():
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # weights may not correct the correlations, and a warning says so
        return vi.MeanField().sample(jax.random.key(0), make_target(), progress=False)


@pytest.fixture(scope="module")
def full_rank():
    return vi.FullRank().sample(jax.random.key(0), make_target(), progress=False)


@pytest.mark.f32
def test_mean_field_of_a_normal_is_the_closed_form(mean_field, dtype):
    # mean exact, variances 1 / precision_ii, bound log Z - KL with KL = sum log(sd_i sqrt(P_ii)) for the rest
    info = mean_field.info
    tolerance = 1e-4 if dtype == jnp.float64 else 2e-2
    sd = 1 / np.sqrt(np.diag(PRECISION))
    np.testing.assert_allclose((np.asarray(info.loc, float) - LOC) / sd, 0, atol=tolerance)
    np.testing.assert_allclose(np.asarray(info.scale, float) / sd, 1, rtol=tolerance)
    bound = LOG_NORMALIZER + 0.5 * (np.linalg.slogdet(PRECISION)[1] - np.log(np.diag(PRECISION)).sum())
    # 1000 fresh draws, 4.5 standard errors: fails by chance 1 time in 100 000
    assert abs(float(info.elbo) - bound) < 4.5 * float(info.elbo_standard_error)


def test_full_rank_of_a_normal_is_the_normal(full_rank):
    info = full_rank.info
    tolerance = 1e-4
    sd = np.sqrt(np.diag(COVARIANCE))
    covariance = np.asarray(info.scale, float) @ np.asarray(info.scale, float).T
    np.testing.assert_allclose((np.asarray(info.loc, float) - LOC) / sd, 0, atol=tolerance)
    np.testing.assert_allclose(covariance / np.outer(sd, sd), COVARIANCE / np.outer(sd, sd), atol=tolerance)
    np.testing.assert_allclose(float(info.elbo), LOG_NORMALIZER, atol=tolerance)
    assert np.array_equal(info.scale, np.tril(info.scale))
    assert np.all(np.diag(info.scale) > 0)
    assert info.status == Status.OK


def test_posterior_of_a_fit(full_rank):
    assert full_rank.draws.shape == (1, 1000, 3)
    assert full_rank.log_weights.shape == (1, 1000)
    assert full_rank.log_evidence is None
    # of the widened distribution: never worth less than half, by the mixture; 0.93 measured
    assert 1 / np.sum(np.exp(2 * full_rank.flat_log_weights())) > 850
    # z-tests of three means at 4.5 standard errors of 850 independent draws: 1 in 50 000
    z = (np.asarray(full_rank.expectation(lambda x: x)) - LOC) / np.sqrt(np.diag(COVARIANCE) / 850)
    assert np.all(np.abs(z) < 4.5)


def test_draws_that_weights_cannot_correct_have_none():
    """A narrow ridge along the diagonal: draws of the best independent normal see little of its length."""
    ridge = np.linalg.inv(np.full((3, 3), 0.999) + 0.001 * np.eye(3))
    with pytest.warns(ConvergenceWarning, match=r"MeanField: .*(k-hat is|miss the identity).*NUTS"):
        posterior = vi.MeanField().sample(jax.random.key(0), make_target(precision=ridge), progress=False)
    assert posterior.info.status == Status.POOR_APPROXIMATION
    assert posterior.log_weights is None
    # the draws are the Gaussian's: three z-tests at 4.5 standard errors, 1 in 50 000
    error = np.asarray(posterior.info.scale) / np.sqrt(1000)
    assert np.all(np.abs(np.mean(posterior.draws[0], axis=0) - posterior.info.loc) < 4.5 * error)


def first_moments(skew, precision):
    """Mean and standard deviation of the skewed coordinate, less its location, if it is independent of the others."""
    grid = np.linspace(-60, 12, 200_001)
    log_p = -0.5 * precision * grid**2 - skew * (np.exp(grid) - grid)
    mass = np.exp(log_p - log_p.max())
    mass /= mass.sum()
    mean = mass @ grid
    return mean, np.sqrt(mass @ (grid - mean) ** 2)


@pytest.mark.parametrize("engine", quick([vi.MeanField, vi.FullRank], vi.FullRank))
def test_weights_correct_the_tail_that_the_normal_lacks(engine):
    """A tail longer than the normal's: mean off by 0.1 and scale by a quarter of a standard deviation.

    Weighted moments of 20 000 draws lie within 4.5 of their standard errors: 1 in 30 000 for the four of both engines.
    """
    target = make_target(skew=0.03, precision=np.diag([0.02, 1.0, 1.0]))
    mean, sd = first_moments(0.03, 0.02)
    posterior = engine(num_draws=20_000).sample(jax.random.key(1), target, progress=False)
    info = posterior.info
    assert info.status == Status.OK
    assert float(info.khat) < 0.7
    # What the Gaussian itself would be wrong by: 0.07 or more over 200 keys, five of the errors below.
    off, narrow = (float(info.loc[0]) - LOC[0] - mean) / sd, float(np.ravel(info.scale)[0]) / sd
    assert max(abs(off), abs(narrow**2 + off**2 - 1)) > 0.04
    weights = np.exp(np.asarray(posterior.flat_log_weights(), float))
    z = (np.asarray(posterior.draws[0, :, 0], float) - LOC[0] - mean) / sd
    for value in (z, z**2 - 1):
        assert abs(weights @ value) < 4.5 * np.sqrt(np.sum((weights * value) ** 2))
    table = posterior.summary()[posterior.summary().names[0]]
    np.testing.assert_allclose(table["mean"], LOC[0] + mean, atol=0.1 * sd)


@pytest.mark.slow
@pytest.mark.f32(slow=True)
@pytest.mark.parametrize("full", [False, True])
def test_the_widened_density_is_that_of_its_draws(full, dtype):
    """The density is that of the formula, r is at least q/2, and E_r[q/r] = 1 for 4000 draws at 4.5 standard errors."""
    scale = jnp.asarray(ROOT if full else [1.0, 8.0, 70.0], dtype)
    q = gaussian.VariationalGaussian(jnp.asarray(LOC, dtype), scale)
    narrow = gaussian.draw(q, jax.random.key(0), 4000)
    wide = gaussian.widened(q, jax.random.key(1), narrow)
    root = np.asarray(scale if full else np.diag(scale), float)
    sd = np.sqrt(np.sum(root**2, axis=1))
    for draws, sign in ((narrow, 1), (wide, -1)):
        table = np.asarray(draws, float)
        log_q = scipy.stats.multivariate_normal(LOC, root @ root.T).logpdf(table)
        z = (table - LOC) / sd
        ratios = np.exp(scipy.stats.t(4, scale=1.5).logpdf(z) - scipy.stats.norm.logpdf(z))
        log_r = log_q + np.log(0.5 + 0.5 * np.mean(ratios, axis=1))
        tolerance = 1e-8 if dtype == jnp.float64 else 5e-3
        np.testing.assert_allclose(gaussian.log_widened(q, draws), log_r, rtol=tolerance, atol=tolerance)
        ratio = np.exp(sign * (log_r - log_q))
        if sign < 0:
            assert np.all(ratio <= 2 + tolerance)
            assert abs(np.mean(ratio) - 1) < 4.5 * np.std(ratio) / np.sqrt(4000)


def test_skewed_target_bound_is_below_the_evidence_and_full_rank_is_tighter():
    target = make_target(skew=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        full_rank = vi.FullRank().sample(jax.random.key(0), target, progress=False).info
        mean_field = vi.MeanField().sample(jax.random.key(0), target, progress=False).info
    # the skew acts on the first coordinate alone; given it the others are normal with the conditional covariance
    grid = np.linspace(-12, 8, 20001)
    log_p = -0.5 * grid**2 / COVARIANCE[0, 0] - 2.0 * (np.exp(grid) - grid)
    rest = COVARIANCE[1:, 1:] - np.outer(COVARIANCE[1:, 0], COVARIANCE[1:, 0]) / COVARIANCE[0, 0]
    log_evidence = (
        np.log(np.exp(log_p).sum() * (grid[1] - grid[0])) + 0.5 * np.linalg.slogdet(2 * np.pi * rest)[1]
    )
    assert float(full_rank.elbo) < log_evidence + 4.5 * float(full_rank.elbo_standard_error)
    # a skewed coordinate costs a normal little
    assert float(full_rank.elbo) > log_evidence - 0.1
    assert float(mean_field.elbo) < float(full_rank.elbo) - 0.15  # .33 over keys, sd .03
    assert bool(jnp.isfinite(full_rank.khat))
    assert float(full_rank.gap) < 0.2


def test_new_data_compile_nothing(mean_field, count_compiles):
    other = make_target(loc=2 * LOC, precision=3 * PRECISION)
    with count_compiles() as compiles, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = vi.MeanField().sample(jax.random.key(1), other, progress=False)
    assert compiles.count == 0
    np.testing.assert_allclose(fitted.info.loc, 2 * LOC, rtol=1e-4)


@pytest.mark.f32
@pytest.mark.parametrize("full", [False, True])
def test_bound_and_gradient_are_those_of_the_formula(full, dtype):
    sample = jnp.asarray(gaussian.base_sample(3, 3, 16, 32), dtype)
    scale = jnp.asarray(ROOT if full else [1.0, 8.0, 70.0], dtype)
    q = gaussian.VariationalGaussian(jnp.asarray(LOC, dtype), scale)
    update = gaussian.GaussianUpdate(
        jnp.asarray([0.1, -0.2, 0.3], dtype), jnp.asarray([0.2, 0, -0.1], dtype), jnp.zeros(3 * full)
    )
    update = update._replace(lower=jnp.asarray([0.3, -0.1, 0.2], dtype)) if full else update
    logdensity_fn = make_target(skew=1.0).logdensity_fn

    def by_hand(update):
        triangle = jnp.diag(jnp.exp(update.log_diagonal))
        if full:
            triangle = triangle.at[np.tril_indices(3, -1)].set(update.lower)
        root = (scale if full else jnp.diag(scale)) @ triangle
        points = q.loc + (scale @ update.shift if full else scale * update.shift) + sample[:12] @ root.T
        entropy = 0.5 * jnp.linalg.slogdet(2 * jnp.pi * jnp.e * root @ root.T)[1]
        return -(jnp.mean(jax.vmap(logdensity_fn)(points)) + entropy)

    expected = jax.jit(jax.value_and_grad(by_hand))(update)
    tolerance = 1e-9 if dtype == jnp.float64 else 2e-3
    for block in (1, 8):
        actual = jax.jit(jax.value_and_grad(gaussian.negative_bound, argnums=5), static_argnames="block")(
            q, logdensity_fn, jnp.zeros(3, dtype), sample, jnp.asarray(12), update, block=block
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected
        )


def test_base_sample_has_exact_moments():
    sample = gaussian.base_sample(0, 4, 32, 64)
    np.testing.assert_allclose(sample[:32].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(sample[:32].T @ sample[:32] / 32, np.eye(4), atol=1e-12)
    assert not sample[32:].any()
    few = gaussian.base_sample(0, 20, 16, 16)
    np.testing.assert_allclose((few**2).mean(0), 1, atol=1e-12)
    assert not np.array_equal(few, gaussian.base_sample(1, 20, 16, 16))


def gamma_density(shape, rate, values):
    return jnp.sum((shape - 1) * jnp.log(values["x"]) - rate * values["x"])


def gamma_target(shape):
    dtype = jnp.result_type(float)
    logdensity_fn = targets.LogDensity(
        gamma_density, jnp.asarray(shape, dtype), jnp.asarray([2.0, 5.0], dtype)
    )
    return targets.from_logdensity(logdensity_fn, {"x": jnp.ones(2)}, {"x": dist.constraints.positive})


@pytest.mark.parametrize("jacobian", [pytest.param(False, marks=pytest.mark.f32), True])
def test_mode_with_and_without_the_jacobian(jacobian):
    # Gamma(a, b): the density of x has its mode at (a - 1) / b, that of log x at a / b with variance 1 / a
    shape = np.array([3.0, 4.0])
    engine = vi.MAP(jacobian=jacobian, covariance=True)
    posterior = engine.sample(jax.random.key(0), gamma_target(shape), progress=False)
    mode = (shape - (not jacobian)) / np.array([2.0, 5.0])
    np.testing.assert_allclose(posterior.draws["x"][0, 0], mode, rtol=1e-3)
    np.testing.assert_allclose(np.diag(posterior.info.covariance), 1 / (shape - (not jacobian)), rtol=5e-3)
    assert posterior.draws["x"].shape == (1, 1, 2)
    assert posterior.info.status == Status.OK
    assert posterior.info.values.shape == (4,)
    np.testing.assert_allclose(posterior.info.log_density, posterior.info.values.max())


def two_modes(values):
    return jnp.logaddexp(-0.5 * jnp.sum((values - 4) ** 2), 2 - 0.5 * jnp.sum((values + 4) ** 2))


def test_the_best_of_several_restarts_is_returned():
    starts = jnp.asarray([[5.0], [-5.0], [4.5]])
    position, info = vi.maximize(two_modes, starts)
    np.testing.assert_allclose(position, [-4.0], atol=1e-5)
    assert int(info.best) == 1
    np.testing.assert_allclose(info.values, [0, 2, 0], atol=1e-6)


def test_mode_search_reports_failure():
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        posterior = vi.MAP(max_steps=1).sample(jax.random.key(0), gamma_target([3.0, 4.0]), progress=False)
    assert posterior.info.status == Status.MAX_ITERATIONS
    _, info = vi.maximize(two_modes, jnp.full((2, 1), jnp.nan))
    assert info.status == Status.NON_FINITE


def test_of_restarts_that_tie_one_that_converged_is_returned():
    """A search that stalled within rounding error of one that converged is no reason to distrust the maximum."""
    values, stalled = jnp.asarray([-184.0, -184.000001, -184.1, -jnp.inf]), Status.LINE_SEARCH_STALLED
    assert point._best_restart(values, jnp.asarray([stalled, Status.OK, Status.OK, Status.OK]), 1.5e-7) == 1
    assert point._best_restart(values, jnp.asarray([stalled, stalled, Status.OK, Status.OK]), 1.5e-7) == 0
    assert point._best_restart(values, jnp.asarray([Status.OK] * 4), 1.5e-7) == 0


def test_walls_are_met_with_a_smaller_scale_and_reported():
    # The fit touches the walls with its outermost points. Fresh draws fall outside, or none does and the bound is that
    # of points inside: the search has not converged, since a wider normal is better up to the wall.
    target = make_target(loc=np.zeros(3), precision=1e-6 * np.eye(3), box=1.5)
    with pytest.warns(ConvergenceWarning, match=r"exceeds the fresh bound|k-hat|identity"):
        posterior = vi.MeanField().sample(jax.random.key(0), target, progress=False)
    assert posterior.info.status != Status.OK
    assert bool(jnp.all(jnp.isfinite(posterior.draws)))


@pytest.mark.parametrize("engine", [vi.MeanField, vi.FullRank])
def test_impossible_settings_are_refused(engine):
    with pytest.raises(TypeError, match="num_draws"):
        engine(num_draws=1e3)
    for settings in ({"num_draws": 0}, {"max_samples": 4}):
        with pytest.raises(ValueError, match="expected num_draws"):
            engine(**settings)
    with pytest.raises(ValueError, match="mode must be"):
        engine(mode="pmap")
    with pytest.raises(ValueError, match="num_restarts"):
        vi.MAP(num_restarts=0)
