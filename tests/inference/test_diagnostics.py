import arviz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.core.status import Status
from probinfer.inference import diagnostics
from tests.reference import chains as oracle


def autoregression(seed, shape, coefficient):
    noise = np.random.default_rng(seed).normal(size=shape)
    chains = np.empty(shape)
    chains[:, 0] = noise[:, 0] / np.sqrt(1 - coefficient**2)
    for t in range(1, shape[1]):
        chains[:, t] = coefficient * chains[:, t - 1] + noise[:, t]
    return chains


def stuck_chain(seed):
    chains = autoregression(seed, (4, 200), 0.4)
    chains[0] = chains[0, 0]
    return chains


CASES = {
    "independent": np.random.default_rng(0).normal(size=(4, 200)),
    "autocorrelated": autoregression(1, (4, 200), 0.95),
    "antithetic": autoregression(2, (4, 200), -0.7),
    "shifted": autoregression(3, (4, 200), 0.3) + 0.5 * np.arange(4)[:, None],
    "scaled": autoregression(4, (4, 200), 0.3) * np.array([1, 1, 1, 5])[:, None],
    "heavy tails": np.random.default_rng(5).standard_cauchy((4, 200)),
    "stuck": stuck_chain(6),
    "far from zero": 1e3 + 0.1 * autoregression(7, (4, 200), 0.5),
    "rejections": np.repeat(autoregression(8, (4, 50), 0.3), 4, axis=1),
    "grid": np.floor(3 * autoregression(9, (4, 200), 0.3)),
}
STATISTICS = {
    "rhat": (diagnostics.rhat, oracle.rhat),
    "ess": (diagnostics.ess, oracle.bulk),
    "ess_tail": (diagnostics.ess_tail, oracle.tail),
    "ess_mean": (diagnostics.ess_mean, lambda x: oracle.plain_ess(oracle.split(x))),
    "mcse_mean": (diagnostics.mcse_mean, oracle.mcse_mean),
    "mcse_sd": (diagnostics.mcse_sd, oracle.mcse_sd),
    "ess_quantile": (lambda x: diagnostics.ess_quantile(x, 0.3), lambda x: oracle.quantile(x, 0.3)),
    "mcse_quantile": (lambda x: diagnostics.mcse_quantile(x, 0.3), lambda x: oracle.mcse_quantile(x, 0.3)),
}


@pytest.fixture(scope="module")
def stacked():
    """All cases as one leaf (chain, draw, case): every statistic is compiled once."""
    return jnp.asarray(np.stack(list(CASES.values()), axis=2), jnp.result_type(float))


@pytest.mark.f32
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_against_slow_formulas(name, stacked, dtype):
    found = STATISTICS[name][0](stacked)
    assert found.dtype == dtype
    columns = np.moveaxis(np.asarray(stacked, float), 2, 0)
    expected = [STATISTICS[name][1](column) for column in columns]
    np.testing.assert_allclose(found, expected, rtol=1e-8 if dtype == jnp.float64 else 2e-2)


@pytest.mark.parametrize("name", ["rhat", "ess", "ess_tail"])
def test_the_oracle_and_arviz_agree(name, stacked):
    data = arviz.convert_to_dataset({"x": np.asarray(stacked)})
    theirs = {
        "rhat": lambda: arviz.rhat(data),
        "ess": lambda: arviz.ess(data, method="bulk"),
        "ess_tail": lambda: arviz.ess(
            data, method="tail", prob=(0.05, 0.95)
        ),  # ArviZ 1 has other quantiles by default
    }[name]()["x"].values
    np.testing.assert_allclose(theirs, STATISTICS[name][0](stacked), rtol=1e-8)


@pytest.mark.f32
def test_known_sizes(dtype):
    # an AR(1) chain with coefficient a is worth (1 - a) / (1 + a) of its draws; over 4 chains of 2000 the estimate
    # has a relative standard deviation below 5 %: 5 sigma, false-fail rate 6e-7 a case
    coefficients = [0.5, 0.8, -0.5]
    draws = {str(a): jnp.asarray(autoregression(int(10 * abs(a)), (4, 2000), a), dtype) for a in coefficients}
    found = diagnostics.ess_mean(draws)
    for a in coefficients:
        assert abs(found[str(a)] / (8000 * (1 - a) / (1 + a)) - 1) < 0.25


