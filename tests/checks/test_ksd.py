"""Kernel Stein discrepancy: double loops, invariance, size, power, signs for chains, errors it cannot detect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.checks import ksd
from probinfer.checks.discrepancy.kernel_stein import wild_signs
from probinfer.core.binding import LogDensity
from tests.reference import stein as oracle

SD = np.array([0.5, 2.0])


def log_normal(mean, x):
    return -0.5 * jnp.sum(((x - mean) / SD.astype(x.dtype)) ** 2)


def target(dtype=float):
    return LogDensity(log_normal, jnp.asarray([1.0, -3.0], dtype))


def draws(seed, n=40, dtype=float, shift=0.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray([1.0 + shift, -3.0] + SD * rng.normal(size=(n, 2)), dtype)


@pytest.mark.f32
def test_statistics_equal_double_loops(dtype):
    x = draws(0, dtype=dtype)
    report = ksd(x, target(dtype), whiten=None, scales=(0.5, 2.0))
    z = np.float64(x)
    s = -(z - [1.0, -3.0]) / SD**2
    for i, scale in enumerate((0.5, 2.0)):
        H = oracle.gram(z, s, z, s, np.full(2, scale * np.sqrt(2)), 0.5)
        exact = {"rtol": 1e-9} if dtype == jnp.float64 else {"rtol": 1e-3, "atol": 1e-3}
        np.testing.assert_allclose(report.v_statistics[i], H.mean(), **exact)
        np.testing.assert_allclose(report.u_statistics[i], (H.sum() - np.trace(H)) / (40 * 39), **exact)
    assert report.pvalue is None
    assert report.verdict.startswith("cannot tell")


def test_bootstrap_is_the_statistic_under_signs(key):
    x = draws(0)
    report = ksd(x, target(), key=key, whiten=None, scales=(1.0,), num_bootstrap=19)
    w = np.float64(wild_signs(key, (1, 40), 0.5, 19))
    z = np.asarray(x)
    s = -(z - [1.0, -3.0]) / SD**2
    H = oracle.gram(z, s, z, s, np.full(2, np.sqrt(2)), 0.5)
    np.testing.assert_allclose(report.null, np.einsum("im,ij,jm->m", w, H, w) / 40**2, rtol=1e-9)
    off = H - np.diag(np.diag(H))
    np.testing.assert_allclose(report.contributions, off.sum(1) / 39, rtol=1e-9, atol=1e-12)


def test_whitened_it_is_the_same_in_all_linear_coordinates():
    x = draws(0)
    A = jnp.asarray([[2.0, 1.0], [-0.5, 30.0]])
    moved = ksd(x @ A.T, lambda u: target()(jnp.linalg.solve(A, u)))
    np.testing.assert_allclose(moved.v_statistics, ksd(x, target()).v_statistics, rtol=1e-8)


@pytest.mark.slow
def test_size_and_power(key):
    """Of 60 true sets more than 12 are rejected at rate 1e-4 if the size is .06.

    The wrong sets, 1 sd off and a quarter as wide, gave p-values of at most .02 for 200 keys and sets; sets that are
    four times too wide gave some above .05.
    """
    rejected = sum(
        ksd(draws(s), target(), key=jax.random.fold_in(key, s), num_bootstrap=99).pvalue <= 0.05
        for s in range(60)
    )
    assert rejected <= 12
    for wrong in (
        draws(0, shift=0.5),
        0.25 * (draws(0) - jnp.asarray([1.0, -3.0])) + jnp.asarray([1.0, -3.0]),
    ):
        report = ksd(wrong, target(), key=key, num_bootstrap=99)
        assert report.pvalue <= 0.05
        assert report.verdict.startswith("the draws do not fit")
        assert "weights of well-separated modes" in report.verdict


def autoregression(seed, coefficient=0.5, shape=(4, 250)):
    rng = np.random.default_rng(seed)
    noise, x = rng.normal(size=(*shape, 2)), np.zeros((*shape, 2))
    x[:, 0] = noise[:, 0]
    for t in range(1, shape[1]):
        x[:, t] = coefficient * x[:, t - 1] + np.sqrt(1 - coefficient**2) * noise[:, t]
    return jnp.asarray([1.0, -3.0] + SD * x)


@pytest.mark.slow
def test_signs_that_last_keep_the_size_for_chains(key):
    """Correlation time 3. Of 30 true chains more than 8 are rejected at rate 5e-4 if the size is .08."""
    rejected = sum(
        ksd(autoregression(s), target(), key=jax.random.fold_in(key, s), num_bootstrap=99).pvalue <= 0.05
        for s in range(30)
    )
    assert rejected <= 8
    shifted = autoregression(0) + jnp.asarray([0.5, 0.0])
    assert ksd(shifted, target(), key=key, num_bootstrap=99).pvalue <= 0.05


def test_signs_change_at_the_given_rate(key):
    """Lag-one products of 4 x 500 x 20 signs have mean 1 − 2 flip, standard error 0.003: 5 errors."""
    signs = np.float64(wild_signs(key, (4, 500), 0.1, 20)).reshape(4, 500, 20)
    assert abs((signs[:, 1:] * signs[:, :-1]).mean() - 0.8) < 0.016
    assert abs(signs[:, 0].mean()) < 0.6  # 80 fair signs: 5 errors of 0.11


def test_it_is_blind_to_the_weights_of_separated_modes(key):
    """Nine draws in ten in one of two equal modes, 40 sd apart: passes, as the verdict warns."""
    x = draws(0) + jnp.where(jnp.arange(40) < 36, 0.0, 40 * SD[0])[:, None] * jnp.asarray([1.0, 0.0])
    other = LogDensity(log_normal, jnp.asarray([1.0 + 40 * SD[0], -3.0]))
    both = lambda x: jnp.logaddexp(target()(x), other(x))  # noqa: E731
    assert ksd(x, both, key=key, num_bootstrap=99, whiten=jnp.diag(jnp.asarray(SD**2))).pvalue > 0.05


def test_tree_of_draws_and_picture(key):
    x = autoregression(1)
    tree = {"a": x[..., 0], "b": x[..., 1:]}
    fn = lambda p: target()(jnp.concatenate([p["a"][None], p["b"]]))  # noqa: E731
    report = ksd(tree, fn, key=key, num_bootstrap=99)
    np.testing.assert_allclose(report.v_statistics, ksd(x, target()).v_statistics, rtol=1e-9)
    assert "Stein" in report.plot().get_xlabel()


def test_bad_inputs_are_refused(key):
    x = draws(0)
    with pytest.raises(ValueError, match="whiten must be 'cov"):
        ksd(x, target(), whiten="all")
    with pytest.raises(ValueError, match=r"\(2, 2\) covariance"):
        ksd(x, target(), whiten=jnp.eye(3))
    with pytest.raises(ValueError, match="singular"):
        ksd(jnp.concatenate([x, x[:, :1]], axis=1), lambda u: target()(u[:2]))
    with pytest.raises(ValueError, match="at least 19"):
        ksd(x, target(), key=key, num_bootstrap=3)
    with pytest.raises(ValueError, match="scales positive"):
        ksd(x, target(), scales=(0.0,))
    with pytest.raises(ValueError, match="cannot tell: one draw in"):
        ksd(autoregression(0, 0.95, (1, 200)), target(), key=key)
