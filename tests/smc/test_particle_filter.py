from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from probinfer import resampling, smc
from probinfer.core.status import Status
from probinfer.smc.filtering.filter import check_counts
from tests.params import quick
from tests.reference import hmm, kalman
from tests.smc import models
from tests.smc.models import Z_LIMIT, z_scores

MODEL = hmm.random_model(1, num_states=3, num_steps=4, dead=0.15)
RUNS = 10_000


SCHEMES = sorted(resampling.SCHEMES)


@pytest.mark.parametrize("scheme", quick(SCHEMES, "systematic", "killing"))
def test_evidence_and_smoothing_are_unbiased(scheme, dtype):
    # 6 particles, some potentials zero: runs in which all of them die count with estimate 0
    fk, expected = models.finite(MODEL, dtype), hmm.marginals(MODEL)
    for seed, trigger in enumerate(models.TRIGGERS):
        adaptive = models.any_scheme(scheme, trigger, SCHEMES)
        keys = jax.random.split(jax.random.key(seed), RUNS)
        evidence, mass, status = models.masses(keys, fk, adaptive, (4, 3, 6))
        assert np.abs(z_scores(evidence, expected[0].sum())) < Z_LIMIT, trigger
        assert np.all(np.abs(z_scores(mass, expected)) < Z_LIMIT), trigger
        assert not np.any(status == int(Status.NON_FINITE))
        assert np.all((status == int(Status.OK)) == (evidence > 0))


def uniform_ancestors(key, log_weights, num):
    _, log_weights = resampling.SCHEMES["systematic"](key, log_weights, num)
    return jax.random.randint(key, (num,), 0, num, jnp.int32), log_weights


def test_a_wrong_scheme_is_detected(dtype):
    keys = jax.random.split(jax.random.key(0), 4000)
    fk, expected = models.finite(MODEL, dtype), hmm.marginals(MODEL)
    evidence, mass, _ = models.masses(
        keys, fk, resampling.adaptive(uniform_ancestors, resampling.always()), (4, 3, 6)
    )
    assert (
        max(np.abs(z_scores(evidence, expected[0].sum())), np.abs(z_scores(mass, expected)).max())
        > 2 * Z_LIMIT
    )


@pytest.mark.slow
def test_total_variation_falls_as_the_root_of_the_number_of_particles(dtype):
    # mean total variation between the path law (2^3 paths) and N weighted paths; over 200 runs the slope of its log
    # against log N has a standard error of 0.01 (a third of the mean, sqrt(200), log 16): 0.065 is 6 of them
    fk = models.finite(hmm.random_model(2, num_states=2, num_steps=3), dtype)
    paths, mass = hmm.enumerate_paths(hmm.random_model(2, num_states=2, num_steps=3))

    @partial(jax.vmap, in_axes=(0, None))
    def estimate(key, num_particles):
        result = smc.particle_filter(key, fk, 3, num_particles)
        index = jnp.sum(result.paths * 2 ** jnp.arange(2, -1, -1), axis=1)
        return jnp.zeros(8, dtype).at[index].add(jax.nn.softmax(result.log_weights))

    sizes, distances = np.array([50, 800]), []
    for num_particles in sizes:
        actual = np.asarray(
            estimate(jax.random.split(jax.random.key(num_particles), 200), int(num_particles))
        )
        distances.append(0.5 * np.abs(actual - mass / mass.sum()).sum(axis=1).mean())
    slope = np.polyfit(np.log(sizes), np.log(distances), 1)[0]
    assert abs(slope + 0.5) < 0.065
    assert len(paths) == 8


@pytest.mark.f32
def test_linear_gaussian_model_against_kalman(dtype):
    # mean of exp(log Zhat - log Z) over 400 runs is 1 and the filter mean exact to O(1/N): z at Z_LIMIT, bias 0.005
    y = jnp.asarray(np.random.default_rng(5).normal(size=60) * 1.5, dtype)
    log_evidence, means, variances = kalman.kalman(np.asarray(y, float), **models.LINEAR)

    @jax.jit
    @jax.vmap
    def run(key):
        result = smc.particle_filter(key, models.linear(y), 60, 400, store="none")
        mean = jnp.sum(jax.nn.softmax(result.log_weights) * result.particles)
        square = jnp.sum(jax.nn.softmax(result.log_weights) * (result.particles - mean) ** 2)
        return jnp.exp(result.log_evidence - log_evidence), mean, square, result.status

    ratio, mean, square, status = run(jax.random.split(jax.random.key(0), 400))
    assert abs(z_scores(ratio, 1.0)) < Z_LIMIT
    assert abs(np.mean(mean) - means[-1]) < 0.005 + Z_LIMIT * np.std(mean) / 20
    assert abs(np.mean(square) - variances[-1]) < 0.01 + Z_LIMIT * np.std(square) / 20
    assert np.all(status == 0)


