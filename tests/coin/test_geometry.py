"""Every geometry: x = c + B z, scores pulled by Bᵀ, and what a refresh makes of a cloud."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import coin
from probinfer.coin.cloud import geometry, low_rank
from probinfer.coin.cloud_descent import choose_geometry

GEOMETRIES = [coin.Identity(), coin.Diagonal(), coin.LowRank(), coin.Full()]
WITH_SCALE = GEOMETRIES[1:]
RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(4, 4)) * np.array([1e-3, 1.0, 10.0, 100.0])
X = jnp.asarray(RNG.normal(size=(30, 4)) @ MIX + 7.0)
EVERYONE = jnp.ones(30, bool)


def name(shape):
    return type(shape).__name__


@pytest.mark.parametrize("shape", GEOMETRIES, ids=name)
def test_particles_come_back_and_scores_are_pulled_by_the_transpose(shape):
    metric, z = shape.start(X, EVERYONE)
    np.testing.assert_allclose(shape.from_z(metric, z), X, rtol=1e-10)
    metric, z = shape.refresh(metric, z, EVERYONE)
    np.testing.assert_allclose(shape.from_z(metric, z), X, rtol=1e-9)
    scores = jnp.asarray(RNG.normal(size=X.shape))
    _, pullback = jax.vjp(lambda z: shape.from_z(metric, z), z)
    np.testing.assert_allclose(shape.pullback(metric, scores), pullback(scores)[0], rtol=1e-9)


@pytest.mark.parametrize("shape", WITH_SCALE, ids=name)
def test_the_coordinates_of_a_cloud_have_no_shift_and_no_scale(shape):
    _metric, z = shape.start(X, EVERYONE)
    np.testing.assert_allclose(np.mean(z, 0), 0, atol=1e-12)
    np.testing.assert_allclose(np.std(z, 0), 1, rtol=1e-12)
    other = shape.start(X * 2.0**30 + 2.0**40, EVERYONE)[1]
    np.testing.assert_allclose(other, z, rtol=1e-4, atol=1e-4)


def test_refreshes_of_the_full_metric_whiten_in_a_few_steps():
    metric, z = coin.Full().start(X, EVERYONE)
    assert np.linalg.cond(np.cov(z.T)) > 3
    for _ in range(6):
        metric, z = coin.Full().refresh(metric, z, EVERYONE)
    np.testing.assert_allclose(np.cov(z.T, bias=True), np.eye(4), atol=1e-4)
    np.testing.assert_allclose(coin.Full().from_z(metric, z), X, rtol=1e-9)


def test_one_refresh_is_the_shrunk_factor():
    metric, z = coin.Full().start(X, EVERYONE)
    new, _ = coin.Full().refresh(metric, z, EVERYONE)
    C, shrink = np.cov(z.T, bias=True), 4 / 30
    expected = np.asarray(metric.factor) @ np.linalg.cholesky((1 - shrink) * C + shrink * np.diag(np.diag(C)))
    np.testing.assert_allclose(new.factor, expected, rtol=1e-9, atol=1e-12)


def test_with_fewer_particles_than_dimensions_the_full_metric_is_diagonal():
    x = jnp.asarray(RNG.normal(size=(5, 8)))
    metric, z = coin.Full().start(x, EVERYONE[:5])
    new, _ = coin.Full().refresh(metric, 3 * z, EVERYONE[:5])
    np.testing.assert_allclose(new.factor, 3 * np.asarray(metric.factor), rtol=1e-12)


@pytest.mark.parametrize("shape", WITH_SCALE, ids=name)
def test_a_coordinate_without_spread_keeps_its_scale(shape):
    metric, z = shape.start(X, EVERYONE)
    constant = z.at[:, 1].set(0.5)
    new, turned = shape.refresh(metric, constant, EVERYONE)
    assert np.all(np.isfinite(turned))
    np.testing.assert_allclose(shape.from_z(new, turned), shape.from_z(metric, constant), rtol=1e-8)


@pytest.mark.parametrize("shape", WITH_SCALE, ids=name)
def test_particles_that_are_not_kept_do_not_bend_the_metric(shape):
    far = X.at[-3:].set(1e6)
    mask = EVERYONE.at[-3:].set(False)
    metric, z = shape.refresh(*shape.start(far, mask), mask)
    np.testing.assert_allclose(shape.from_z(metric, z), far, rtol=1e-7)
    assert np.max(np.std(z[:-3], 0)) < 1.7


@pytest.mark.f32
def test_a_degenerate_covariance_leaves_a_finite_metric(dtype):
    line = jnp.asarray(np.outer(RNG.normal(size=30), np.ones(4)), dtype)
    metric, z = coin.Full().start(line, EVERYONE)
    for _ in range(30):
        metric, z = coin.Full().refresh(metric, z, EVERYONE)
    assert np.all(np.isfinite(metric.factor))
    assert np.all(np.isfinite(z))


def test_stale_metrics_and_due_restarts():
    z = jnp.asarray(RNG.normal(size=(1000, 3)))
    scaled = [z * jnp.array([1, s, 1]) for s in (1.0, 1.9, 2.3, 0.6, 0.4, 0.0)]
    assert [bool(geometry.is_stale(a, jnp.ones(1000, bool))) for a in scaled] == [0, 0, 1, 0, 1, 0]
    wide = [jnp.tile(z, 8) * jnp.where(jnp.arange(24) < many, 3.0, 1.0) for many in (0, 1, 2, 3)]
    for share, expected in ((0.0, [0, 1, 1, 1]), (0.125, [0, 0, 0, 1])):
        assert [bool(geometry.is_stale(a, jnp.ones(1000, bool), share=share)) for a in wide] == expected
    due = [
        [t for t in range(300) if geometry.is_due(jnp.int32(t), jnp.array(settled))]
        for settled in (True, False)
    ]
    assert due == [[8, 16, 32, 64, 128, 256], [8, 16, 32, 64, 128, 192, 256]]


def test_spikes_are_the_eigenvectors_that_stand_out():
    """One direction of variance 50 among 60 coordinates, 40 draws: found; without it nothing stands out."""
    v = np.ones(60) / 60**0.5
    noise = RNG.normal(size=(40, 60))
    for strength, number in ((7.0, 1), (0.0, 0)):
        y = noise + strength * RNG.normal(size=(40, 1)) * v
        y = (y - y.mean(0)) / y.std(0)
        directions, roots, bulk = low_rank.spikes(jnp.asarray(y), 8)
        assert int(np.sum(np.asarray(roots) > 1)) == number
        if number:
            assert abs(v @ np.asarray(directions)[:, 0]) > 0.9
            top = np.linalg.eigvalsh(y.T @ y / 40)[-1]
            assert 0.5 * top < float((roots[0] * bulk) ** 2) < top  # corrected downwards
        else:
            assert bulk == 1


def test_the_side_of_the_eigenproblem_does_not_matter():
    y = RNG.normal(size=(20, 20)) + 3 * RNG.normal(size=(20, 1))
    y = (y - y.mean(0)) / y.std(0)
    tall = np.concatenate([y, y])  # the same covariance from more rows
    bulk = [low_rank.spikes(jnp.asarray(a), 3)[0][:, 0] for a in (tall, y)]
    np.testing.assert_allclose(abs(bulk[0] @ bulk[1]), 1, rtol=1e-9)


def test_the_richest_geometry_that_the_particles_can_estimate_is_chosen():
    kinds = [name(choose_geometry(*sizes)) for sizes in ((100, 50), (50, 50), (5000, 2000))]
    assert kinds == ["Full", "LowRank", "LowRank"]
    assert name(choose_geometry(50, 50, stochastic=True)) == "Diagonal"