@pytest.mark.f32
def test_constant_and_stuck_chains(stacked):
    draws = stacked.at[..., 0].set(0.1).at[..., 1].set(jnp.arange(4, dtype=stacked.dtype)[:, None])
    assert jnp.isnan(diagnostics.rhat(draws)[0])
    assert diagnostics.rhat(draws)[1] == jnp.inf
    assert diagnostics.ess(draws)[1] < 10
    for name in STATISTICS:
        assert jnp.isnan(STATISTICS[name][0](draws)[0]), name


def test_discrete_quantities(stacked):
    flips = np.random.default_rng(0).random((4, 200)) < 0.1
    halves = np.tile([0, 1], (4, 100))  # folds to a constant: the bulk R-hat stands
    draws = (
        stacked.astype(jnp.int32)
        .at[..., 0]
        .set(jnp.asarray(flips, jnp.int32))
        .at[..., 1]
        .set(jnp.asarray(halves, jnp.int32))
    )
    size = diagnostics.ess(draws)
    np.testing.assert_allclose(size[0], oracle.bulk(flips), rtol=1e-8)
    # nothing lies beyond the 95 % quantile: the 5 % indicator alone is judged, and it is the flip itself
    np.testing.assert_allclose(diagnostics.ess_tail(draws)[0], size[0], rtol=1e-8)
    assert jnp.all(jnp.abs(diagnostics.rhat(draws)[:2] - 1) < 0.05)


def test_what_cannot_be_known_is_nan(stacked):
    one = stacked[:1, :, 0]
    assert jnp.isnan(diagnostics.rhat(one))
    np.testing.assert_allclose(diagnostics.ess(one), oracle.bulk(np.asarray(one)), rtol=1e-8)
    assert jnp.isnan(diagnostics.ess(one[:, :3]))
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        broken = stacked.at[1, 3, 0].set(bad)
        for name in STATISTICS:
            found = STATISTICS[name][0](broken)
            assert jnp.isnan(found[0]), (name, bad)
            assert jnp.all(jnp.isfinite(found[1:])), (name, bad)
        found = diagnostics.nested_rhat(broken, 2)
        assert jnp.isnan(found[0])
        assert jnp.all(jnp.isfinite(found[1:]))


def test_trees_of_any_shape():
    leaf = jnp.asarray(CASES["autocorrelated"])
    draws = {"a": leaf, "b": (jnp.stack([leaf, 2 * leaf], axis=2)[..., None], jnp.zeros((4, 200, 0)))}
    found = diagnostics.ess(draws)
    assert jax.tree.map(jnp.shape, found) == {"a": (), "b": ((2, 1), (0,))}
    np.testing.assert_allclose(found["b"][0][:, 0], found["a"], rtol=1e-10)  # ranks know no scale


def test_odd_numbers_of_draws_lose_the_middle_one():
    odd = jnp.asarray(CASES["autocorrelated"][:, :101])
    np.testing.assert_allclose(diagnostics.rhat(odd), oracle.rhat(np.delete(odd, 50, axis=1)), rtol=1e-8)


def test_leading_axes_are_asked_for():
    with pytest.raises(ValueError, match=r"leading axes \(chain, draw\), got shape \(200,\) at '\['a'\]'"):
        diagnostics.rhat({"a": jnp.zeros(200)})


def test_levels_of_quantiles_are_checked(stacked):
    for statistic in (diagnostics.ess_quantile, diagnostics.mcse_quantile):
        for level in (1.5, -0.1, 0.0, 1.0, 1):
            with pytest.raises(ValueError, match=f"between 0 and 1, got {level}"):
                statistic(stacked, level)


def test_no_retrace(stacked, count_compiles):
    diagnostics.mcse_quantile(stacked, 0.3)
    other = jnp.asarray(np.flip(stacked, axis=1))
    with count_compiles() as counter:
        diagnostics.mcse_quantile(other, 0.7)
    assert counter.count == 0


def test_same_inside_jit_and_vmap(stacked):
    outside = diagnostics.rhat(stacked)
    np.testing.assert_allclose(jax.jit(diagnostics.rhat)(stacked), outside, rtol=1e-10)
    mapped = jax.vmap(diagnostics.rhat, in_axes=2)(stacked[:, :, :2])
    np.testing.assert_allclose(mapped, outside[:2], rtol=1e-10)


@pytest.mark.f32
def test_energy_fraction(dtype):
    energy = np.asarray(autoregression(1, (3, 500), 0.6), dtype)
    centered = energy - energy.mean(axis=1, keepdims=True)
    expected = np.mean(np.diff(energy) ** 2, axis=1) / np.mean(centered**2, axis=1)
    np.testing.assert_allclose(diagnostics.ebfmi(jnp.asarray(energy)), expected, rtol=1e-4)