def test_paths_are_those_of_the_ancestors(key, dtype):
    y = jnp.asarray(np.random.default_rng(5).normal(size=8), dtype)
    result = smc.particle_filter(key, models.linear(y), 8, 16)
    stored = smc.particle_filter(key, models.linear(y), 8, 16, store="ancestors")
    assert np.array_equal(result.paths[:, -1], result.particles)
    rounding = 40 * float(jnp.finfo(dtype).eps)  # of programs that are compiled apart
    np.testing.assert_allclose(result.particles, stored.particles, rtol=rounding, atol=rounding)
    assert np.array_equal(result.ancestors, stored.ancestors)
    assert stored.paths is None
    assert 0 < result.resampled.sum() < 7
    unmoved = result.ancestors == np.arange(16)
    assert np.array_equal(unmoved.all(axis=1), ~np.asarray(result.resampled))
    # the distinct values of the paths at a step are the particles of that step with descendants
    alive = [len(np.unique(result.paths[:, t])) for t in range(8)]
    assert alive == smc.coalescence(result.ancestors).tolist()
    assert alive[0] < alive[-1] == 16
    assert np.isclose(result.log_evidence, jax.nn.logsumexp(result.log_weights) - np.log(16))
    assert np.isclose(result.log_evidences[-1], result.log_evidence)


def test_jit_vmap_and_plain_agree(key, dtype):
    y = jnp.asarray(np.random.default_rng(5).normal(size=2), dtype)
    keys = jax.random.split(key, 3)
    run = lambda key: smc.particle_filter(key, models.linear(y), 2, 4)  # noqa: E731
    together = jax.jit(jax.vmap(run))(keys)
    with jax.disable_jit():
        plain = run(keys[1])
    tolerance = 1e-10 if dtype == jnp.float64 else 2e-4
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=tolerance, atol=tolerance)
        assert a.dtype == b.dtype
    assert together.log_weights.dtype == together.paths.dtype == dtype


def test_new_data_trace_nothing(key, count_compiles, dtype):
    y = jnp.linspace(0.0, 1.0, 8, dtype=dtype)
    smc.particle_filter(key, models.linear(y), 8, 16, ess_threshold=0.5)
    again, other_key = models.linear(y + 1), jax.random.key(5)
    with count_compiles() as compiles:
        smc.particle_filter(other_key, again, 8, 16, ess_threshold=0.7)
    assert compiles.count == 0


def test_one_particle_is_importance_sampling_and_one_step_is_enough(key, dtype):
    y = jnp.linspace(0.0, 1.0, 4, dtype=dtype)
    single = smc.particle_filter(key, models.linear(y), 4, 1)
    density = sum(models.log_normal(y - single.paths[0], models.LINEAR["noise"]))
    assert np.isclose(single.log_evidence, density)
    assert np.all(single.ess == 1)
    first = smc.particle_filter(key, models.linear(y), 1, 50)
    assert first.paths.shape == (50, 1)
    assert first.ess.shape == (1,)
    assert np.allclose(first.log_weights, models.log_normal(y[0] - first.particles, models.LINEAR["noise"]))


def _start(key):
    return jax.random.normal(key)


def _drift(key, x, t):
    return x + 1


def _fault(at, value, x_previous, x, t):
    return jnp.where(t == at, value, -0.1 * x**2)


@pytest.mark.parametrize(
    ("value", "status", "evidence"),
    [
        (-np.inf, Status.DEGENERATE_WEIGHTS, -np.inf),
        (np.nan, Status.NON_FINITE, np.nan),
        (np.inf, Status.NON_FINITE, np.nan),
    ],
)
def test_a_failed_step_keeps_the_state_before_it(key, value, status, evidence):
    def run(at, num_steps=5):
        fk = smc.FeynmanKac(_start, _drift, Partial(_fault, jnp.int32(at), jnp.asarray(value)))
        return smc.particle_filter(key, fk, num_steps, 20, resampling=resampling.adaptive("systematic"))

    sound, failed = run(-1), run(3)
    assert failed.status == status
    assert failed.stopped_at == 3
    np.testing.assert_equal(float(failed.log_evidence), evidence)
    assert np.array_equal(failed.ess[:3], sound.ess[:3])
    assert np.all(failed.ess[3:] == 0)
    assert np.array_equal(failed.log_evidences[:3], sound.log_evidences[:3])
    np.testing.assert_equal(np.asarray(failed.log_evidences[3:]), evidence)
    assert np.all(np.isfinite(failed.log_weights))
    assert np.array_equal(failed.paths[:, 2:], np.repeat(failed.particles[:, None], 3, axis=1))
    np.testing.assert_allclose(failed.particles, failed.paths[:, 0] + 2)
    at_start = run(0)
    assert at_start.status == status
    assert at_start.stopped_at == 0
    np.testing.assert_equal(float(at_start.log_evidence), evidence)
    assert np.array_equal(at_start.paths[:, -1], at_start.paths[:, 0])


