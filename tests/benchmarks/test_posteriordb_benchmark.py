"""The numbers of the posteriordb table: errors, weights, failures, and results of earlier runs."""

import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import posteriordb as benchmark
import posteriordb_plot
import pytest

from probinfer import vi
from probinfer.app.pages.engines import find_engine
from probinfer.core.status import Status
from probinfer.inference.posterior import Posterior

RNG = np.random.default_rng(2)
STORED = {"b": 3 + 2 * RNG.normal(size=(2, 200, 2)), "a": RNG.normal(size=(2, 200))}


def reference_of(stored):
    names, values = benchmark.columns(stored)
    both = benchmark.functions(values)
    sd = both.std(axis=(1, 2))
    mcse = benchmark.monte_carlo_error(both) / sd
    return {
        "names": names,
        "mean": both.mean(axis=(1, 2)),
        "sd": sd,
        "mcse": mcse,
        "facts": {"posterior": "toy"},
    }


REFERENCE = reference_of(STORED)


def test_columns_name_the_elements():
    names, values = benchmark.columns({"m": np.arange(8.0).reshape(1, 2, 2, 2), "a": np.zeros((1, 2))})
    assert names == ["a", "m[1][1]", "m[1][2]", "m[2][1]", "m[2][2]"]
    np.testing.assert_array_equal(values[0, 1], [0, 4, 5, 6, 7])


def test_errors_are_in_standard_deviations_of_the_reference():
    shift = 0.5 * STORED["b"][..., 1].std()
    draws = {"a": STORED["a"], "b": STORED["b"] + np.array([0, shift]), "more": np.full((2, 200), 1e9)}
    result = benchmark.accuracy(Posterior(draws), REFERENCE)
    assert result["mean of"] == result["second moment of"] == "b[2]"
    np.testing.assert_allclose(result["mean"], 0.5, rtol=1e-9)
    squares = STORED["b"][..., 1] ** 2, (STORED["b"][..., 1] + shift) ** 2
    expected = (squares[1].mean() - squares[0].mean()) / squares[0].std()
    np.testing.assert_allclose(result["second moment"], expected, rtol=1e-9)
    assert result["mean, median"] == pytest.approx(0, abs=1e-12)
    # 400 independent draws on either side: errors of 0.05 each, 0.5 is 7 of both; ESS estimates are good to a fifth
    assert result["mean, reference MCSE"] == pytest.approx(0.05, rel=0.3)
    assert result["z"] == pytest.approx(0.5 / np.hypot(0.05, 0.05), rel=0.3)


def test_weights_count():
    both = {name: np.concatenate([value, value + 7], axis=1) for name, value in STORED.items()}
    log_weights = jnp.where(jnp.arange(400) < 200, 0.0, -jnp.inf) * jnp.ones((2, 1))
    result = benchmark.accuracy(Posterior(both, log_weights=log_weights), REFERENCE)
    assert max(result["mean"], result["second moment"]) < 1e-9
    assert "z" not in result


def test_the_error_of_weighted_draws_is_that_of_chains():
    """Of 2000 repetitions of five weighted chains: the error is the standard deviation of the estimate."""
    rng = np.random.default_rng(7)
    estimates, errors = [], []
    for _ in range(2000):
        values = rng.normal(3, 1, size=(1, 5, 20, 1)) + rng.normal(size=(1, 5, 1, 1))
        log_weights = 0.3 * rng.normal(size=(5, 1)) + np.zeros((5, 20))
        weights = np.exp(log_weights).ravel() / np.exp(log_weights).sum()
        estimates.append(np.sum(weights * values.ravel()))
        errors.append(benchmark.own_error(values, weights, True)[0, 0])
    # mean square error against variance: each is known to 3 %; the delta method is short by some per cent at five
    assert np.mean(np.square(errors)) / np.var(estimates) == pytest.approx(1, abs=0.2)
    assert benchmark.own_error(np.zeros((2, 3, 20, 1)), np.full(60, 1 / 60), True) is None
    assert benchmark.own_error(np.zeros((2, 1, 1, 1)), np.ones(1), False) is None


