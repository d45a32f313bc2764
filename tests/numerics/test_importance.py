from functools import partial

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.core.status import Status
from probinfer.numerics import importance, weights
from tests.reference import pareto as oracle

_RNG = np.random.default_rng(7)
CASES = {
    "light": 0.3 * _RNG.normal(size=400),
    "heavy": 2.0 * _RNG.normal(size=400),
    "no mean": 1.5 * _RNG.exponential(size=400),
    "bounded": _RNG.random(400),
    "mostly zero": np.where(_RNG.random(400) < 0.92, -np.inf, _RNG.normal(size=400)),
    "offset": 2.0 * _RNG.normal(size=400) - 2000,
    "smallest": _RNG.normal(size=21),
    "too few": _RNG.normal(size=20),
}


def arviz_psis(log_ratios):
    """ArviZ's answer where it has the function (below 1.0), else the oracle's."""
    return arviz.psislw(log_ratios.copy()) if hasattr(arviz, "psislw") else oracle.psis(log_ratios)


@pytest.mark.f32
@pytest.mark.parametrize("name", CASES)
def test_smoothed_weights_and_shape(name, dtype):
    log_ratios = np.asarray(jnp.asarray(CASES[name], dtype), float)
    found = importance.psis(jnp.asarray(log_ratios, dtype))
    assert found.log_weights.dtype == found.khat.dtype == dtype
    for log_weights, khat in (oracle.psis(log_ratios), arviz_psis(log_ratios)):
        np.testing.assert_allclose(found.khat, khat, rtol=1e-9 if dtype == jnp.float64 else 2e-3)
        precision = 1e-10 if dtype == jnp.float64 else 2e-5
        np.testing.assert_allclose(np.exp(found.log_weights), np.exp(log_weights), atol=precision)


def test_ties_are_smoothed_as_a_set(dtype):
    log_ratios = np.round(np.random.default_rng(1).normal(size=500))
    found = np.sort(importance.psis(jnp.asarray(log_ratios, dtype)).log_weights)
    np.testing.assert_allclose(
        found, np.sort(oracle.psis(log_ratios)[0]), atol=1e-9 if dtype == jnp.float64 else 1e-4
    )


def test_equal_ratios_have_nothing_to_smooth(dtype):
    found = importance.psis(jnp.full(400, 3.0, dtype))
    assert found.khat == jnp.inf
    np.testing.assert_allclose(found.log_weights, -np.log(400), rtol=1e-6)


@pytest.mark.parametrize("shape", [0.3, 0.6, 0.9])
def test_khat_finds_the_shape_of_a_pareto_tail(shape, dtype):
    # ratios u^-k have a tail of shape k. The estimate from m = 190 tail draws has a standard deviation of about
    # (1 + k) / sqrt(m) <= 0.14 and is pulled to 0.5 by at most 0.02: 5 sigma, false-fail rate 6e-7 a case
    uniform = jax.random.uniform(jax.random.key(int(10 * shape)), (4000,), dtype, minval=1e-6)
    khat = importance.psis(-shape * jnp.log(uniform)).khat
    assert abs(khat - shape) < 5 * (1 + shape) / np.sqrt(190) + 0.02


def test_correlated_draws_widen_the_tail(dtype):
    log_ratios = jnp.asarray(CASES["heavy"], dtype)
    wide = importance.psis(log_ratios, relative_ess=0.2).khat
    assert jnp.isfinite(wide)
    assert wide != importance.psis(log_ratios).khat


@pytest.mark.parametrize("size", [20, 400])
def test_failed_ratios_show(size, dtype):
    for bad in (jnp.nan, jnp.inf):
        found = importance.psis(jnp.zeros(size, dtype).at[1].set(bad))
        assert jnp.isnan(found.khat)
        assert jnp.all(jnp.isnan(found.log_weights))
    empty = importance.psis(jnp.full(size, -jnp.inf, dtype))
    assert jnp.all(empty.log_weights == -jnp.inf)
    assert empty.khat == jnp.inf


