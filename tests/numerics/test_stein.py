"""The Stein operator against double loops, its identities, and its promises about shape, dtype and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import kernels
from probinfer.numerics import stein
from probinfer.numerics.pairwise import pair_sums
from tests.reference import stein as oracle

SCALE, POWER = np.array([0.8, 1.5, 2.5]), 0.6


def cloud(dtype, n=11, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, 3)) * [1, 2, 3] + 5, dtype), jnp.asarray(
        rng.normal(size=(n, 3)), dtype
    )


def imq(dtype, scale=SCALE):
    return kernels.InverseMultiquadric(1.0, jnp.asarray(scale, dtype), jnp.asarray(POWER, dtype))


def tolerance(dtype):
    return {"rtol": 1e-10, "atol": 1e-12} if dtype == jnp.float64 else {"rtol": 2e-4, "atol": 2e-5}


@pytest.mark.f32
@pytest.mark.parametrize("tile", [4, 256])
def test_direction_equals_the_double_loop(dtype, tile):
    x, s = cloud(dtype)
    found = stein.stein_direction(imq(dtype), x, s, tile=tile)
    assert found.dtype == x.dtype
    np.testing.assert_allclose(
        found, oracle.direction(*map(np.float64, (x, s)), SCALE, POWER), **tolerance(dtype)
    )


def wide_cloud(dtype, n=13, d=6):
    """More columns than are written out: distances by a matrix product."""
    rng = np.random.default_rng(4)
    return (jnp.asarray(a, dtype) for a in (rng.normal(size=(n, d)) + 50, rng.normal(size=(n, d))))


def rbf_direction(x, s, scale):
    """The double loop for exp(−|x − z|²/(2 scale²)) with one scale a column."""
    total = np.zeros_like(x)
    for i in range(len(x)):
        for j in range(len(x)):
            k = np.exp(-0.5 * np.sum(((x[i] - x[j]) / scale) ** 2))
            total[i] += 2.0 * k * (s[j] - (x[j] - x[i]) / scale**2) / len(x)
    return total


@pytest.mark.f32
@pytest.mark.parametrize("tile", [5, 256])
def test_direction_of_wide_clouds_equals_the_double_loop(dtype, tile, monkeypatch):
    monkeypatch.setattr(stein, "_COLUMNS", 7 if tile == 5 else 2048)
    stein.stein_direction.clear_cache()
    x, s = wide_cloud(dtype)
    scale = np.array([0.5, 1, 2, 3, 1, 2])
    plain = [np.float64(a) for a in (x, s)]
    found = stein.stein_direction(kernels.RBF(2.0, jnp.asarray(scale, dtype)), x, s, tile=tile)
    np.testing.assert_allclose(found, rbf_direction(*plain, scale), **tolerance(dtype))
    found = stein.stein_direction(imq(dtype, scale), x, s, tile=tile)
    np.testing.assert_allclose(found, oracle.direction(*plain, scale, POWER), **tolerance(dtype))
    stein.stein_direction.clear_cache()


@pytest.mark.parametrize(
    "make", [lambda: kernels.RBF(1.0, 1.5), lambda: imq(jnp.float64), lambda: 2.0 * kernels.RBF()]
)
def test_particles_that_are_not_kept_are_no_sources_and_have_no_direction(make):
    x, s = cloud(jnp.float64)
    keep = jnp.arange(11) != 4
    s = s.at[4].set(jnp.nan)
    found = stein.stein_direction(make(), x.at[4].set(jnp.inf), s, keep, tile=4)
    others = np.flatnonzero(keep)
    np.testing.assert_allclose(found[others], stein.stein_direction(make(), x[others], s[others]), rtol=1e-9)
    assert np.all(np.isnan(found[4]))
    np.testing.assert_array_equal(stein.stein_direction(make(), x, s, tile=4)[4], np.nan)  # seen in its score


def test_half_precision_is_summed_in_float32():
    x, s = cloud(jnp.bfloat16)
    found = stein.stein_direction(imq(jnp.float32), x, s)
    assert found.dtype == jnp.float32
    wanted = oracle.direction(*(np.float64(a.astype(jnp.float32)) for a in (x, s)), SCALE, POWER)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.f32
def test_gram_equals_the_double_loop(dtype):
    (x, s), (z, t) = cloud(dtype), cloud(dtype, 5, 1)
    found = stein.stein_gram(imq(dtype), x, s, z, t)
    np.testing.assert_allclose(
        found, oracle.gram(*map(np.float64, (x, s, z, t)), SCALE, POWER), **tolerance(dtype)
    )


def test_kernels_without_a_profile_take_the_general_way():
    x, s = cloud(jnp.float64)
    one = 1.0 * imq(jnp.float64)  # a Scaled kernel is not a profile
    np.testing.assert_allclose(
        stein.stein_gram(one, x, s), stein.stein_gram(imq(jnp.float64), x, s), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
        stein.stein_direction(one, x, s, tile=4), stein.stein_direction(imq(jnp.float64), x, s), rtol=1e-9
    )


@pytest.mark.parametrize("make", [kernels.RBF, kernels.Matern52])
def test_every_profile_agrees_with_automatic_differentiation(make):
    x, s = cloud(jnp.float64, 5)
    kernel = make(1.3, jnp.asarray(SCALE))
    mine, general = stein._radial_gram, stein._pairwise_gram
    off = ~np.eye(5, dtype=bool)  # on the diagonal the second derivatives of a Matern profile are a limit
    np.testing.assert_allclose(
        mine(kernel, x, s, x, s)[off], general(kernel, x, s, x, s)[off], rtol=1e-8, atol=1e-10
    )


def test_sums_equal_those_of_the_whole_matrix():
    x, s = cloud(jnp.float64)
    both = (imq(jnp.float64), imq(jnp.float64, 2 * SCALE))
    w = jnp.asarray(np.random.default_rng(3).choice([-1, 1], (11, 4)), jnp.int8)
    H = np.stack([stein.stein_gram(k, x, s) for k in both])
    sums = stein.stein_sums(both, x, s, w, tile=4)
    traces = np.trace(H, axis1=1, axis2=2)
    off = H.sum(0) - np.diag(np.diag(H.sum(0)))
    np.testing.assert_allclose(sums.traces, traces)
    np.testing.assert_allclose(sums.totals, H.sum((1, 2)) - traces, rtol=1e-9)
    np.testing.assert_allclose(sums.row_sums, off.sum(1), rtol=1e-9)
    np.testing.assert_allclose(sums.forms, np.einsum("im,ij,jm->m", w, off, w), rtol=1e-9)
    np.testing.assert_allclose(sums.linear, off.sum(1) @ np.asarray(w), rtol=1e-9)


def test_mean_over_draws_of_the_density_is_zero(key):
    """E h = 0 under N(m, diag(v)) (asymmetric scales); 5 standard errors of the U-statistic's rows: rate 6e-7."""
    mean, scale = jnp.asarray([1.0, -2.0, 0.5]), jnp.asarray([0.3, 1.0, 4.0])
    x, z = mean + scale * jax.random.normal(key, (2, 500, 3))
    H = stein.stein_gram(imq(jnp.float64), x, -(x - mean) / scale**2, z, -(z - mean) / scale**2)
    assert abs(jnp.mean(H)) < 5 * jnp.std(H) / 500  # the terms are uncorrelated under the density


