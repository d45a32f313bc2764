"""The demo's section on calibration: are the posteriors of hyperparameters correct on simulated data?"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer import checks, gp, mcmc
from probinfer.core.types import Array, PRNGKey, Scalar
from probinfer.report.check_pages import could_have_seen, picture
from probinfer.report.html import Gallery, Paragraph, Section
from probinfer.report.tables import TextTable, number

__all__ = ["CheckedProcedure", "calibration_section", "calibration_table", "check_calibration"]

_X = np.linspace(-1.5, 1.5, 15)[:, None]
# Prior of log sd, log lengthscale and log noise sd.
_MEAN, _SD = np.array([0.0, 0.0, -1.0]), np.array([0.7, 0.5, 0.5])


class CheckedProcedure(NamedTuple):
    """The report of one check of one procedure.

    Attributes:
        procedure: name of the procedure.
        check: name of the check.
        report: report of the check.
        fault: a known fault of the procedure; "" if there is none.
    """

    procedure: str
    check: str
    report: Any
    fault: str = ""


def check_calibration(key: PRNGKey, num: int, *, progress: bool | None = None) -> list[CheckedProcedure]:
    """Learn the hyperparameters of simulated regressions, and rank the true ones among the draws.

    The checks are applied to the sampler and to a procedure with a known fault, which returns the prior.

    Args:
        key: random key.
        num: number of simulated data sets.
        progress: whether to show progress; None shows it on a terminal.
    """
    key_sbc, key_tarp, key_fault, key_prior, key_fault_tarp = jax.random.split(key, 5)
    sampler = mcmc.posterior_sampler(_log_joint, _init, num_warmup=200, num_draws=200, num_leapfrogs=10)
    densities: dict[str, Any] = {"log_prior_fn": _log_prior, "log_likelihood_fn": _log_likelihood}
    report = checks.sbc(
        key_sbc, _prior_sample, _simulate, sampler, num_simulations=num, progress=progress, **densities
    )
    parameters, x = report.theta, report.x
    coverage = checks.tarp(key_tarp, report.posteriors.draws, parameters, x)
    prior_draws = jax.vmap(jax.vmap(_prior_sample))(jax.random.split(key_prior, (num, 100)))
    prior_ranks = checks.uniformity(checks.rank_table(key_fault, prior_draws, parameters, num_projections=0))
    prior_coverage = checks.tarp(key_fault_tarp, prior_draws, parameters, x)
    fault = "ignores the data"
    return [
        CheckedProcedure("HMC", "SBC", report),
        CheckedProcedure("HMC", "TARP", coverage),
        CheckedProcedure("prior instead of posterior", "ranks of parameters", prior_ranks, fault),
        CheckedProcedure("prior instead of posterior", "TARP", prior_coverage, fault),
    ]


def calibration_table(results: list[CheckedProcedure]) -> TextTable:
    """Return one row for each procedure and check: the smallest detectable error, and the verdict."""
    rows = []
    for checked in results:
        pvalues = getattr(checked.report, "pvalues", None) or {"": checked.report.pvalue}
        verdict = {True: "passes", False: "fails", None: "cannot tell"}[checked.report.passed]
        if checked.fault:
            verdict = "fails as expected" if checked.report.passed is False else f"{verdict}: not detected"
        rows.append(
            (
                checked.procedure,
                checked.check,
                could_have_seen(checked.report),
                verdict,
                number(min(pvalues.values()), 2),
            )
        )
    columns = ("procedure", "check", "smallest detectable error", "verdict", "p")
    return TextTable("Calibration of the posteriors", columns, tuple(rows), text_columns=(1, 2, 3))


def calibration_section(results: list[CheckedProcedure], table: TextTable) -> Section:
    """Return the section: introduction, table, a plot for each check, and the verdicts in full."""
    posteriors = results[0].report.posteriors
    num = len(results[0].report.ranks.ranks)
    introduction = (
        f"The true hyperparameters of the data above are unknown; those of simulated data are known. In each of {num} "
        f"simulations, hyperparameters were drawn from a prior, {len(_X)} outputs from a Gaussian process with these "
        "hyperparameters, and draws from the posterior given the outputs. If the posterior is correct, the rank of the "
        "true value among the draws is uniformly distributed. The checks rank not only the parameters but also the "
        "densities and the distance to a point predicted from the data (TARP), because ranks of the parameters alone "
        "cannot detect every error: the prior, used instead of the posterior, passes them."
    )
    summary = f"Summary of the sampler: {posteriors!r}."
    pictures = tuple(
        picture(f"{checked.procedure}: {checked.check}", checked.report, width=4.3, height=3.1)
        for checked in results
    )
    verdicts = [
        Paragraph(f"{checked.procedure}, {checked.check}: {checked.report.verdict}.") for checked in results
    ]
    return Section(
        "Calibration of the posteriors on simulated data",
        (Paragraph(introduction), table._replace(title=""), Gallery(pictures), *verdicts, Paragraph(summary)),
    )


# Gaussian process regression with a squared-exponential kernel; parameters are log sd, log lengthscale, log noise sd


def _prior_sample(key: PRNGKey) -> dict[str, Array]:
    values = jnp.asarray(_MEAN) + jnp.asarray(_SD) * jax.random.normal(key, (3,))
    return {"log lengthscale": values[1], "log noise sd": values[2], "log sd": values[0]}


def _values(parameters: dict[str, Array]) -> Array:
    return jnp.stack([parameters["log sd"], parameters["log lengthscale"], parameters["log noise sd"]])


def _log_prior(parameters: dict[str, Array]) -> Scalar:
    return -0.5 * jnp.sum(((_values(parameters) - _MEAN) / _SD) ** 2)


def _model(parameters: dict[str, Array]) -> gp.Model:
    sd, lengthscale, noise = jnp.exp(_values(parameters))
    return gp.Model(gp.kernels.RBF(sd**2, lengthscale), gp.likelihoods.Gaussian(noise**2))


def _simulate(key: PRNGKey, parameters: dict[str, Array]) -> Array:
    model = _model(parameters)
    X = jnp.asarray(_X)
    covariance = model.kernel.gram(X) + model.likelihood.variance * jnp.eye(len(_X))
    return jnp.linalg.cholesky(covariance) @ jax.random.normal(key, (len(_X),))


def _log_likelihood(parameters: dict[str, Array], y: Array) -> Scalar:
    return gp.log_evidence(_model(parameters), jnp.asarray(_X), y, gp.Exact())


def _log_joint(parameters: dict[str, Array], y: Array) -> Scalar:
    return _log_prior(parameters) + _log_likelihood(parameters, y)


def _init(key: PRNGKey, y: Array) -> dict[str, Array]:
    del y
    return _prior_sample(key)