def test_draws_that_are_not_finite_are_the_largest_error():
    draws = {"a": STORED["a"], "b": np.full((2, 200, 2), np.nan)}
    result = benchmark.accuracy(Posterior(draws), REFERENCE)
    assert not np.isfinite(result["mean"])
    assert benchmark.verdict([{"engine": "nuts", "posterior": "toy", **result}]).endswith(
        "(largest inf); not toy"
    )


class Fails:
    def sample(self, key, target, *, progress):
        warnings.warn("it looks bad", UserWarning, stacklevel=2)
        raise FloatingPointError("no good\nsecond line")


def test_an_engine_that_fails_is_a_row(key):
    entry = find_engine("hmc")._replace(make=lambda draws: Fails())
    row = benchmark.run(key, entry, REFERENCE | {"target": None}, 10)
    assert row["status"] == "FloatingPointError: no good"
    assert row["warnings"] == ["it looks bad"]
    cells = benchmark.table_row(row)
    assert len(cells) == len(benchmark.HEADER)
    assert cells[0] == "HMC"
    assert cells[1] == "-"
    assert cells[-1] == "FloatingPointError: no good"


class Repeats:
    """Return the reference draws."""

    def sample(self, key, target, *, progress):
        info = vi.VIInfo(*[jnp.float64(0.25)] * 10)._replace(status=Status.OK, num_gradients=7)
        return Posterior(STORED, info=info, unconstrained=jax.tree.map(jnp.asarray, STORED))


def test_a_row(key):
    entry = find_engine("full-rank")._replace(make=lambda draws: Repeats())
    reference = REFERENCE | {"target": None, "positions": jax.tree.map(jnp.asarray, STORED)}
    row = benchmark.run(key, entry, reference, 10)
    assert row["posterior"] == "toy"
    assert row["engine"] == "full-rank"
    assert row["gradients"] == 7
    assert row["k-hat"] == 0.25
    assert max(row["mean"], row["second moment"]) < 1e-9
    assert row["MMD2"] < 0  # unbiased, and the two sets are the same
    assert row["MMD p"] > 0.9
    assert benchmark.table_row(row)[-1] == "OK, k-hat 0.25"


def test_a_refusal_of_the_check_is_not_the_status_of_the_engine(key, monkeypatch):
    def refuse(*args):
        raise ValueError("cannot tell: too few draws\nmore")

    monkeypatch.setattr(benchmark, "discrepancy", refuse)
    entry = find_engine("full-rank")._replace(make=lambda draws: Repeats())
    row = benchmark.run(key, entry, REFERENCE | {"target": None}, 10)
    assert row["status"] == "OK"
    assert row["MMD refused"] == "cannot tell: too few draws"
    cells = benchmark.table_row(row)
    assert cells[benchmark.HEADER.index("1000 MMD²")] == "refused"
    assert cells[-1] == "OK, k-hat 0.25"


def test_names_of_models_that_are_not_unique_are_given_in_full():
    assert posteriordb_plot.short_names(["arK-arK", "sblrc-blr", "sblri-blr"]) == [
        "arK",
        "sblrc-blr",
        "sblri-blr",
    ]


def test_one_draw_has_no_discrepancy(key):
    point = Posterior({"a": jnp.zeros((1, 1))}, unconstrained={"a": jnp.zeros((1, 1))})
    assert benchmark.discrepancy(key, point, REFERENCE) == {}