def test_direction_of_one_particle_is_its_score():
    x, s = cloud(jnp.float64, 1)
    np.testing.assert_allclose(stein.stein_direction(kernels.RBF(1.0, 2.0), x, s), s, rtol=1e-12)


def test_new_data_traces_nothing(count_compiles):
    x, s = cloud(jnp.float64)
    kernel = imq(jnp.float64)
    jax.block_until_ready((stein.stein_direction(kernel, x, s), stein.stein_sums((kernel,), x, s)))
    moved, rebuilt = x + 1.0, imq(jnp.float64, 3 * SCALE)
    with count_compiles() as counter:
        jax.block_until_ready(
            (stein.stein_direction(rebuilt, moved, s), stein.stein_sums((rebuilt,), moved, s))
        )
    assert counter.count <= 1  # the empty weights


def test_bad_inputs_are_refused():
    x, s = cloud(jnp.float64)
    with pytest.raises(ValueError, match="both have shape"):
        stein.stein_direction(imq(jnp.float64), x, s[:5])
    with pytest.raises(TypeError, match="floating point"):
        stein.stein_gram(imq(jnp.float64), x, jnp.ones((11, 3), int))
    with pytest.raises(ValueError, match="one row for each of the 11"):
        pair_sums(lambda a, b: (a @ b.T)[None], x, jnp.ones((10, 2)))


def test_slices_are_of_equal_size():
    """Twelve points in slices of at most ten: two of six, not of ten with eight points of padding."""
    x, seen = cloud(jnp.float64, 12)[0], set()

    def product(a, b):
        seen.add(a.shape[0])
        return (a @ b.T)[None]

    found = pair_sums(product, x, jnp.ones((12, 1)), tile=10)
    assert seen == {6}
    gram = np.asarray(x @ x.T)
    np.testing.assert_allclose(found.totals[0], gram.sum() - np.trace(gram), rtol=1e-12)
