from typing import Any, NamedTuple

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

import probinfer
from probinfer.core.errors import MissingExtraError
from probinfer.core.types import field, pytree
from probinfer.inference import arviz_export, diagnostics
from probinfer.inference.posterior import Posterior
from probinfer.inference.summary import summarize
from tests.reference import weighted as oracle

CHAINS, DRAWS = 4, 50


@pytree
class Kernel:
    """Stands for any registered class of hyperparameters."""

    lengthscale: Any = field()
    variance: Any = field()


class Info(NamedTuple):
    status: Any
    is_divergent: Any
    energy: Any
    step_size: Any


@pytest.fixture
def draws(dtype):
    rng = np.random.default_rng(11)
    shape = (CHAINS, DRAWS)
    return {
        "kernel": Kernel(
            jnp.asarray(rng.normal(size=(*shape, 2)), dtype), jnp.asarray(rng.normal(size=shape), dtype)
        ),
        "count": jnp.asarray(rng.poisson(3.0, shape), jnp.int32),
        "label": jnp.asarray(rng.random(shape) < 0.3),
        "layers": [jnp.asarray(100 + rng.normal(size=(*shape, 2, 2)), dtype)],
    }


@pytest.fixture
def log_weights(dtype):
    values = np.random.default_rng(5).normal(size=(CHAINS, DRAWS)) - 1000
    values[1, :7] = -np.inf
    return jnp.asarray(values, dtype)


@pytest.fixture
def equal(draws):
    return Posterior(draws)


@pytest.fixture
def weighted(draws, log_weights):
    return Posterior(draws, log_weights)


def scale_free(draw):
    return {"square": draw["kernel"].lengthscale ** 2, "count": draw["count"]}


def simulate(key, draw):
    return draw["layers"][0][0, 0] + jax.random.normal(key, (), draw["layers"][0].dtype)


def test_it_is_at_the_root():
    assert probinfer.Posterior is Posterior


@pytest.mark.f32
def test_flat_puts_chain_after_chain(equal, weighted, draws, log_weights, dtype):
    assert (equal.num_chains, equal.num_draws) == (CHAINS, DRAWS)
    flat = weighted.flat()
    assert jax.tree.structure(flat) == jax.tree.structure(draws)
    assert flat["layers"][0].shape == (CHAINS * DRAWS, 2, 2)
    assert jnp.all(flat["count"][DRAWS : 2 * DRAWS] == draws["count"][1])
    np.testing.assert_allclose(
        np.exp(weighted.flat_log_weights()), oracle.probabilities(log_weights.ravel()), rtol=1e-5
    )
    np.testing.assert_allclose(equal.flat_log_weights(), -np.log(CHAINS * DRAWS), rtol=1e-6)
    assert equal.flat_log_weights().dtype == dtype


@pytest.mark.f32
def test_expectation_is_the_weighted_mean(equal, weighted, draws, log_weights):
    squares = np.asarray(draws["kernel"].lengthscale, float).reshape(-1, 2) ** 2
    found = equal.expectation(scale_free)
    np.testing.assert_allclose(found["square"], squares.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["count"], np.mean(draws["count"]), rtol=1e-5)
    together = weighted.expectation(scale_free, batch_size=32)
    probabilities = oracle.probabilities(log_weights.ravel())
    np.testing.assert_allclose(together["square"], probabilities @ squares, rtol=1e-5)


def test_expectation_ignores_what_has_no_weight(weighted, draws):
    first = draws["kernel"].variance.at[1, :7].set(jnp.nan)
    holes = Posterior({"x": first}, weighted.log_weights)
    assert jnp.isfinite(holes.expectation(lambda draw: jnp.log1p(draw["x"] ** 2)))
    empty = Posterior({"x": first}, jnp.full((CHAINS, DRAWS), -jnp.inf))
    assert jnp.isnan(empty.expectation(lambda draw: draw["x"]))


def test_a_function_is_traced_once_whatever_the_data(equal, weighted, count_compiles, key):
    equal.expectation(scale_free)
    equal.predictive(key, simulate)
    twice = jax.tree.map(lambda leaf: jnp.flip(leaf, axis=1), equal)
    with count_compiles() as counter:
        twice.expectation(scale_free)
        twice.predictive(key, simulate)
    assert counter.count == 0