@pytest.mark.slow
def test_discrepancy_of_weighted_draws(key):
    """Distant draws have weight zero; with equal weights, the squared MMD would exceed 0.2."""
    both = {name: jnp.concatenate([value, value + 70], axis=1) for name, value in STORED.items()}
    log_weights = jnp.where(jnp.arange(400) < 200, 0.0, -jnp.inf) * jnp.ones((2, 1))
    weighted = Posterior(both, log_weights=log_weights, unconstrained=both)
    reference = REFERENCE | {"positions": jax.tree.map(jnp.asarray, STORED)}
    assert abs(benchmark.discrepancy(key, weighted, reference)["MMD2"]) < 0.01


def test_thinned_draws():
    draws = {"a": jnp.arange(20_000.0).reshape(2, 10_000)}
    assert benchmark.thinned(draws)["a"].shape == (2, 1250)
    one = {"a": jnp.arange(10_000.0)[None], "b": jnp.zeros((1, 10_000, 3))}
    assert benchmark.thinned(one).shape == (2500, 4)


def test_verdict_names_what_is_not_good():
    rows = [
        {"engine": "nuts", "posterior": "x", "mean": 0.02, "second moment": 0.05},
        {"engine": "nuts", "posterior": "y", "mean": 0.03, "second moment": 0.1},
        {"engine": "map", "posterior": "x", "mean": 3.0, "second moment": 3.0},
        {"engine": "nuts", "posterior": "z"},
    ]
    assert benchmark.verdict(rows[:1]).startswith("NUTS: 1 of 1 ")
    assert benchmark.verdict(rows[:2]).endswith("(largest 0.1); not y")
    assert "1 of 3" in benchmark.verdict(rows)
    assert benchmark.verdict(rows[2:3]) == "NUTS did not run"


def test_results_of_other_engines_and_posteriors_are_kept():
    old = {
        "posteriors": [{"posterior": "sblri-blr"}, {"posterior": "arK-arK", "dimension": 6}],
        "rows": [
            {"posterior": "arK-arK", "engine": "map", "mean": 1},
            {"posterior": "sblri-blr", "engine": "nuts", "mean": 2},
            {"posterior": "arK-arK", "engine": "nuts", "mean": 3},
        ],
    }
    rows = [{"posterior": "arK-arK", "engine": "map", "mean": 4}]
    result = benchmark.merged(old, {"posterior": "arK-arK", "dimension": 7}, rows)
    assert result["posteriors"] == [{"posterior": "arK-arK", "dimension": 7}, {"posterior": "sblri-blr"}]
    assert [row["mean"] for row in result["rows"]] == [3, 4, 2]


def test_own_report_of_islands():
    one = jnp.array(1.001)
    info = SimpleNamespace(
        status=jnp.int32(int(Status.OK)),
        rhat=one,
        ess=one,
        num_gradients=7,
        log_evidence_error=jnp.array(0.02),
        temperatures=jnp.array([0.5, 1.0]),
        start="prior",
    )
    result = benchmark.own_report(SimpleNamespace(info=info, log_evidence=jnp.array(-3.0)))
    assert (result["log evidence"], result["levels"], result["starts from"]) == (-3.0, 2, "prior")
    cells = benchmark.table_row({"engine": "tempered", **result})
    assert "log Z -3.000 ± 0.020" in cells[-1]


def test_own_report_of_chains():
    info = SimpleNamespace(
        status=jnp.int32(int(Status.OK)),
        rhat={"a": jnp.array(1.002), "b": jnp.array([1.0, 1.01])},
        ess={"a": jnp.array(900.0), "b": jnp.array([500.0, 700.0])},
        diverging=np.array([[True, False], [True, False]]),
        metric_name="dense",
        num_leapfrogs=np.array([[3, 4]]),
        num_warmup_gradients=10,
        num_dropped_starts=jnp.int32(3),
    )
    result = benchmark.own_report(SimpleNamespace(info=info))
    assert result["R-hat"] == pytest.approx(1.01)
    assert result["dropped starts"] == 3
    assert (result["ESS"], result["divergences"], result["metric"], result["gradients"]) == (
        500.0,
        2,
        "dense",
        17,
    )