def test_thresholds_are_the_published_ones():
    found = [importance.khat_threshold(n) for n in (100, 1000, 2200, 10**6)]
    np.testing.assert_allclose(found, [0.5, 2 / 3, 0.7, 0.7], atol=1e-3)


def gaussian_log_ratios(key, num, dtype):
    """Draws of N(0, 1.5^2) for the unnormalized density exp(4 - (x - 0.5)^2 / 2)."""
    x = 1.5 * jax.random.normal(key, (num,), dtype)
    log_q = -0.5 * (x / 1.5) ** 2 - jnp.log(1.5 * jnp.sqrt(2 * jnp.pi)).astype(dtype)
    return 4 - 0.5 * (x - 0.5) ** 2 - log_q


def test_evidence_of_a_gaussian_within_its_standard_error(dtype):
    # 300 estimates: their z-scores are close to standard normal, so the mean square is 1 +- sqrt(2 / 300) and the
    # mean 0 +- 1 / sqrt(300); 5.5 sigma, false-fail rate 1e-7
    keys = jax.random.split(jax.random.key(0), 300)
    log_ratios = jax.vmap(lambda k: gaussian_log_ratios(k, 1000, dtype))(keys)
    found = jax.vmap(importance.evidence)(log_ratios)
    z = (found.log_evidence - (4 + 0.5 * np.log(2 * np.pi))) / found.standard_error
    assert abs(np.mean(z)) < 5.5 / np.sqrt(300)
    assert abs(np.mean(z**2) - 1) < 5.5 * np.sqrt(2 / 300)
    assert jnp.all(found.status == Status.OK)
    assert jnp.all(found.khat < importance.khat_threshold(1000))


@pytest.mark.f32
def test_evidence_agrees_with_the_plain_formulas(dtype):
    log_ratios = jnp.asarray(CASES["heavy"], dtype)
    found = importance.evidence(log_ratios)
    ratios = np.exp(CASES["heavy"])
    np.testing.assert_allclose(found.log_evidence, np.log(ratios.mean()), rtol=1e-5)
    error = ratios.std(ddof=1) / ratios.mean() / np.sqrt(len(ratios))
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-4)
    assert found.ess == weights.ess(log_ratios)
    assert found.khat == importance.psis(log_ratios).khat


def test_a_perfect_proposal_has_no_error(dtype):
    found = importance.evidence(jnp.full(50, -2.5, dtype))
    np.testing.assert_allclose(found.log_evidence, -2.5, rtol=1e-6)
    np.testing.assert_allclose(found.standard_error, 0, atol=1e-3)


def test_evidence_without_mass_or_spread(dtype):
    empty = importance.evidence(jnp.full(50, -jnp.inf, dtype))
    assert empty.log_evidence == -jnp.inf
    assert jnp.isnan(empty.standard_error)
    assert empty.status == Status.DEGENERATE_WEIGHTS
    assert jnp.isnan(importance.evidence(jnp.zeros(1, dtype)).standard_error)
    assert importance.evidence(jnp.zeros(50, dtype).at[0].set(jnp.nan)).status == Status.NON_FINITE


def test_no_retrace(count_compiles, dtype):
    first, second = (jnp.asarray(CASES[name], dtype) for name in ("heavy", "light"))
    importance.psis(first)
    with count_compiles() as counter:
        importance.psis(second)
    assert counter.count == 0


@pytest.mark.parametrize("shape", [(4, 100), (400, 1), (), (0,)])
def test_log_ratios_are_one_vector(shape):
    for function in (importance.psis, importance.evidence, partial(weights.check_vector, "log_weights")):
        with pytest.raises(ValueError, match=r"one vector \(n,\).*ravel"):
            function(jnp.zeros(shape))
    found = jax.vmap(importance.psis, in_axes=1)(jnp.asarray(np.stack([CASES["heavy"], CASES["light"]], 1)))
    for column, name in enumerate(("heavy", "light")):
        np.testing.assert_allclose(found.khat[column], oracle.psis(CASES[name])[1], rtol=1e-3)


def test_sizes_without_a_tail_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        importance.khat_threshold(1)
    with pytest.raises(ValueError, match="positive"):
        importance.psis(jnp.zeros(100), relative_ess=0.0)