def test_a_callable_pytree_is_data(equal, count_compiles):
    @pytree
    class Shift:
        by: Any

        def __call__(self, draw):
            return draw["kernel"].variance + self.by

    first = equal.expectation(Shift(jnp.asarray(1.0)))
    with count_compiles() as counter:
        second = equal.expectation(Shift(jnp.asarray(3.0)))
    assert counter.count <= 1  # jnp.asarray itself
    np.testing.assert_allclose(second - first, 2.0)


def test_resample_follows_the_weights(weighted, draws, key):
    # systematic: every draw comes floor or ceil of num W times; draws are told apart by a continuous leaf
    num = 1000
    found = weighted.resample(key, num)
    assert found["layers"][0].shape == (num, 2, 2)
    names, chosen = np.ravel(draws["kernel"].variance), np.asarray(found["kernel"].variance)
    counts = np.array([np.sum(chosen == name) for name in names])
    expected = num * oracle.probabilities(np.ravel(weighted.log_weights))
    assert np.all((counts >= np.floor(expected - 1e-3)) & (counts <= np.ceil(expected + 1e-3)))
    assert counts[expected == 0].sum() == 0
    order = np.array([np.flatnonzero(names == value)[0] for value in chosen])
    assert np.any(np.diff(order) < 0)  # in random order


def test_predictive_uses_one_key_a_draw(equal, weighted, key):
    everything = equal.predictive(key, simulate)
    assert everything.shape == (CHAINS * DRAWS,)
    noise = everything - equal.flat()["layers"][0][:, 0, 0]  # in the order of flat()
    assert len(np.unique(noise)) == CHAINS * DRAWS
    # mean and variance of 200 standard normals: 5.5 sigma, false-fail rate 8e-8
    assert abs(noise.mean()) < 5.5 / np.sqrt(200)
    assert abs(noise.var() - 1) < 5.5 * np.sqrt(2 / 200)
    assert equal.predictive(key, simulate, 7, batch_size=3).shape == (7,)
    assert weighted.predictive(key, simulate).shape == (CHAINS * DRAWS,)


def test_predictive_respects_the_weights(weighted, draws, key):
    def index(_, draw):
        return draw["kernel"].variance

    found = weighted.predictive(key, index)
    assert not np.isin(found, draws["kernel"].variance[1, :7]).any()


def test_num_must_be_positive(equal, key):
    for call in (lambda: equal.resample(key, 0), lambda: equal.predictive(key, simulate, 0)):
        with pytest.raises(ValueError, match="num >= 1"):
            call()


def test_it_is_a_pytree(weighted):
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), weighted)
    means = jax.jit(jax.vmap(lambda posterior: posterior.expectation(scale_free)))(stacked)
    expected = weighted.expectation(scale_free)
    np.testing.assert_allclose(means["square"], jnp.stack([expected["square"]] * 2), rtol=1e-6)
    assert jax.tree.structure(jax.tree.map(lambda _: object(), weighted)) == jax.tree.structure(weighted)


def test_leading_axes_are_checked(draws):
    with pytest.raises(
        ValueError, match=r"\(chain, draw\) = \(4, 50\), got draws\['label'\] of shape \(50,\)"
    ):
        Posterior({**draws, "label": draws["label"][0]})
    with pytest.raises(ValueError, match=r"every leaf of unconstrained .* of shape \(4, 49\)"):
        Posterior(draws, unconstrained=jnp.zeros((4, 49)))
    with pytest.raises(ValueError, match=r"log_weights must have one entry a draw.*got \(200,\)"):
        Posterior(draws, jnp.zeros(200))
    with pytest.raises(ValueError, match="at least one quantity"):
        Posterior({})
    with pytest.raises(ValueError, match=r"leading axis of length 1"):
        Posterior(jnp.zeros(5))