@pytest.mark.f32
def test_convergence_status(dtype):
    judge = diagnostics.convergence_status
    good = jnp.asarray(np.random.default_rng(0).normal(size=(4, 300)), dtype)
    draws = jnp.stack([good, jnp.ones_like(good)], axis=2)  # the second is a deterministic quantity
    assert judge(draws) == Status.OK
    assert judge(draws[:1]) == Status.OK
    assert judge(draws, min_ess=10_000) == Status.CHAINS_DISAGREE
    assert judge(draws.at[0, :, 0].add(0.5)) == Status.CHAINS_DISAGREE
    assert judge(draws.at[0, :, 0].add(0.5), max_rhat=1.5, min_ess=10) == Status.OK
    assert judge(draws.at[0, :, 1].add(5)) == Status.CHAINS_DISAGREE
    assert judge(jnp.ones_like(draws)) == Status.CHAINS_DISAGREE
    assert judge(draws.at[1, 2, 1].set(jnp.inf)) == Status.NON_FINITE
    assert judge(draws[:, :3]) == Status.CHAINS_DISAGREE
    assert judge({"a": (draws,), "b": jnp.zeros((4, 300, 0), dtype)}) == Status.OK


def test_a_hundred_effective_draws_a_chain_are_asked_for():
    slow = jnp.asarray(autoregression(5, (4, 300), 0.5))[..., None] * jnp.ones(
        2
    )  # worth about 400 draws in all
    assert diagnostics.ess(slow)[0] < 400
    assert diagnostics.convergence_status(slow, max_rhat=2.0) == Status.CHAINS_DISAGREE
    assert diagnostics.convergence_status(slow, max_rhat=2.0, min_ess=200) == Status.OK


@pytest.mark.f32
@pytest.mark.parametrize("shape", [(12, 50), (12, 1), (4, 50)])
def test_nested_rhat_against_the_definition(shape, dtype):
    """Superchains of three chains, of three single draws, and of one chain."""
    num, rng = 4, np.random.default_rng(2)
    starts = 0.3 * np.repeat(rng.normal(size=(num, 5)), shape[0] // num, axis=0)
    draws = jnp.asarray(rng.standard_t(3, size=(*shape, 5)) + starts[:, None], dtype)
    found = diagnostics.nested_rhat({"a": draws}, num)["a"]
    assert found.dtype == dtype
    expected = [oracle.nested(column, num) for column in np.moveaxis(np.asarray(draws, float), 2, 0)]
    np.testing.assert_allclose(found, expected, rtol=1e-9 if dtype == jnp.float64 else 1e-4)
    jitted = jax.jit(diagnostics.nested_rhat, static_argnums=1)({"a": draws}, num)["a"]
    np.testing.assert_allclose(jitted, found, rtol=1e-12 if dtype == jnp.float64 else 1e-5)


def test_nested_rhat_sees_superchains_that_remember_their_starts():
    rng = np.random.default_rng(3)
    mixed = rng.normal(size=(64, 1, 1))
    stuck = np.repeat(rng.normal(size=(8, 1, 1)), 8, axis=0)
    flat = np.ones((64, 1, 1))
    draws = jnp.asarray(np.concatenate([mixed, mixed + 3 * stuck, stuck, flat], axis=2))
    found = np.asarray(diagnostics.nested_rhat(draws, 8))
    # 8 superchains of 8 draws that forgot: B/W is F(7, 56)/8, whose 1e-6 quantile from above is 8.03/8, for each of
    # the bulk and the folded draws: fails by chance twice in a million
    assert 1 <= found[0] < np.sqrt(1 + 8.03 / 8)
    assert found[1] > 2
    assert found[2] == np.inf
    assert np.isnan(found[3])
    assert np.isnan(diagnostics.nested_rhat(draws.at[3, 0, 0].set(jnp.nan), 8)[0])


@pytest.mark.parametrize(
    ("shape", "num", "words"),
    [
        ((4, 10), 3, "4 chains cannot be cut into 3"),
        ((4, 10), 1, "2 or more"),
        ((4, 1), 4, "nothing varies within"),
        ((4,), 2, "leading axes"),
    ],
)
def test_nested_rhat_of_bad_input(shape, num, words):
    with pytest.raises(ValueError, match=words):
        diagnostics.nested_rhat(jnp.zeros(shape), num)
