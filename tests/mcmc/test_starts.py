"""Starting points of chains, and the kinetic energy of their first steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.mcmc.metrics import gaussian_euclidean_low_rank

from probinfer import mcmc, targets
from probinfer.core.errors import NumericalError
from probinfer.mcmc.adaptation import metric as metrics
from probinfer.mcmc.adaptation import starts
from tests.mcmc.test_engines import LOC, ROOT, SCALE, make_target, two_normals


def chosen_starts(dtype, lower, candidates, num_chains=2):
    zero, one = np.zeros(4), np.ones(4)
    logdensity_fn = make_target(-10 * one, 10 * one, np.eye(4), dtype, zero, lower).logdensity_fn
    choose = jax.jit(starts.choose, static_argnums=2)
    chosen = choose(logdensity_fn, jnp.asarray(candidates, dtype), num_chains)
    ascent = chosen.ascent
    assert ascent.position_differences.shape == ascent.gradient_differences.shape == (num_chains * 10, 4)
    signs = np.sign(ascent.positions)
    assert np.all(signs == signs[:, :1])
    return signs[:, 0].tolist(), int(chosen.num_dropped), int(chosen.num_shared)


def test_starts_of_negligible_mass_are_dropped_and_others_keep_their_order(dtype):
    near = np.random.default_rng(0).normal(size=(6, 4))
    high_low = np.array([1, -1, 1, 1, -1, 1])[:, None] * 10 + near  # the mode at +10 is the lower one
    # modes that may matter keep their chains, also if one is e^20 times the other
    assert chosen_starts(dtype, 0.0, high_low) == ([1, -1], 0, 0)
    assert chosen_starts(dtype, 20.0, high_low) == ([1, -1], 0, 0)
    assert chosen_starts(dtype, 100.0, high_low) == ([-1, -1], 4, 0)
    # one remains for two chains; a NaN candidate is dropped as well
    high_low[4] = np.nan
    assert chosen_starts(dtype, 100.0, high_low) == ([-1, -1], 5, 1)


def test_low_candidates_ascend_as_long_as_they_can(dtype):
    """An ascent that stopped early in the mode with all the mass is overtaken by one that went on in the other."""
    apart = 30 * SCALE
    target = make_target(LOC - apart, LOC + apart, np.diag(SCALE**2), dtype, LOC, 100.0)
    candidates = LOC + np.random.default_rng(0).uniform(-2, 2, size=(12, 16, 4))
    choose = jax.jit(lambda sets: jax.lax.map(lambda x: starts.choose(target.logdensity_fn, x, 4), sets))
    chosen = choose(jnp.asarray(candidates, dtype))
    assert np.all(chosen.ascent.positions < LOC)
    assert np.all((chosen.num_dropped > 0) & (chosen.num_dropped < 16))


def test_a_mass_is_negligible_by_density_and_by_volume(dtype):
    def judge(values, log_volumes):
        return starts.has_negligible_mass(
            jnp.asarray(values, dtype), jnp.asarray(log_volumes, dtype), 2
        ).tolist()

    assert starts.margin(2) == pytest.approx(10 + 2 * np.log(100))
    assert judge([0.0, -19.0, -20.0, np.nan], [0.0] * 4) == [False, False, True, True]
    # a narrow neck of high density makes nothing else negligible, whether its mass is larger or smaller
    assert judge([300.0, 0.0], [-310.0, 0.0]) == judge([300.0, 0.0], [-290.0, 0.0]) == [False, False]
    # a low region that is wide enough is not negligible
    assert judge([0.0, -30.0], [0.0, 20.0]) == [False, False]


def test_a_target_without_a_finite_start_is_refused(dtype):
    target = targets.from_logdensity(lambda x: jnp.log(-(x**2)), jnp.zeros((), dtype))
    with pytest.raises(NumericalError, match="no start with a finite log density"):
        mcmc.NUTS().sample(jax.random.key(0), target, progress=False)


@pytest.mark.f32
@pytest.mark.usefixtures("optimized")
def test_kinetic_energy_is_that_of_the_matrix_and_never_negative(dtype):
    """Its terms in single coordinates may be negative: one that overflows must not make it minus infinity."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    sigma, lam = np.array([0.5, 1.0, 2.0, 0.1]), np.array([1e-5, 0.3, 2.0, 1.0])
    metric = metrics.LowRankInverseMassMatrix(*(jnp.asarray(x, dtype) for x in (sigma, basis, lam)))
    ours, theirs = (
        metrics.euclidean(metric).kinetic_energy,
        gaussian_euclidean_low_rank(*metric).kinetic_energy,
    )
    momenta = rng.normal(size=(1000, 4)) / sigma
    root = sigma[:, None] * basis * np.sqrt(lam)
    expected = 0.5 * np.sum((momenta @ root) ** 2, axis=1)
    tolerance = 1e-2 if dtype == jnp.float32 else 1e-8  # rounding error in a direction with l = 1e-5
    np.testing.assert_allclose(jax.lax.map(ours, jnp.asarray(momenta, dtype)), expected, rtol=tolerance)
    largest = float(jnp.finfo(dtype).max) ** rng.uniform(0.49, 0.52, size=(1000, 1))
    huge = jnp.asarray(momenta * largest, dtype)
    if dtype == jnp.float32:  # the momenta are such that it matters, in optimized code
        assert np.any(jax.lax.map(theirs, huge) < 0)
    assert not np.any(jax.lax.map(ours, huge) < 0)


def test_ascents_end_in_the_typical_set_and_stay_dispersed(dtype):
    root = ROOT / SCALE[:, None]
    precision = np.linalg.inv(root @ root.T)
    logdensity_fn = targets.LogDensity(
        two_normals, *(jnp.asarray(x, dtype) for x in (LOC, LOC, precision, 0.0))
    )
    far = jnp.asarray(LOC + 50 * np.random.default_rng(0).normal(size=(4, 4)), dtype)
    ascent = starts.ascend(logdensity_fn, far)
    assert 4 * 2 < int(ascent.num_gradients) <= 4 * 100
    squares = (np.linalg.solve(root, (np.asarray(ascent.positions) - LOC).T) ** 2).sum(0)
    # at most d = 4 in the metric of L-BFGS, which is roughly the true one
    assert np.all(squares < 40)
    assert len(np.unique(np.round(squares, 9))) == 4
    # pairs obey the secant equation of the quadratic
    dx, dg = np.asarray(ascent.position_differences), np.asarray(ascent.gradient_differences)
    used = np.any(dx != 0, axis=1)
    expected = -dx[used] @ precision
    np.testing.assert_allclose(dg[used], expected, rtol=1e-6, atol=1e-8 * np.abs(expected).max())
