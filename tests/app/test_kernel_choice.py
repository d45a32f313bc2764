"""The demo's kernel choice: probabilities, numbers and plots of the page, kernels whose fit fails."""

import base64
from types import SimpleNamespace
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from probinfer import data, gp
from probinfer.app.demo import kernel_choice
from probinfer.app.demo.kernel_choice import CandidateKernel, KernelEvidence
from probinfer.core.errors import NumericalError
from probinfer.core.status import Status
from probinfer.inference.posterior import Posterior
from probinfer.report import html
from probinfer.report.scoring import Estimate
from tests.app.test_regression_report import check_page

TABLE = data.nile().take(np.arange(16))
LOGS, ERRORS = np.array([-120.0, -118.0, -118.5]), np.array([0.05, 0.1, 0.2])


def fitted(kernel):
    """A fit with four hyperparameter values around the initial ones, as an engine would return it."""
    scaling = gp.model.scaling.standardization(TABLE.X, TABLE.y, outputs=True)
    model = gp.Model(kernel, gp.likelihoods.Gaussian(0.5))
    factors = jnp.asarray([0.5, 0.9, 1.1, 2.0])
    models = jax.tree.map(lambda leaf: leaf * factors, model)
    info = SimpleNamespace(
        temperatures=np.array([0.1, 1.0]),
        particle_ess=np.full((8, 2), 50.0),
        log_evidences=np.zeros(8),
        num_gradients=3,
        num_densities=1234,
    )
    X, y = jnp.asarray(scaling.inputs(TABLE.X)), jnp.asarray(scaling.outputs(TABLE.y))
    posterior = Posterior({"x": jnp.zeros((8, 100))}, log_weights=jnp.zeros((8, 100)))
    return gp.Fit(models, posterior, None, info, gp.Exact(), scaling, X, y, False)


@pytest.fixture(scope="module")
def results():
    return [
        KernelEvidence(
            candidate=kernel, fit=fitted(kernel.kernel), log_evidence=Estimate(log, error), seconds=7.0
        )
        for kernel, log, error in zip(kernel_choice.KERNELS, LOGS, ERRORS)
    ]


def test_probabilities_and_their_intervals(results):
    shares = kernel_choice.probabilities(results)
    np.testing.assert_allclose(shares[:, 0], special.softmax(LOGS), rtol=1e-12)
    assert np.all((shares[:, 1] < shares[:, 0]) & (shares[:, 0] < shares[:, 2]))
    # two kernels of which one is exact: the interval is that of Student's t with 7 degrees of freedom, 2.365 errors
    pair = [
        results[0]._replace(log_evidence=Estimate(0.0, 0.0)),
        results[1]._replace(log_evidence=Estimate(0.0, 0.3)),
    ]
    ends = special.logit(kernel_choice.probabilities(pair)[1, 1:]) / 0.3
    np.testing.assert_allclose(ends, [-2.365, 2.365], atol=0.25)  # quantiles of 4000: sd .06


def test_the_conclusion_states_its_uncertainty(results):
    text = kernel_choice.conclusion(results)
    assert text.startswith("The Matérn 5/2 kernel")
    assert "do not decide between the kernels" in text
    sure = [results[0], results[1]._replace(log_evidence=Estimate(-90.0, 0.1))]
    assert "clearly the most probable, with probability 100 %" in kernel_choice.conclusion(sure)
    assert "do not decide" not in kernel_choice.conclusion(sure)
    assert "Only the" in kernel_choice.conclusion(results[:1])


def test_the_section_has_every_number_and_picture(results):
    failed = KernelEvidence(
        candidate=CandidateKernel("odd", None, "nothing"),
        fit=None,
        log_evidence=None,
        seconds=2.0,
        remark="failed: <no> start",
    )
    all_results = [*results, failed]
    scores = kernel_choice.evidence_table(all_results)
    assert scores.rows[0][2] == "-120.000 ± 0.050"
    assert scores.rows[1][3] == f"{100 * special.softmax(LOGS)[1]:.0f} %"
    assert scores.rows[1][5:] == ("2", "1237", "7.0 s")
    assert scores.rows[3] == ("odd", "nothing", "failed", "-", "-", "-", "-", "2.0 s")
    section = kernel_choice.evidence_section(TABLE, all_results, scores)
    page = check_page(html.page("t", "l", [section], []))
    assert len(page.images) == 2 * (2 + 3 + 1)
    for uri in page.images:
        ElementTree.fromstring(base64.b64decode(uri.split(",", 1)[1]))
    assert all(cell in page.cells for row in scores.rows for cell in row)
    failed_section = kernel_choice.evidence_section(TABLE, [failed], kernel_choice.evidence_table([failed]))
    assert check_page(html.page("t", "l", [failed_section], [])).images == []


def test_a_kernel_that_fails_does_not_stop_the_others(monkeypatch):
    def broken(*arguments, **settings):
        raise NumericalError("nothing found", Status.NON_FINITE)

    monkeypatch.setattr(kernel_choice.gp, "fit", broken)
    finished = []
    table, results = kernel_choice.estimate_evidence(jax.random.key(0), 32, rows=10, done=finished.append)
    assert len(table.y) == 10
    assert [one.fit for one in finished] == [None] * 3
    assert results[2].remark == "failed: nothing found"