def test_bad_input_is_refused(key):
    fk = models.linear(jnp.ones(3))
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        smc.particle_filter(key, fk, 0, 5)
    with pytest.raises(ValueError, match="num_particles must be at least 1"):
        smc.particle_filter(key, fk, 3, 0)
    with pytest.raises(TypeError, match="num_particles must be a Python int"):
        check_counts(num_particles=5.0)
    with pytest.raises(ValueError, match="store must be one of 'paths'"):
        smc.particle_filter(key, fk, 3, 5, store="all")
    with pytest.raises(ValueError, match="systematic"):
        smc.particle_filter(key, fk, 3, 5, resampling="systemic")
    with pytest.raises(TypeError, match="key"):
        smc.particle_filter(0, fk, 3, 5)


def _two_potentials(x_previous, x, t):
    return jnp.zeros(2)


def _integer_potential(x_previous, x, t):
    return jnp.int32(0)


def _zero(x_previous, x, t):
    return jnp.zeros_like(x)


def _widen(key, x, t):
    return jnp.stack([x, x])


def _to_integer(key, x, t):
    return jnp.int32(x)


@pytest.mark.parametrize(
    ("move", "potential", "error", "match"),
    [
        (_drift, _two_potentials, ValueError, r"shape \(5,\).*got \(5, 2\)"),
        (_drift, _integer_potential, TypeError, "floating point, got int32"),
        (_widen, _zero, (TypeError, ValueError), "structure, shapes and dtypes|shape"),
        (_to_integer, _fault, TypeError, "positional"),
        (_to_integer, Partial(_fault, 9, 0.0), TypeError, "structure, shapes and dtypes"),
    ],
)
def test_wrong_shapes_and_types_are_named(key, move, potential, error, match):
    with pytest.raises(error, match=match):
        smc.particle_filter(key, smc.FeynmanKac(_start, move, potential), 3, 5)


def constant_start(y, key):
    return jnp.zeros_like(y[0])


def constant_move(y, key, x, t):
    return x


def constant_fit(y, x_previous, x, t):
    return y[t]


@pytest.mark.f32
def test_a_long_log_evidence_loses_no_digits(dtype):
    """20 000 steps: a plain float32 sum of terms of about -1.5 loses three digits, a compensated one none.

    The increments are those of the data, so the evidence is their sum whatever the particles are: no draws matter.
    """
    y = jnp.asarray(-1.3 - np.random.default_rng(0).uniform(size=20_000) / 3, dtype)
    parts = (Partial(fn, y) for fn in (constant_start, constant_move, constant_fit))
    actual = smc.particle_filter(jax.random.key(0), smc.FeynmanKac(*parts), len(y), 2, store="none")
    exact = np.cumsum(np.asarray(y, np.longdouble)).astype(float)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(actual.log_evidence, exact[-1], rtol=4 * eps)
    np.testing.assert_allclose(actual.log_evidences, exact, rtol=4 * eps)


@pytest.mark.slow
def test_filters_run_under_shard_map_with_its_default_check(dtype):
    """One filter a device, with and without paths; and a scheme with a trigger where only keys or only weights vary."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("devices",))
    spec = jax.sharding.PartitionSpec("devices")
    keys = jax.random.split(jax.random.key(0), 1)
    fk = models.finite(MODEL, dtype)

    def run(keys, store):
        actual = smc.particle_filter(keys[0], fk, 4, 6, store=store)
        return jax.tree.map(lambda leaf: leaf[None], actual)

    sharded = partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    for store in ("none", "paths"):
        actual = sharded(partial(run, store=store))(keys)
        alone = smc.particle_filter(keys[0], fk, 4, 6, store=store)
        np.testing.assert_allclose(actual.log_evidence[0], alone.log_evidence, rtol=1e-5)
    scheme, values = resampling.adaptive(), jnp.arange(8, dtype=dtype)[None]
    choices = (
        lambda keys, rows: scheme(keys[0], rows[0], 8, 1),
        lambda keys, rows: scheme(jax.random.key(0), rows[0], 8, 1),
        lambda keys, rows: scheme(keys[0], values[0], 8, 1),
    )

    def chosen(choose, keys, rows):
        return [leaf[None] for leaf in choose(keys, rows)]

    for choose in choices:
        ancestors, *_ = sharded(partial(chosen, choose))(keys, values)
        assert ancestors.shape == (1, 8)
