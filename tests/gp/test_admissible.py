"""Bounds of evidences, and the choice of the end of a search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

from probinfer import gp
from probinfer.core.errors import ConvergenceWarning
from probinfer.core.status import Status
from probinfer.gp.approximation.admissible import evidence_status, largest_log_evidence
from probinfer.gp.approximation.conditioning import SiteSolutions
from probinfer.gp.approximation.fixed_point import FixedPoint
from probinfer.gp.hyperparameters.verification import verify_ends
from probinfer.vi import MAPInfo
from tests.reference.likelihoods import LOG_DENSITIES

COUNTS = np.array([0.0, 1, 17, 10_000])


def known_exposure(y, f, log_exposure):
    f = f + log_exposure
    return y * f - jnp.exp(f) - jax.scipy.special.gammaln(y + 1)


def custom_likelihood(**settings):
    return gp.likelihoods.FromLogDensity(
        known_exposure, {"log_exposure": np.log([1.0, 10, 100, 1000])}, **settings
    )


def bound(likelihood, y):
    y = jnp.asarray(y)
    return float(jax.jit(largest_log_evidence)(likelihood, y, jnp.zeros_like(y), jnp.ones_like(y)))


def test_no_evidence_is_above_the_largest_density():
    """The mean of Π p(y | f) is at most Π sup p: the supremum of concave densities is computed, that of masses is 1."""
    positive = COUNTS[1:]
    wanted = np.sum(positive * np.log(positive) - positive - special.gammaln(positive + 1))
    np.testing.assert_allclose(bound(custom_likelihood(concave=True), COUNTS), wanted, rtol=1e-9)
    np.testing.assert_allclose(
        bound(gp.likelihoods.Gaussian(0.3), [5.0, -40.0]), -np.log(2 * np.pi * 0.3), rtol=1e-9
    )
    for likelihood in (
        gp.likelihoods.Poisson(),
        gp.likelihoods.NegativeBinomial(),
        custom_likelihood(discrete=True),
    ):
        assert bound(likelihood, COUNTS) == 0
    assert bound(gp.likelihoods.Bernoulli("logit"), COUNTS[:2]) == 0
    student = gp.likelihoods.StudentT(0.02, 0.7)  # not log-concave, but with a peak
    np.testing.assert_allclose(bound(student, COUNTS), 4 * (stats.t.logpdf(0, 0.7) - np.log(0.02)), rtol=1e-9)
    assert bound(custom_likelihood(), COUNTS) == np.inf


@pytest.mark.f32
@pytest.mark.parametrize(
    ("energy", "limit", "residual", "status"),
    [
        (-3.0, 0.0, 1e-9, Status.OK),
        (-3.0, np.inf, 1e-9, Status.OK),
        (-3.0, 0.0, 0.3, Status.MAX_ITERATIONS),
        (2.6e30, 0.0, 1e-9, Status.POOR_APPROXIMATION),
        (1e-3, 0.0, 1e-9, Status.POOR_APPROXIMATION),
        (-246.0, -300.0, 1e-9, Status.POOR_APPROXIMATION),
        (1e-14, 0.0, 1e-9, Status.OK),
        (np.nan, 0.0, 1e-9, Status.NON_FINITE),
        (-3.0, 0.0, np.inf, Status.MAX_ITERATIONS),
    ],
)
def test_which_energies_are_evidences(energy, limit, residual, status, dtype):
    if dtype == jnp.float32 and energy == 1e-3:
        energy = 0.1
    energy, limit, residual = (jnp.asarray(value, dtype) for value in (energy, limit, residual))
    fixed_point = FixedPoint(None, residual, None, None)
    assert evidence_status(energy, limit, fixed_point) == status


def test_an_energy_above_every_evidence_is_none():
    """Wrong masses: counts whose log density, declared discrete, is 10 nats too large."""

    def too_large(y, f):
        return y * f - jnp.exp(f) - jax.scipy.special.gammaln(y + 1) + 10.0

    X, y = np.linspace(-1, 1, 4)[:, None], np.array([2.0, 0, 3, 1])
    likelihood = gp.likelihoods.FromLogDensity(too_large, concave=True, discrete=True)
    conditioned = gp.condition(gp.Model(gp.kernels.RBF(), likelihood), X, y, gp.Laplace())
    assert conditioned.status == Status.POOR_APPROXIMATION
    assert np.isnan(conditioned.log_evidence)
    assert np.isfinite(conditioned.mean).all()


OK, MISSED, OFF, STALLED = (
    Status.OK,
    Status.MAX_ITERATIONS,
    Status.POOR_APPROXIMATION,
    Status.LINE_SEARCH_STALLED,
)


@pytest.mark.parametrize(
    ("values", "searches", "fresh", "warm", "best", "status"),
    [
        # the highest verified end
        ([-3.0, -2.0, -9.0], [OK] * 3, ([-3.0, -2.0, -9.0], [OK] * 3), ([-3.0, -2.0, -9.0], [OK] * 3), 1, OK),
        # far above all others, but not converged where it started, or from scratch
        ([9e57, -2.0, -9.0], [OK] * 3, ([np.nan, -2.0, -9.0], [MISSED, OK, OK]), ([9e57, -2.0, -9.0], [OK] * 3), 1, OK),
        ([9e57, -2.0, -9.0], [OK] * 3, ([9e57, -2.0, -9.0], [OK] * 3), ([np.nan, -2.0, -9.0], [MISSED, OK, OK]), 1, OK),
        # two fixed points
        ([-1.0, -2.0, -9.0], [OK] * 3, ([-1.5, -2.0, -9.0], [OK] * 3), ([-1.0, -2.0, -9.0], [OK] * 3), 1, OK),
        # no end is verified: the best with its status
        ([-1.0, -2.0, -9.0], [OK] * 3, ([-1.5, -2.1, -9.1], [OK] * 3), ([-1.0, -2.0, -9.0], [OK] * 3), 0, OFF),
        # a search that did not converge is not replaced by a lower one that did, unless they tie
        ([-1.0, -2.0, -9.0], [STALLED, OK, OK], ([-1.0, -2.0, -9.0], [OK] * 3), ([-1.0, -2, -9], [OK] * 3), 0, STALLED),
        ([-2.0, -2.0, -9.0], [STALLED, OK, OK], ([-2.0, -2.0, -9.0], [OK] * 3), ([-2.0, -2.0, -9.0], [OK] * 3), 1, OK),
    ],
)  # fmt: skip
def test_the_best_end_is_one_that_was_verified(values, searches, fresh, warm, best, status):
    both = [jnp.asarray(np.concatenate(pair)) for pair in zip(fresh, warm, strict=True)]
    solutions = SiteSolutions(jnp.arange(6.0), both[0], both[1].astype(jnp.int32))
    values = jnp.asarray(values)
    info = MAPInfo(
        values[0], values, jnp.asarray(searches), None, 0, None, 0, values[0], positions=jnp.arange(3.0)
    )
    got = verify_ends(info, lambda positions: 10 * positions, lambda models, fresh: solutions)
    assert int(got.info.best) == best
    assert Status(int(got.info.status)) == status
    assert got.models == 10.0 * best
    assert got.solutions.sites == 3.0 + best  # those of the warm start
    assert got.info.log_density == values[best] == got.info.log_likelihood


def test_an_end_that_is_missed_from_scratch_counts_where_evidences_are_bounded():
    fresh, warm = [np.nan, -2.0, -9.0], [-1.0, -2.0, -9.0]
    for bounded, scratch, best in ((True, fresh, 0), (False, fresh, 1), (True, [-1.5, -2.0, -9.0], 1)):
        missed = [MISSED if np.isnan(value) else OK for value in scratch]
        statuses = jnp.asarray([*missed, OK, OK, OK], jnp.int32)
        solutions = SiteSolutions(jnp.arange(6.0), jnp.asarray([*scratch, *warm]), statuses)
        values = jnp.asarray(warm)
        info = MAPInfo(
            values[0], values, jnp.zeros(3, jnp.int32), None, 0, None, 0, positions=jnp.arange(3.0)
        )
        got = verify_ends(info, lambda positions: positions, lambda m, f, s=solutions: s, bounded=bounded)
        assert int(got.info.best) == best
        assert int(got.info.status) == OK


@pytest.mark.slow
@pytest.mark.parametrize(
    "inference", [gp.Laplace(), gp.EP(), gp.VI(), gp.Hybrid()], ids=lambda i: type(i).__name__
)
def test_unmodeled_exposures_end_at_an_evidence(inference):
    """Forty counts up to 223 with exposures that the model ignores, where a wrong energy is as large as 4e50."""
    rng = np.random.default_rng(0)
    x = np.linspace(0, 10, 40)[:, None]
    y = 1.0 * rng.poisson(rng.uniform(1, 100, 40) * np.exp(np.sin(x[:, 0])))
    model = gp.Model(gp.kernels.RBF(), gp.likelihoods.Poisson())
    fit = gp.fit(jax.random.key(0), model, x, y, inference=inference, progress=False)
    np.testing.assert_allclose(fit.log_evidence, -246.7, atol=0.3)
    conditioned = gp.condition(fit.model, fit.X, fit.y, inference)
    assert conditioned.status == Status.OK
    np.testing.assert_allclose(conditioned.log_evidence, fit.log_evidence, rtol=1e-6)
    np.testing.assert_allclose(fit.predict_y(x).mean, y, rtol=0.25, atol=2)


@pytest.mark.slow
def test_exposures_of_an_own_likelihood():
    """Exposures from 1 to 1000 in a custom log density, where a wrong energy is as large as 2.6e120."""
    rng = np.random.default_rng(1)
    x = np.linspace(0, 10, 24)[:, None]
    exposure = 10 ** rng.uniform(0, 3, 24)
    y = 1.0 * rng.poisson(exposure * np.exp(np.sin(x[:, 0])))
    likelihood = gp.likelihoods.FromLogDensity(
        known_exposure, {"log_exposure": np.log(exposure)}, concave=True, discrete=True
    )
    model = gp.Model(gp.kernels.RBF(), likelihood)
    prior = gp.replace(gp.default_prior(model, x), {"likelihood.params.log_exposure": gp.fixed})
    fit = gp.fit(jax.random.key(0), model, x, y, prior=prior, standardize=True, progress=False)
    assert fit.info.status == Status.OK
    poisson = LOG_DENSITIES["poisson"]
    assert fit.log_evidence < sum(poisson(n, np.log(max(n, 1e-9))) for n in y)
    np.testing.assert_allclose(fit.predict(x)[0], np.sin(x[:, 0]), atol=0.5)


def test_laplaces_evidence_has_no_bound_where_a_mode_vanishes():
    """One output 6 under Student-t noise: by the mode m the kernel's variance is v = m (ν s² + r²) / ((ν + 1) r).

    dv/dm = 0 is where the mode vanishes; there the curvature 1/v + W is zero, the formula's evidence infinite.
    """
    y, scale, df = 6.0, 0.5, 4.0

    def at(m):
        r = y - m
        variance = m * (df * scale**2 + r**2) / ((df + 1) * r)
        shrunk = 1 + variance * (df + 1) * (df * scale**2 - r**2) / (df * scale**2 + r**2) ** 2
        density = stats.t.logpdf(r / scale, df) - np.log(scale)
        return variance, shrunk, density - m * m / (2 * variance) - 0.5 * np.log(np.abs(shrunk))

    def exact(variance):
        def joint(f):
            return stats.t.pdf((y - f) / scale, df) / scale * stats.norm.pdf(f, 0, variance**0.5)

        return np.log(integrate.quad(joint, -40, 40, points=[0, y], limit=400)[0])

    fold = optimize.brentq(lambda m: at(m)[1], 1.0, 3.9, xtol=1e-13)
    assert at(fold - 1e-9)[2] > exact(at(fold)[0]) + 8  # nats; unbounded towards the fold
    X, outputs, verdicts = jnp.zeros((1, 1)), jnp.array([y]), []
    for mode in (0.5, 1.5, 2.0, fold - 0.3, fold - 0.01, fold - 1e-4):
        variance, shrunk, formula = at(mode)
        model = gp.Model(gp.kernels.RBF(variance=variance), gp.likelihoods.StudentT(scale, df))
        conditioned = gp.condition(model, X, outputs, gp.Laplace())
        np.testing.assert_allclose(conditioned.mean[0], mode, rtol=1e-4)
        verdicts.append(int(conditioned.status))
        if shrunk > 0.25:
            np.testing.assert_allclose(conditioned.log_evidence, formula, rtol=1e-7)
            assert conditioned.status == Status.OK
            assert formula < exact(variance) + np.log(2)
        else:
            assert np.isnan(conditioned.log_evidence)
            assert conditioned.status == Status.POOR_APPROXIMATION
    assert len(set(verdicts)) == 2


@pytest.mark.slow
def test_a_search_that_modes_stop_says_so():
    """Three outliers at a thousand noise scales: searches of Laplace's evidence stall, and a warning explains it."""
    rng = np.random.default_rng([1, 3])
    X = np.linspace(0, 10, 24)[:, None]
    K = np.exp(-0.5 * ((X - X.T) / rng.uniform(1, 3)) ** 2)
    y = np.linalg.cholesky(K + 1e-8 * np.eye(24)) @ rng.normal(size=24) + 0.1 * rng.standard_t(4, 24)
    where = rng.choice(24, 3, replace=False)
    y[where] += rng.choice([-1, 1], 3) * 100 * rng.uniform(0.5, 2, 3)
    model = gp.Model(gp.kernels.RBF(), gp.likelihoods.StudentT())
    with pytest.warns(ConvergenceWarning, match=r"jumps from one mode.*use gp\.VI\(\)"):
        fit = gp.fit(jax.random.key(1), model, X, y, inference=gp.Laplace())
    assert fit.info.status != Status.OK
