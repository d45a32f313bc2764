"""The demo's last page: is its way of learning right? What was checked, what could have been seen, what was seen."""

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

__all__ = ["Judged", "calibration_section", "calibration_table", "judge_learning"]

_X = np.linspace(-1.5, 1.5, 15)[:, None]
_MEAN, _SPREAD = (
    np.array([0.0, 0.0, -1.0]),
    np.array([0.7, 0.5, 0.5]),
)  # of log sd, log lengthscale, log noise sd


class Judged(NamedTuple):
    """One procedure under one check.

    Attributes:
        procedure: what was judged.
        check: by what.
        report: of the check.
        fault: what is known to be wrong with it; "" if nothing is.
    """

    procedure: str
    check: str
    report: Any
    fault: str = ""


def judge_learning(key: PRNGKey, num: int, *, progress: bool | None = None) -> list[Judged]:
    """Learn the hyperparameters of simulated regressions, and ask where the true ones are among the draws.

    Beside the sampler stands a planted fault: the prior, passed off as the posterior.

    Args:
        key: random key.
        num: simulated data sets.
        progress: a bar; None means on a terminal.
    """
    key_sbc, key_tarp, key_fault, key_prior, key_last = jax.random.split(key, 5)
    sampler = mcmc.posterior_sampler(_log_joint, _start, num_warmup=200, num_draws=200, num_leapfrogs=10)
    densities: dict[str, Any] = {"log_prior_fn": _log_prior, "log_likelihood_fn": _log_likelihood}
    report = checks.sbc(
        key_sbc, _prior_sample, _simulate, sampler, num_simulations=num, progress=progress, **densities
    )
    theta, x = report.theta, report.x
    coverage = checks.tarp(key_tarp, report.posteriors.draws, theta, x)
    draws = jax.vmap(jax.vmap(_prior_sample))(jax.random.split(key_prior, (num, 100)))
    alone = checks.uniformity(checks.rank_table(key_fault, draws, theta, num_projections=0))
    caught = checks.tarp(key_last, draws, theta, x)
    fault = "has not looked at the data"
    return [
        Judged("HMC", "SBC", report),
        Judged("HMC", "TARP", coverage),
        Judged("the prior as posterior", "parameters alone", alone, fault),
        Judged("the prior as posterior", "TARP", caught, fault),
    ]


def calibration_table(found: list[Judged]) -> TextTable:
    """One row a procedure and check: what could have been seen, what was seen."""
    rows = []
    for one in found:
        pvalues = getattr(one.report, "pvalues", None) or {"": one.report.pvalue}
        word = {True: "passes", False: "fails", None: "cannot tell"}[one.report.passed]
        if one.fault:
            word += ", as it should" if one.report.passed is False else ": does not see it"
        rows.append(
            (one.procedure, one.check, could_have_seen(one.report), word, number(min(pvalues.values()), 2))
        )
    columns = ("what was checked", "by", "smallest error that it could have seen", "what it saw", "p")
    return TextTable("Is the learning right?", columns, tuple(rows), text_columns=(1, 2, 3))


def calibration_section(found: list[Judged], table: TextTable) -> Section:
    """The story, the table, a plot for each check, and the verdicts in full."""
    posteriors = found[0].report.posteriors
    num = len(found[0].report.ranks.ranks)
    story = (
        f"Nobody knows the true hyperparameters of the data above. Of simulated data they are known: {num} times "
        f"hyperparameters were drawn from a prior, {len(_X)} outputs from a Gaussian process with them, and the "
        "posterior of the hyperparameters given the outputs. If the posterior is right, the true values stand "
        "anywhere among their draws with equal probability. Not only the parameters are ranked but also the "
        "densities and the distance to a point predicted from the data (TARP), because ranks of parameters alone "
        "are blind: the prior, passed off as the posterior, passes them."
    )
    cost = f"What the sampler reports: {posteriors!r}."
    pictures = tuple(
        picture(f"{one.procedure}: {one.check}", one.report, width=4.3, height=3.1) for one in found
    )
    said = [Paragraph(f"{one.procedure}, {one.check}: {one.report.verdict}.") for one in found]
    return Section(
        "Is it right? What was checked, what it could have seen, what it saw",
        (Paragraph(story), table._replace(title=""), Gallery(pictures), *said, Paragraph(cost)),
    )


# A regression with a squared-exponential kernel: logarithms of signal sd, lengthscale and noise sd


def _prior_sample(key: PRNGKey) -> dict[str, Array]:
    values = jnp.asarray(_MEAN) + jnp.asarray(_SPREAD) * jax.random.normal(key, (3,))
    return {"log lengthscale": values[1], "log noise sd": values[2], "log sd": values[0]}


def _values(theta: dict[str, Array]) -> Array:
    return jnp.stack([theta["log sd"], theta["log lengthscale"], theta["log noise sd"]])


def _log_prior(theta: dict[str, Array]) -> Scalar:
    return -0.5 * jnp.sum(((_values(theta) - _MEAN) / _SPREAD) ** 2)


def _model(theta: dict[str, Array]) -> gp.Model:
    sd, lengthscale, noise = jnp.exp(_values(theta))
    return gp.Model(gp.kernels.RBF(sd**2, lengthscale), gp.likelihoods.Gaussian(noise**2))


def _simulate(key: PRNGKey, theta: dict[str, Array]) -> Array:
    model = _model(theta)
    X = jnp.asarray(_X)
    covariance = model.kernel.gram(X) + model.likelihood.variance * jnp.eye(len(_X))
    return jnp.linalg.cholesky(covariance) @ jax.random.normal(key, (len(_X),))


def _log_likelihood(theta: dict[str, Array], y: Array) -> Scalar:
    return gp.log_evidence(_model(theta), jnp.asarray(_X), y, gp.Exact())


def _log_joint(theta: dict[str, Array], y: Array) -> Scalar:
    return _log_prior(theta) + _log_likelihood(theta, y)


def _start(key: PRNGKey, y: Array) -> dict[str, Array]:
    del y
    return _prior_sample(key)
