"""Reports: the page shows the computed numbers, plots are embedded, scores have correct standard errors."""

import base64
import dataclasses
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from probinfer import data, gp
from probinfer.app.pages import engines, methods, plots, sections, units
from probinfer.core.errors import NumericalError
from probinfer.core.status import Status
from probinfer.plots import style as theme
from probinfer.report import html, scoring, tables
from tests.quick_engine import Cloud

VOID = {"meta", "img", "source", "br", "link"}


class Checker(HTMLParser):
    """Collect the tags, and fail if a tag is closed that was not open."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.cells = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("img", "source"):
            self.images.append(attrs.get("src") or attrs.get("srcset"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(text)


def check_page(text):
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    X = rng.uniform(0, 10, (40, 2))
    y = 20 + 5 * np.sin(X[:, 0]) + 0.3 * rng.normal(size=40)
    table = data.Dataset(
        name="toy",
        X=X,
        y=y,
        feature_names=("time", "idle"),
        target_name="height (m)",
        description="Toy.",
        source="made up",
        license="none",
    )
    model = gp.Model(gp.kernels.RBF(variance=1.0, lengthscale=jnp.ones(2)), gp.likelihoods.Gaussian(0.1))
    prior = gp.default_prior(model, (X - X.mean(0)) / X.std(0))
    return methods.RegressionProblem(
        data=table,
        train=np.arange(30),
        test=np.arange(30, 40),
        model=model,
        prior=prior,
        parts={"kernel": "wave"},
    )


class Broken:
    """An engine that fails."""

    def sample(self, key, target, *, progress=None, checkpoint=None):
        raise NumericalError("nothing found", Status.NON_FINITE)


@pytest.fixture(scope="module")
def results(problem):
    chosen = [
        engines.find_engine("nuts")._replace(make=lambda draws: Cloud()),
        engines.find_engine("map"),
        engines.find_engine("ml2")._replace(make=lambda draws: Broken()),
    ]
    finished = []
    result = methods.run_methods(
        jax.random.key(0), problem, chosen, draws=20, progress=False, done=finished.append
    )
    assert [method.entry.name for method in finished] == [method.entry.name for method in result]
    return result


@pytest.mark.slow
def test_methods_table_holds_the_scores(problem, results):
    nuts, point, broken = results
    table = methods.methods_table(problem, results, title="t")
    assert [row[0] for row in table.rows] == ["NUTS", "MAP", "ML-II", "no inputs"]
    assert table.rows[2][1] == "failed"
    assert "nothing found" in broken.remark
    assert nuts.remark == "these are prior draws"
    # Computed from the fits: the mixture density of NUTS and the normal of MAP.
    X, y = problem.data.X[30:], problem.data.y[30:]
    log_densities = [np.asarray(method.fit.log_prob(X, y)) for method in (nuts, point)]
    for row, log_density in zip(table.rows, log_densities):
        value, error = (float(part) for part in row[1].split(" ± "))
        assert value == pytest.approx(-log_density.mean(), abs=0.05 * error)
        assert error == pytest.approx(log_density.std(ddof=1) / np.sqrt(10), rel=0.05)
    value, error = (float(part) for part in table.rows[1][2].split(" ± "))
    gaps = log_densities[0] - log_densities[1]
    assert value == pytest.approx(gaps.mean(), abs=0.05 * error)
    assert error == pytest.approx(gaps.std(ddof=1) / np.sqrt(10), rel=0.05)
    mean = np.asarray(point.fit.predict_y(X).mean)
    assert float(table.rows[1][3].split(" ± ")[0]) == pytest.approx(
        np.sqrt(np.mean((mean - y) ** 2)), rel=0.1
    )
    assert table.rows[1][5] == f"{float(point.fit.log_evidence):.1f} at optimum"
    assert table.rows[0][5] == "-"


def test_bound_is_in_the_units_of_the_data(results):
    point = results[1].fit
    info = type("Info", (), {"elbo": jnp.asarray(-12.0)})()
    bounded = dataclasses.replace(point, log_evidence=None, info=info)
    expected = -12.0 - 30 * float(np.log(point.scaling.y_scale))
    assert methods.evidence(bounded) == f"≥ {expected:.1f} (bound)"


def test_chains_table_is_the_engines_own_verdict(results):
    table = methods.chains_table(results)
    assert len(table.rows) == 1
    info = results[0].fit.info
    max_rhat = max(float(np.max(leaf)) for leaf in jax.tree.leaves(info.rhat))
    assert table.rows[0][:4] == ("NUTS", "2", "20", f"{max_rhat:.3f}")


def test_hyperparameters_in_the_units_of_the_data(problem, results):
    point = results[1].fit
    names = units.learned_names(problem.model, problem.prior)
    by_name = {
        q.name: q for q in units.quantities(point, names, problem.data.feature_names, target="height (m)")
    }
    kernel, scaling = point.model.kernel, point.scaling
    time = by_name["kernel.lengthscale[0]"]
    assert time.label == "lengthscale of time"
    assert time.unit == "time"
    np.testing.assert_allclose(time.values, kernel.lengthscale[0] * scaling.x_scale[0])
    noise = by_name["likelihood.variance"]
    np.testing.assert_allclose(noise.values, np.sqrt(point.model.likelihood.variance) * scaling.y_scale)
    assert noise.positive
    size = by_name["kernel.variance"]
    np.testing.assert_allclose(size.values, np.sqrt(kernel.variance) * scaling.y_scale)
    assert units.most_relevant(point, 1) == [int(np.argmin(kernel.lengthscale))]


def test_a_lengthscale_beyond_all_data_has_no_effect(problem, results):
    point = results[1].fit
    longer = jax.tree.map(lambda leaf: leaf.at[:, 0].set(1e5) if leaf.ndim == 2 else leaf, point.models)
    changed = dataclasses.replace(point, models=longer)
    listed = units.quantities(changed, ["kernel.lengthscale"], problem.data.feature_names)
    assert [item.irrelevant for item in listed] == [True] + [False] * (len(listed) - 1)
    rows = sections.values_table(listed, title="").rows
    assert rows[0][1] == "no effect"
    assert rows[1][1] != "no effect"


def test_only_what_was_learned_is_listed_and_pure_numbers_stay(problem):
    K = gp.kernels
    kernel = K.Periodic(period=0.5) * K.RBF(variance=1.0) + K.Linear() + K.RationalQuadratic().on(1)
    model = gp.Model(kernel, gp.likelihoods.Gaussian(0.1))
    prior = gp.replace(
        gp.default_prior(model, problem.data.X), {"kernel.terms.0.factors.1.variance": gp.fixed}
    )
    names = units.learned_names(model, prior)
    assert "kernel.terms.0.factors.1.variance" not in names
    models = jax.tree.map(lambda leaf: leaf[None], model)
    scaling = gp.model.scaling.standardization(problem.data.X, problem.data.y, outputs=True)
    fit = gp.Fit(models, None, None, None, gp.Exact(), scaling, problem.data.X, problem.data.y, True)
    by_name = {q.name: q for q in units.quantities(fit, names, ("a", "b"), parts={"kernel.terms.0": "cycle"})}
    assert by_name["kernel.terms.0.factors.0.variance"].unit == "y"  # the other factor has variance one
    assert by_name["kernel.terms.0.factors.0.lengthscale"].label == "cycle: smoothness within a period"
    assert by_name["kernel.terms.0.factors.0.lengthscale"].unit == ""
    assert by_name["kernel.terms.1.variance"].unit == ""  # a variance of slopes
    restricted = by_name["kernel.terms.2.kernel.lengthscale"]
    assert restricted.unit == "b"
    np.testing.assert_allclose(restricted.values, scaling.x_scale[1])


def test_page_is_whole(tmp_path, problem, results):
    shown = methods.methods_table(problem, results, title="Scores <b>")
    pictures = sections.score_pictures(problem, results, unit="height (m)")
    pictures += sections.hyperparameters(problem, results)
    pictures += sections.effects(results[0].fit, problem.data.X, ("time", "idle"), chosen=[0, 1])
    blocks = (html.Paragraph("a < b & c"), shown, sections.legend(results), sections.gallery(pictures))
    text = html.page("Title & more", "lead", [html.Section("One", blocks)], [("seed", "7")])
    path = html.write_page(tmp_path / "new" / "folder", text)
    assert path.read_text(encoding="utf-8") == text
    checker = check_page(text)
    assert "http://" not in re.sub(r"data:[^\"]+", "", text)
    assert "https://" not in re.sub(r"data:[^\"]+", "", text)
    assert [cell for row in shown.rows for cell in row] == checker.cells[len(shown.columns) : -2]
    assert checker.cells[-2:] == ["seed", "7"]
    assert len(checker.images) == 2 * len(pictures)
    for uri in checker.images:
        head, body = uri.split(",", 1)
        assert head == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(body)).tag.endswith("svg")


@pytest.mark.slow
def test_series_and_error_pictures(problem, results):
    one = problem._replace(data=problem.data._replace(X=problem.data.X[:, :1], feature_names=("time",)))
    model = gp.Model(gp.kernels.RBF(), gp.likelihoods.Gaussian(0.1))
    X, y = one.data.X[:30], one.data.y[:30]
    scaling = gp.model.scaling.standardization(X, y, outputs=True)
    models = jax.tree.map(lambda leaf: leaf[None], model)
    fit = gp.Fit(
        models,
        None,
        None,
        None,
        gp.Exact(),
        scaling,
        jnp.asarray(scaling.inputs(X)),
        jnp.asarray(scaling.outputs(y)),
        True,
    )
    predicted = scoring.predictions(fit, one.data.X[30:], one.data.y[30:])
    method = results[1]._replace(fit=fit, predicted=predicted)
    picture = sections.series_picture(one, method, points=20)
    ElementTree.fromstring(picture.light)
    assert picture.light != picture.dark
    assert theme.LIGHT.ink in picture.light
    assert theme.DARK.ink in picture.dark
    (errors,) = sections.error_pictures(one, [method])
    ElementTree.fromstring(errors.dark)


def test_verdict_says_who_is_worse_and_who_is_too_sure(problem, results):
    nuts = results[0]
    # An overconfident copy: the same mean, a thirtieth of the standard deviation.
    y, mean, sd = nuts.predicted.y, nuts.predicted.mean, nuts.predicted.sd / 30
    quantiles = {level: mean + sd * norm.ppf(level) for level in nuts.predicted.quantiles}
    bold = scoring.Predictions(mean, sd, quantiles, y, norm.logpdf(y, mean, sd), norm.cdf(y, mean, sd))
    text = sections.verdict(problem, [nuts, results[1]._replace(predicted=bold)])
    assert "Clearly worse than NUTS on held-out data: MAP." in text
    assert "MAP is overconfident" in text
    assert sections.verdict(problem, [nuts, results[1]._replace(predicted=nuts.predicted)]).startswith(
        "No clear difference"
    )
    assert sections.verdict(problem, [results[2]]).startswith("No method succeeded")


def test_scores_of_a_known_normal():
    y = np.array([0.0, 1.0, -3.0, 0.5])
    mean, sd = np.zeros(4), np.ones(4)
    quantiles = {level: np.full(4, norm.ppf(level)) for level in (0.025, 0.05, 0.25, 0.5, 0.75, 0.95, 0.975)}
    predicted = scoring.Predictions(mean, sd, quantiles, y, norm.logpdf(y), norm.cdf(y))
    values = scoring.scores(predicted)
    assert values.nlpd.value == pytest.approx(-norm.logpdf(y).mean())
    assert values.rmse.value == pytest.approx(np.sqrt(np.mean(y**2)))
    assert values.coverage.value == 0.75
    assert values.rmse.error == pytest.approx(np.std(y**2, ddof=1) / 2 / (2 * values.rmse.value))
    # Two blocks: the error comes from two means.
    means = [-norm.logpdf(y[:2]).mean(), -norm.logpdf(y[2:]).mean()]
    assert scoring.scores(predicted, block=2).nlpd.error == pytest.approx(np.std(means, ddof=1) / np.sqrt(2))
    both = scoring.concatenate([predicted, predicted])
    assert scoring.scores(both).nlpd.value == pytest.approx(values.nlpd.value)
    assert scoring.difference(predicted, predicted) == scoring.Estimate(0.0, 0.0)
    with pytest.raises(ValueError, match="same outcomes"):
        scoring.difference(predicted, both)
    baseline = scoring.normal_baseline(np.array([1.0, 3.0]), np.array([2.0]))
    assert baseline.log_density[0] == pytest.approx(norm.logpdf(2.0, 2.0, np.sqrt(2)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234567.0, "1234567"),
        (123.456, "123"),
        (1.23456, "1.23"),
        (0.00123456, "0.00123"),
        (1e-9, "1.00e-09"),
        (1e30, "1.00e+30"),
        (None, "-"),
        (np.nan, "-"),
        (np.inf, "inf"),
    ],
)
def test_numbers(value, text):
    assert tables.number(value) == text


def test_errors_decide_the_digits():
    E = scoring.Estimate
    assert tables.with_error(E(5.4321, 0.0567)) == "5.432 ± 0.057"
    assert tables.with_error(E(54.321, 2.67)) == "54.3 ± 2.7"
    assert tables.with_error(E(1234.5, 67.8)) == "1234 ± 68"
    assert tables.with_error(E(0.01, 0.004), sign=True) == "+0.0100 ± 0.0040"
    assert tables.with_error(E(0.947, 0.019), scale=100.0) == "94.7 ± 1.9"
    assert tables.with_error(E(1.0, 0.0)) == "1 ± 0"
    assert tables.with_error(E(1.0, np.nan)) == "1"
    assert tables.with_error(None) == "-"
    assert tables.seconds(0.84) == "0.8 s"
    assert tables.seconds(71.0) == "71 s"
    assert tables.seconds(185.0) == "3 min 5 s"


def test_rich_table_has_every_cell():
    from rich.console import Console

    table = tables.TextTable("T", ("a", "b", "c"), (("x", "1", "w"), ("y", "22", "ww")), "note", 0, (2,))
    console = Console(width=60, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(tables.to_rich(table))
    text = console.export_text()
    assert all(cell in text for row in table.rows for cell in row)
    assert "note" in text


def test_point_estimates_beyond_the_axis_are_marked():
    rng = np.random.default_rng(0)
    curves = [
        plots.Curve("draws", 0, np.exp(rng.normal(size=200))),
        plots.Curve("far", 1, np.array([np.inf])),
        plots.Curve("near", 2, np.array([1.5])),
    ]
    picture = theme.draw(
        "t", "c", lambda a, t: plots.densities(a, t, curves, label="x", positive=True, legend=True)
    )
    ElementTree.fromstring(picture.light)
    rows = theme.draw("t", "c", lambda a, t: plots.intervals(a, t, [("one", curves)], label="x"))
    ElementTree.fromstring(rows.dark)
    assert picture.width == round(4.6 * 96)
    real = [plots.Curve("real", 0, rng.normal(size=50)), plots.Curve("point", 3, np.array([0.1]))]
    theme.draw("t", "c", lambda a, t: plots.densities(a, t, real, label="x", positive=False))


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"probinfer\[plots\]"):
        theme.draw("t", "c", lambda axes, theme: None)


def test_engine_table():
    assert engines.engine_names()[0] == "nuts"
    assert len(set(engines.engine_names())) == len(engines.ENGINES)
    shown = [entry for entry in engines.ENGINES if entry.in_demo]
    assert len({entry.style for entry in shown}) == len(shown)
    assert {entry.name for entry in engines.target_engines()} == set(engines.engine_names()) - {"ml2"}
    assert all(hasattr(entry.make(10), "sample") for entry in engines.ENGINES)
    for draws in (10, 512, 2500):  # as many in all as four chains have, islands of a multiple of 8
        tempered = engines.find_engine("tempered").make(draws)
        assert 4 * draws <= tempered.num_islands * tempered.num_particles < 4 * draws + 300
    with pytest.raises(ValueError, match="nuts, full-rank"):
        engines.find_engine("gibbs")


def test_count_gradients():
    """The fields of the three kinds of reports, and of one that does not say."""
    chains = SimpleNamespace(num_warmup_gradients=5, num_leapfrogs=np.array([[3, 4], [1, 7]]))
    assert engines.count_gradients(chains) == 20
    assert engines.count_gradients(SimpleNamespace(num_evaluations=np.array([6, 1]))) == 7
    assert engines.count_gradients(SimpleNamespace(num_gradients=np.int32(9), num_evaluations=3)) == 9
    assert engines.count_gradients(SimpleNamespace(num_leapfrogs=np.ones(4))) is None
