"""Coin sampling inside constraints: mirrors by autodiff, directions by loops, targets with known moments."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import probinfer as pi
from probinfer import betting, coin, kernels
from probinfer.coin.constrained.mirrored_directions import adapted_direction, mirrored_direction
from probinfer.core.binding import LogDensity, StochasticLogDensity
from tests.reference import mirrored as oracle

RNG = np.random.default_rng(0)
MIRRORS = {
    "simplex": (coin.Simplex(), RNG.dirichlet(np.ones(4), 7)),
    "orthant": (coin.Orthant(), RNG.gamma(2.0, size=(7, 3)) * [0.01, 1, 100]),
    "box": (coin.Box(jnp.array([-1.0, 0, 5]), jnp.array([1.0, 3, 5.1])), None),
}
MIRRORS["box"] = (MIRRORS["box"][0], RNG.uniform([-1, 0, 5], [1, 3, 5.1], size=(7, 3)))


def of(name, dtype):
    mirror, positions = MIRRORS[name]
    positions = jnp.asarray(positions, dtype)
    return mirror, positions, jax.vmap(mirror.dual)(positions)


@pytest.mark.f32
@pytest.mark.parametrize("name", MIRRORS)
def test_mirrors_invert_and_know_their_determinant_and_hessian(name, dtype):
    mirror, positions, eta = of(name, dtype)
    tight = dtype == jnp.float64
    np.testing.assert_allclose(jax.vmap(mirror.primal)(eta), positions, rtol=1e-11 if tight else 1e-4)
    assert bool(jnp.all(jax.vmap(mirror.inside)(positions)))
    free = jax.vmap(jax.jacfwd(lambda e: mirror.primal(e)[: e.shape[0]]))(eta)
    np.testing.assert_allclose(
        jax.vmap(mirror.log_det)(eta), jnp.linalg.slogdet(free)[1], rtol=1e-9 if tight else 1e-3
    )
    vectors = jnp.asarray(RNG.normal(size=eta.shape), dtype)
    back = jnp.einsum("nij,nj->ni", free, jax.vmap(mirror.hessian)(eta, vectors))
    np.testing.assert_allclose(back, vectors, rtol=1e-8 if tight else 1e-2, atol=1e-8 if tight else 1e-3)
    np.testing.assert_allclose(free, jnp.swapaxes(free, 1, 2), rtol=1e-9 if tight else 1e-3, atol=1e-7)


def test_the_score_of_a_dirichlet_has_its_closed_form():
    """With eta the entropic dual: alpha_k - sum(alpha) theta_k (Sharrock et al. 2023)."""
    concentration = jnp.array([3.0, 0.5, 1.0, 7.0])
    mirror, positions, eta = of("simplex", jnp.float64)

    def value(e):
        return jnp.sum((concentration - 1) * jnp.log(mirror.primal(e))) + mirror.log_det(e)

    expected = concentration[:-1] - jnp.sum(concentration) * positions[:, :-1]
    np.testing.assert_allclose(jax.vmap(jax.grad(value))(eta), expected, rtol=1e-9, atol=1e-10)


def ingredients(name):
    mirror, positions, eta = of(name, jnp.float64)
    jacobians = jax.vmap(jax.jacfwd(mirror.primal))(eta)
    scores = jnp.asarray(RNG.normal(size=eta.shape))
    return mirror, positions, eta, jacobians, scores, jnp.ones(len(eta), bool)


@pytest.mark.parametrize("name", ["orthant", "box"])
def test_the_direction_equals_the_double_loop(name):
    _, positions, _, jacobians, scores, mask = ingredients(name)
    kernel = kernels.InverseMultiquadric(lengthscale=0.7)
    result = mirrored_direction(kernel, positions, jacobians, scores, mask)
    expected = oracle.direction(*map(np.asarray, (positions, jacobians, scores)), 0.49)
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-12)


def test_masked_particles_are_not_felt():
    _, positions, _, jacobians, scores, mask = ingredients("orthant")
    kernel = kernels.InverseMultiquadric(lengthscale=0.7)
    rest = mirrored_direction(kernel, positions, jacobians, scores.at[2].set(0.0), mask.at[2].set(False))
    others = jnp.arange(7) != 2
    expected = mirrored_direction(kernel, positions[others], jacobians[others], scores[others], mask[others])
    np.testing.assert_allclose(rest[others], expected, rtol=1e-10)
    mirror, _, eta, *_ = ingredients("orthant")
    hessian = jax.vmap(mirror.hessian)
    adapted = jax.jit(adapted_direction, static_argnames="hessian")
    rest = adapted(
        kernel, positions, jacobians, scores, mask.at[2].set(False), lambda v: hessian(eta, v), 1.0
    )
    expected = adapted(
        kernel,
        positions[others],
        jacobians[others],
        scores[others],
        mask[others],
        lambda v: hessian(eta[others], v),
        1.0,
    )
    np.testing.assert_allclose(rest[others], expected, rtol=1e-6)


@pytest.mark.parametrize("cutoff", [0.9, 1.0])
def test_the_adapted_direction_equals_its_definition(cutoff):
    mirror, positions, eta, jacobians, scores, mask = ingredients("box")
    result = adapted_direction(
        kernels.InverseMultiquadric(lengthscale=0.7),
        positions,
        jacobians,
        scores,
        mask,
        lambda v: jax.vmap(mirror.hessian)(eta, v),
        cutoff,
    )
    expected = oracle.adapted(*map(np.asarray, (positions, jacobians, scores)), 0.49, cutoff)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-8)


def test_without_a_mirror_the_adapted_direction_is_the_plain_one():
    _, positions, _, _, scores, mask = ingredients("box")
    kernel, flat = kernels.InverseMultiquadric(lengthscale=0.7), jnp.tile(jnp.eye(3), (7, 1, 1))
    result = adapted_direction(kernel, positions, flat, scores, mask, lambda v: v, 1.0)
    expected = mirrored_direction(kernel, positions, flat, scores, mask)
    np.testing.assert_allclose(result, expected, atol=3e-5)  # the jitter of the Gram matrix is 1e-5


def dirichlet(concentration, position):
    return jnp.sum((concentration - 1) * jnp.log(position))


CONCENTRATION = np.array([8.0, 2.0, 1.0, 4.0])


@pytest.mark.f32(slow=True)
@pytest.mark.parametrize("make", [coin.mirrored_svgd, coin.mirrored_svmd])
def test_a_dirichlet_gets_its_moments(key, dtype, make, count_compiles):
    """40 particles from far off, 300 steps; quadrature by particles errs far less than draws: a tenth of an sd."""
    algorithm = make(LogDensity(dirichlet, jnp.asarray(CONCENTRATION, dtype)), coin.Simplex())
    start = jnp.asarray(np.random.default_rng(1).dirichlet([1, 1, 9, 9], 40), dtype)
    state, history = pi.run(key, algorithm, algorithm.init(start), 300)
    law = dist.Dirichlet(CONCENTRATION)
    slack = 0.1 if make is coin.mirrored_svgd else 0.5  # the truncated kernel keeps few directions
    sd = np.sqrt(law.variance)
    np.testing.assert_array_less(np.abs(np.mean(state.positions, axis=0) - law.mean), slack * sd)
    if make is coin.mirrored_svgd:
        np.testing.assert_allclose(np.std(state.positions, axis=0), sd, rtol=0.15)
    assert state.positions.dtype == dtype
    np.testing.assert_allclose(np.sum(state.positions, axis=1), 1, rtol=1e-5)
    assert float(jnp.min(history.records[1].feasible)) == 1.0
    if make is coin.mirrored_svgd:
        other = make(LogDensity(dirichlet, jnp.asarray(CONCENTRATION[::-1].copy(), dtype)), coin.Simplex())
        with count_compiles() as compiles:
            pi.run(key, other, other.init(start), 300)
        assert compiles.count == 0


@pytest.mark.slow
def test_an_ill_scaled_box_is_filled(key):
    """A uniform law on [0, 1e-3] x [-1e3, 1e3] from a corner: no unit of length is set anywhere."""
    box = coin.Box(jnp.array([0.0, -1e3]), jnp.array([1e-3, 1e3]))
    algorithm = coin.mirrored_svgd(lambda position: 0.0 * jnp.sum(position), box)
    share = np.random.default_rng(2).uniform(0.01, 0.05, (50, 2))
    start = jnp.asarray(share * [1e-3, 2e3] + [0, -1e3])
    state, _ = pi.run(key, algorithm, algorithm.init(start), 300)
    filled = (state.positions - box.low) / (box.high - box.low)
    np.testing.assert_allclose(np.mean(filled, axis=0), 0.5, atol=0.05)
    np.testing.assert_allclose(np.std(filled, axis=0), 12**-0.5, rtol=0.1)


@pytest.mark.slow
def test_a_bijector_serves_as_a_mirror(key):
    """A tree of a positive number and a simplex, the supports taken from distributions."""
    prior = {"scale": dist.Gamma(4.0, 2.0), "share": dist.Dirichlet(jnp.array([5.0, 2.0, 3.0]))}

    def log_prior(position):
        return prior["scale"].log_prob(position["scale"]) + prior["share"].log_prob(position["share"])

    example = {"scale": jnp.ones(()), "share": jnp.ones(3) / 3}
    algorithm = coin.mirrored_svgd(log_prior, coin.mirror_from_bijector(prior, example))
    rng = np.random.default_rng(3)
    start = {
        "scale": jnp.asarray(rng.uniform(5, 6, 40)),
        "share": jnp.asarray(rng.dirichlet(np.ones(3) * 9, 40)),
    }
    state, _ = pi.run(key, algorithm, algorithm.init(start), 300)
    assert np.mean(state.positions["scale"]) == pytest.approx(2.0, abs=0.1)
    np.testing.assert_allclose(np.mean(state.positions["share"], axis=0), [0.5, 0.2, 0.3], atol=0.03)


def shifted(rate, position):
    """Exponential of unit mean; not a number beyond 3."""
    return jnp.where(position[0] > 3, jnp.nan, -rate * jnp.sum(position))


@pytest.mark.slow
def test_particles_without_a_score_stand_still_and_are_counted(key):
    algorithm = coin.mirrored_svgd(LogDensity(shifted, jnp.ones(())), coin.Orthant(), on="dual")
    start = jnp.linspace(0.1, 2.0, 10)[:, None].at[4].set(50.0)
    state, history = pi.run(key, algorithm, algorithm.init(start), 20)
    np.testing.assert_allclose(state.positions[4], 50.0, rtol=1e-12)
    assert np.all(np.isfinite(state.positions))
    assert int(history.records[1].num_nonfinite[0]) == 1
    assert int(jnp.max(history.records[1].status)) == pi.Status.OK


def test_a_minibatch_is_shared_by_all_particles(key):
    algorithm = coin.mirrored_svgd(StochasticLogDensity(noisy, jnp.ones(())), coin.Orthant(), on="dual")
    start = jnp.linspace(0.1, 2.0, 10)[:, None]
    step = jax.jit(algorithm.step)
    one, other, same = (step(key, algorithm.init(start))[1].virial for key in (key, jax.random.key(1), key))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    # one factor for all: the virial of exponentials in log coordinates moves with it
    eta = np.log(start[:, 0])
    slopes = [
        1 - np.asarray(start[:, 0]) * (1 + float(jax.random.normal(k))) for k in (key, jax.random.key(1))
    ]
    for result, slope in zip((one, other), slopes, strict=True):
        np.testing.assert_allclose(result[0], np.mean((eta - eta.mean()) * slope), rtol=1e-9)


def noisy(rate, key, position):
    return -rate * (1 + jax.random.normal(key, dtype=position.dtype)) * jnp.sum(position)


def test_published_set_up_is_identity_and_half(key):
    """Without a geometry the first move of every dual number is one half, whatever the density."""
    algorithm = coin.mirrored_svgd(
        LogDensity(dirichlet, jnp.asarray(CONCENTRATION)),
        coin.Simplex(),
        geometry=coin.Identity(),
        bet=betting.coin(unit=0.5),
        bandwidth="published",
    )
    start = jnp.asarray(np.random.default_rng(1).dirichlet(np.ones(4), 6))
    state = jax.jit(algorithm.init)(start)
    moved, info = jax.jit(algorithm.step)(key, state)
    np.testing.assert_allclose(jnp.abs(moved.z - state.z), 0.5, rtol=1e-9)
    pairs = np.sum((start[:, None] - start[None]) ** 2, axis=-1)[np.triu_indices(6, 1)]
    assert float(info.squared_bandwidth) == pytest.approx(np.sort(pairs)[7], rel=1e-9)


def flat(position):
    return 0.0 * jnp.sum(position)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: coin.mirrored_svgd(3, coin.Simplex()), TypeError, "logdensity_fn must be a function"),
        (lambda: coin.mirrored_svgd(flat, "simplex"), TypeError, "mirror must be a mirror map"),
        (lambda: coin.mirrored_svgd(flat, coin.Orthant(), on="theta"), ValueError, "one of positions, dual"),
        (lambda: coin.mirrored_svgd(flat, coin.Orthant(), bandwidth="big"), ValueError, "bandwidth must be"),
        (lambda: coin.mirrored_svmd(flat, coin.Orthant(), cutoff=0.0), ValueError, r"in \(0, 1\], got 0.0"),
        (
            lambda: coin.mirrored_svmd(
                flat, coin.mirror_from_bijector(dist.constraints.positive, jnp.ones(2))
            ),
            TypeError,
            "BijectorMirror has none",
        ),
        (
            lambda: coin.mirrored_svmd(flat, coin.Orthant(), geometry=coin.Full()),
            ValueError,
            r"takes coin.Diagonal\(\) or coin.Identity\(\)",
        ),
        (lambda: coin.Box(1.0, 1.0), ValueError, "low < high everywhere"),
        (lambda: coin.mirror_from_bijector("positive", jnp.ones(2)), TypeError, "expected a numpyro"),
        (
            lambda: coin.mirror_from_bijector(dist.constraints.positive, jnp.array([1.0, -1.0])),
            ValueError,
            "outside the support",
        ),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        (np.array([[0.5, 0.5], [0.5, 0.6]]), ValueError, "1 of 2 particles are not strictly inside"),
        (np.array([[0.5, 0.5], [1.0, 0.0]]), ValueError, r"the first is number 1: \[1.0, 0.0\]"),
        (np.array([[0.5, 0.5], [0.5, 0.5]]), ValueError, "identical"),
        (np.array([[1, 0], [0, 1]]), TypeError, "floating point"),
        (np.array([[0.5, 0.5]]), ValueError, "at least 2 particles"),
    ],
)
def test_bad_starts(positions, error, message):
    with pytest.raises(error, match=message):
        coin.mirrored_svgd(flat, coin.Simplex()).init(jnp.asarray(positions))


def test_shapes_and_classes_are_refused_in_words():
    for mirror in (coin.Orthant(), coin.Simplex(), coin.Box(0.0, 20.0)):
        name = type(mirror).__name__
        for positions in (jnp.arange(1.0, 11), {"p": jnp.arange(1.0, 31).reshape(10, 3)}):
            with pytest.raises(ValueError, match=rf"coin.{name} takes positions in one array \(N, d\)"):
                coin.mirrored_svgd(lambda t: jnp.sum(t), mirror).init(positions)
    for make in (coin.mirrored_svgd, coin.mirrored_svmd):
        with pytest.raises(TypeError, match="mirror must be a mirror map"):
            make(lambda t: jnp.sum(t), coin.Simplex)
    with pytest.raises(TypeError, match="geometry must be"):
        coin.svgd(lambda t: jnp.sum(t), geometry=coin.Full)