def test_summary_rows_and_numbers(equal, draws):
    table = equal.summary()
    rows = [f"layers.0[{i},{j}]" for i in range(2) for j in range(2)]
    assert list(table) == [
        "count",
        "kernel.lengthscale[0]",
        "kernel.lengthscale[1]",
        "kernel.variance",
        "label",
        *rows,
    ]
    values = np.asarray(draws["layers"][0][:, :, 1, 0])
    row = table["layers.0[1,0]"]
    assert set(row) == set(table.columns)
    np.testing.assert_allclose([row["mean"], row["sd"]], [values.mean(), values.std(ddof=1)], rtol=1e-9)
    levels = np.quantile(values, [0.05, 0.5, 0.95], method="inverted_cdf")
    np.testing.assert_allclose([row["5%"], row["50%"], row["95%"]], levels, rtol=1e-12)
    for column, statistic in (
        ("rhat", diagnostics.rhat),
        ("ess_bulk", diagnostics.ess),
        ("ess_tail", diagnostics.ess_tail),
        ("mcse_mean", diagnostics.mcse_mean),
    ):
        np.testing.assert_allclose(row[column], statistic(jnp.asarray(values)), rtol=1e-9)
    np.testing.assert_allclose(table["label"]["mean"], np.mean(draws["label"]))
    assert table["count"]["50%"] == np.quantile(draws["count"], 0.5, method="inverted_cdf")
    assert table.to_dict()["kernel.variance"] == table["kernel.variance"]
    with pytest.raises(KeyError, match=r"no quantity 'kernel.lengthscale'; there is kernel.lengthscale\[0\]"):
        table["kernel.lengthscale"]


def test_summary_of_weighted_draws(weighted, draws, log_weights):
    row = weighted.summary()["kernel.variance"]
    values = np.ravel(draws["kernel"].variance)
    mean, variance = oracle.moments(np.ravel(log_weights), values)
    np.testing.assert_allclose([row["mean"], row["sd"]], [mean, np.sqrt(variance)], rtol=1e-9)
    assert row["5%"] == oracle.quantile(np.ravel(log_weights), values, 0.05)
    assert np.isnan([row[name] for name in ("mcse_mean", "ess_bulk", "ess_tail", "rhat")]).all()
    assert "weighted: worth" in str(weighted.summary())


def test_summary_of_little(dtype):
    single = Posterior(jnp.ones((1, 1, 2), dtype)).summary()
    assert single["value[1]"]["mean"] == 1
    assert np.isnan([single["value[1]"][name] for name in ("sd", "mcse_mean", "ess_bulk", "rhat")]).all()
    one_chain = Posterior(jnp.arange(40, dtype=dtype)[None] % 7).summary()["value"]
    assert np.isnan(one_chain["rhat"])
    assert np.isfinite(one_chain["ess_bulk"])


@pytest.mark.f32
def test_summary_in_words(equal):
    table = equal.summary()
    lines = str(table).splitlines()
    assert lines[0].split() == ["mean", "sd", "5%", "50%", "95%", "mcse_mean", "ess_bulk", "ess_tail", "rhat"]
    assert len(lines) == 11
    assert lines[1].startswith("count ")
    assert lines[-1] == "4 chains of 50 draws"
    page = table._repr_html_()
    assert page.count("<tr>") == 10
    assert "<td>kernel.variance</td>" in page


def test_long_summaries_are_cut_in_print_only(dtype):
    table = summarize(jnp.zeros((1, 1, 130), dtype))
    assert len(table) == len(table.to_dict()) == 130
    assert len(str(table).splitlines()) == 102
    assert str(table).endswith("30 more rows in .to_dict()")
    assert " - " in str(table)  # what is not defined


@pytest.fixture
def reported(draws, log_weights):
    energy = jnp.arange(CHAINS * DRAWS, dtype=float).reshape(CHAINS, DRAWS)
    info = Info(jnp.asarray(0), jnp.zeros((CHAINS, DRAWS), bool), energy, jnp.ones(CHAINS))
    return Posterior({**draws, "scope/x": draws["count"]}, log_weights, jnp.asarray(-3.5), info)


def check_groups(data, posterior):
    assert data["posterior"]["kernel.lengthscale"].shape == (CHAINS, DRAWS, 2)
    assert data["posterior"]["label"].dtype == bool
    assert "scope.x" in data["posterior"]
    assert data["posterior"].attrs["log_evidence"] == -3.5
    assert set(data["sample_stats"].data_vars) == {"diverging", "energy"}
    check_equal_weights(data, posterior)


