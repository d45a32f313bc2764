"""Learn the hyperparameters of a Gaussian process from a table, and predict.

``fit`` standardizes the data, builds a target from the evidence and the prior, passes it to a learner (``ML2``, ``MAP``
or any engine of the library), and returns a ``Fit`` that predicts in the user's units.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.arguments import check_key
from probinfer.core.errors import ConvergenceWarning, NumericalError, advice, shortened
from probinfer.core.identity import refresh_classes
from probinfer.core.status import Status
from probinfer.core.types import PRNGKey
from probinfer.gp.approximation.admissible import has_bound
from probinfer.gp.approximation.conditioned import failed
from probinfer.gp.approximation.conditioning import (
    SiteSolutions,
    condition_many,
    default_inference,
    reference_sites,
)
from probinfer.gp.approximation.conjugate import Exact
from probinfer.gp.approximation.laplace import Laplace
from probinfer.gp.fitted import Fit
from probinfer.gp.hyperparameters.continuation import continue_search
from probinfer.gp.hyperparameters.point_estimates import ML2
from probinfer.gp.hyperparameters.posterior import hyper_posterior, rebuild
from probinfer.gp.hyperparameters.verdicts import add_verdicts
from probinfer.gp.hyperparameters.verification import (
    held_warnings,
    release_warnings,
    verify_ends,
    worsen_status,
)
from probinfer.gp.model.model import Model, cast
from probinfer.gp.model.priors import default_prior
from probinfer.gp.model.scaling import choose_scaling
from probinfer.gp.model.units import convert
from probinfer.gp.model.validation import check_data, check_outputs
from probinfer.inference import engine
from probinfer.inference.facade import infer
from probinfer.running import progress as bars
from probinfer.vi.point import laplace_covariance, maximize

__all__ = ["fit"]

_MAX_COMPONENTS = 200  # hyperparameter draws in a prediction: Monte Carlo error 7 % of their own spread
_FLOAT32_MESSAGE = (
    "the data are float64 but 64-bit mode is off, so the fit is in float32, with 7 digits; call "
    "jax.config.update('jax_enable_x64', True) first, or pass float32 data to state that this is intended"
)


def fit(
    key: PRNGKey,
    model: Model,
    X: Any,
    y: Any,
    *,
    inference: Any = None,
    learn: Any = None,
    prior: Any = None,
    standardize: bool | None = None,
    progress: bool | str | None = None,
) -> Fit:
    """Learn the hyperparameters of a Gaussian process from data.

    Args:
        key: random key.
        model: the model; learning starts at its hyperparameters. They are in the units of the data, but values that are
            the default of their field (a period has none) are in standard deviations of the data.
        X: inputs ``(N, D)``, floating point.
        y: outputs ``(N,)``, of the same dtype; classes and counts may be integers or truth values.
        inference: method that computes p(f | X, y): ``gp.Exact()`` (the default for Gaussian likelihoods), ``gp.EP()``
            (for other log-concave ones), ``gp.VI()`` (for the rest), ``gp.Laplace()`` or ``gp.Hybrid()``.
        learn: ``gp.ML2()`` (the default), ``gp.MAP()``, or any engine of the library for the whole posterior.
        prior: a tree shaped like the model, from ``gp.default_prior``; ``ML2`` draws its restarts from it.
        standardize: whether X, and y if it has a unit, are scaled to zero mean and unit standard deviation. Then
            ``fit.model``, hyperparameter draws and the distributions of a prior are in standardized units, while all
            predictions of the fit are in those of the data. None, the default, converts the values of the model,
            including those kept by ``gp.fixed``, and warns about values that it cannot convert and about a prior whose
            units change. True states that the values of the model are in standard deviations already, except
            ``KnownNoise``. False takes everything in the units of the data.
        progress: whether to show progress; a string is its title. By default it is shown on a terminal.

    Returns:
        The fit.

    Raises:
        TypeError: the data are not floating point, or differ in dtype; ``key`` is no key or ``model`` no model.
        ValueError: shapes, values or priors do not fit; y is constant.
        NumericalError: no usable hyperparameters were found.
    """
    # Check the data and put everything into the units and the dtype of the model
    check_key(key)
    if not isinstance(model, Model):
        raise TypeError(
            f"model must be gp.Model(kernel, likelihood), got {shortened(model)}; wrap a kernel: gp.Model(kernel)"
        )
    refresh_classes(model, inference, prior)
    user_dtype = getattr(X, "dtype", None)
    X, y = check_data(X, y, model.likelihood)
    y = check_outputs(model.likelihood, y)
    if user_dtype == np.float64 and X.dtype == np.float32:
        warnings.warn(_FLOAT32_MESSAGE, stacklevel=2)
    inference = default_inference(model) if inference is None else inference
    has_unit = getattr(model.likelihood, "outputs_have_unit", False)
    scaling = choose_scaling(standardize, X, y, outputs=has_unit, has_prior=prior is not None)
    # In NumPy, where nothing is compiled
    X, y = jnp.asarray(scaling.inputs(np.asarray(X))), jnp.asarray(scaling.outputs(np.asarray(y)))
    model = cast(model, X.dtype)
    prior = default_prior(model, X) if prior is None else prior
    model = convert(model, prior, scaling, standardize)

    # Learn
    start = reference_sites(model, X, y, inference)
    free, target = hyper_posterior(model, prior, X, y, inference, sites=start)
    learn_key, draw_key = jax.random.split(key)
    try:
        with held_warnings() as caught:
            posterior = infer(learn_key, target, ML2() if learn is None else learn, progress=progress)
    except NumericalError as error:
        if isinstance(inference, Exact):
            raise
        raise NumericalError(f"{error}. {_advice_on(inference)}", error.status) from error

    # Build the model at every draw
    is_point = posterior.num_chains * posterior.num_draws == 1
    draws = posterior.flat() if is_point else posterior.resample(draw_key, _num_components(posterior))

    def build(values):
        return _stack(rebuild(free, model, values), jax.tree.leaves(values)[0].shape[0], model)

    models = build(draws)
    log_evidence = getattr(posterior.info, "log_likelihood", None) if is_point else posterior.log_evidence
    sites, info = None, posterior.info

    # Verify a point estimate of an approximate evidence, and compute the sites of every draw
    must_verify = (
        is_point and not isinstance(inference, Exact) and getattr(info, "positions", None) is not None
    )
    solutions: SiteSolutions | None
    if must_verify:

        def verify(target, info, start):
            return verify_ends(
                info,
                lambda positions: build(jax.vmap(target.constrain)(positions)),
                lambda models, fresh: condition_many(inference, models, X, y, start, fresh),
                bounded=has_bound(model.likelihood),
            )

        def search_from(sites, starts):
            restarted = hyper_posterior(model, prior, X, y, inference, sites=sites)[1]
            learner = ML2() if learn is None else learn
            fn = learner.objective(restarted)
            with bars.task("the search continues", None, progress):
                position, report = maximize(fn, starts, max_steps=learner.max_steps, mode=learner.mode)
            if info.log_likelihood is not None:
                report = report._replace(log_likelihood=report.log_density)
            if info.covariance is not None:
                report = report._replace(covariance=laplace_covariance(fn, position))
            return verify(restarted, report, sites)

        models, solutions, info = continue_search(
            verify(target, info, start), search_from, jax.random.fold_in(learn_key, 1)
        )
        release_warnings(caught, info.status)
        if int(info.status) != Status.OK and not caught:
            engine.warn(info.status, "the best end of the search did not pass the verification", "gp.fit")
        _check_modes(model, inference, info.status)
    else:
        release_warnings(caught)
        has_evidence = isinstance(inference, Exact) and not (is_point and log_evidence is None)
        solutions = None if has_evidence else condition_many(inference, models, X, y, start)
    if solutions is not None:
        info = worsen_status(info, _check_solutions(inference, solutions, is_point))
        sites = None if isinstance(inference, Exact) else solutions.sites
        log_evidence = solutions.log_evidence[0] if is_point else log_evidence

    # Warn about estimates at a limit, and return to the user's units
    if is_point:
        info = worsen_status(info, _check_amplitude(models, X))
        info = add_verdicts(info, models, X, y, sites, draws, log_evidence)
    if log_evidence is not None:
        log_evidence = jnp.asarray(np.asarray(log_evidence) - y.shape[0] * np.log(scaling.y_scale), y.dtype)
    return Fit(
        models=models,
        posterior=None if is_point else posterior,
        log_evidence=log_evidence,
        info=info,
        inference=inference,
        scaling=scaling,
        X=X,
        y=y,
        is_point=is_point,
        sites=sites,
    )


def _num_components(posterior):
    return min(_MAX_COMPONENTS, posterior.num_chains * posterior.num_draws)


def _stack(models, num, model):
    """Give fixed leaves the leading axis, and learned leaves the dtype of the data."""
    return jax.tree.map(
        lambda leaf, initial: jnp.broadcast_to(leaf, (num, *np.shape(initial))).astype(initial.dtype),
        models,
        model,
    )


def _check_solutions(inference, solutions, is_point):
    """Warn if the approximation did not converge everywhere, and return the maximum status.

    Raises:
        NumericalError: it failed at a point estimate.
    """
    status = np.asarray(solutions.status)
    if is_point and failed(int(status[0])):
        raise NumericalError(f"no usable hyperparameters were found: {advice(status[0])}", int(status[0]))
    num_failed = int(np.sum(status != Status.OK))
    if num_failed:
        where = (
            "the learned hyperparameters"
            if is_point
            else f"{num_failed} of {len(status)} hyperparameter draws"
        )
        warnings.warn(
            f"{type(inference).__name__} did not converge at {where}: its evidence and predictions are approximate "
            f"there. {_advice_on(inference)}",
            ConvergenceWarning,
            stacklevel=3,
        )
    return int(status.max())


def _advice_on(inference):
    method, max_updates = type(inference).__name__, getattr(inference, "max_updates", None)
    return (
        f"Far from its fixed point {method} has no evidence: raise gp.{method}(max_updates={max_updates}), start the "
        "model at plausible hyperparameters, or use another method"
    )


def _check_modes(model, inference, status):
    """Warn if a search failed because of the approximation."""
    stopped = int(status) in (Status.LINE_SEARCH_STALLED, Status.POOR_APPROXIMATION, Status.NON_FINITE)
    if stopped and isinstance(inference, Laplace) and not model.likelihood.log_concave:
        warnings.warn(
            f"Laplace's evidence under {type(model.likelihood).__name__} jumps from one mode of the latent function to "
            "another and grows without bound where a mode vanishes, so it may have no maximum: use gp.VI(), whose "
            "evidence is a bound",
            ConvergenceWarning,
            stacklevel=3,
        )


def _check_amplitude(models, X):
    """Warn if a point estimate diverged: outputs that saturate do not bound the variance of the kernel.

    Returns:
        ``OK`` or ``AT_LIMIT``.
    """
    saturation = getattr(models.likelihood, "saturates_at", None)
    if saturation is None:
        return Status.OK
    stddev = float(np.sqrt(np.mean(jax.vmap(lambda kernel: kernel.diag(X))(models.kernel))))
    if stddev > saturation:
        warnings.warn(
            f"the learned kernel gives latent values of standard deviation {stddev:.3g}, where every probability is 0 "
            "or 1: the classes are separable, or nearly so, and the evidence has no maximum at a finite variance. "
            "Learn with gp.MAP() or an engine such as mcmc.NUTS(): then the prior bounds it",
            ConvergenceWarning,
            stacklevel=3,
        )
        return Status.AT_LIMIT
    return Status.OK