def check_equal_weights(data, posterior):
    """Every draw as often as its weight asks for, up to one, with its own statistics beside it, in order."""
    rows = np.asarray(data["sample_stats"]["energy"].values, int)
    flat = np.ravel(posterior.draws["kernel"].variance)
    np.testing.assert_array_equal(data["posterior"]["kernel.variance"].values, flat[rows])
    assert np.all(np.diff(np.ravel(rows)) >= 0)
    expected = rows.size * np.exp(np.asarray(posterior.flat_log_weights(), float))
    counts = np.bincount(np.ravel(rows), minlength=rows.size)
    assert np.all(np.abs(counts - expected) < 1 + 1e-3)
    assert np.all(counts[expected == 0] == 0)
    worth = 1 / np.sum((expected / rows.size) ** 2)
    assert f"worth {worth:.1f} of {rows.size} draws" in data["posterior"].attrs["resampled"]


@pytest.mark.f32
def test_arviz_of_the_installed_version(reported, equal, key):
    data = reported.to_arviz()
    check_groups(data, reported)
    np.testing.assert_array_equal(data["posterior"]["count"], reported.to_arviz()["posterior"]["count"])
    other = reported.to_arviz(key)
    check_equal_weights(other, reported)
    assert np.any(other["posterior"]["kernel.variance"].values != data["posterior"]["kernel.variance"].values)
    plain = equal.to_arviz()
    assert not hasattr(plain, "sample_stats")
    assert "resampled" not in plain["posterior"].attrs
    theirs = arviz.ess(plain, var_names=["kernel.variance"])["kernel.variance"].values
    np.testing.assert_allclose(theirs, diagnostics.ess(equal.draws["kernel"].variance), rtol=1e-4)


def test_arviz_gets_no_draws_without_weight(draws):
    lost = Posterior(draws, jnp.full((CHAINS, DRAWS), -jnp.inf))
    with pytest.raises(ValueError, match="every weight is zero"):
        lost.to_arviz()


class OlderArviz:
    """Takes groups as keywords."""

    __version__ = "0.23.4"

    @staticmethod
    def from_dict(posterior, sample_stats):
        return NewerArviz.from_dict({"posterior": posterior, "sample_stats": sample_stats})


class NewerArviz:
    """Takes one dictionary of groups and makes an xarray DataTree, as ArviZ does from 1.0."""

    __version__ = "1.3.0"

    @staticmethod
    def from_dict(groups):
        def variable(name, value):
            dims = ["chain", "draw", *(f"{name}_dim_{i}" for i in range(value.ndim - 2))]
            return xarray.DataArray(value, dims=dims)

        datasets = {
            group: xarray.Dataset({name: variable(name, value) for name, value in variables.items()})
            for group, variables in groups.items()
        }
        return xarray.DataTree.from_dict(datasets)


@pytest.mark.parametrize("package", [OlderArviz, NewerArviz])
def test_arviz_of_either_version(reported, package, monkeypatch):
    monkeypatch.setattr(arviz_export, "import_extra", lambda *_: package)
    check_groups(reported.to_arviz(), reported)


def test_arviz_is_optional(equal, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "arviz", None)
    with pytest.raises(MissingExtraError, match=r"probinfer\[plots\]"):
        equal.to_arviz()


def test_a_posterior_is_shown_on_one_line(draws, log_weights):
    text = repr(Posterior(draws, log_weights=log_weights))
    assert (
        text
        == "Posterior(count, kernel.lengthscale[2], kernel.variance, label, layers.0[2x2]; 4 x 50 weighted draws)"
    )
    many = Posterior({f"x{i}": jnp.zeros((1, 2)) for i in range(20)}, info=Info(jnp.int32(0), 0, 0, 0))
    assert repr(many).endswith("x13, x14, x15, 12 more; 1 x 2 draws; OK)")
    assert jax.jit(lambda posterior: len(repr(posterior)))(many) > 0


def test_draws_by_name(equal, draws):
    np.testing.assert_array_equal(equal["count"], draws["count"])
    np.testing.assert_array_equal(equal["kernel.variance"], draws["kernel"].variance)
    assert equal["kernel"] is draws["kernel"]
    with pytest.raises(KeyError, match="did you mean 'count'"):
        equal["counts"]
    with pytest.raises(KeyError, match=r"there is count, kernel\.lengthscale"):
        equal["zzz"]
    np.testing.assert_array_equal(Posterior(draws["count"])["value"], draws["count"])
