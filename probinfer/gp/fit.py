"""Learn the hyperparameters of a Gaussian process from a table, and predict.

``fit`` standardises, puts the evidence and the prior into a target, hands it to a learner (``ML2``, ``MAP`` or any
engine of the library), and returns a ``Fit`` that predicts in the user's units. A point estimate is one model, a
posterior is many: prediction is the same mixture in both cases.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from probinfer.base import Status
from probinfer.errors import ConvergenceWarning, NumericalError, advice, check_key, shortened
from probinfer.gp import components
from probinfer.gp.condition import default_inference, reference_sites, settle
from probinfer.gp.conditioned import failed
from probinfer.gp.conjugate import Exact
from probinfer.gp.hyper_posterior import hyper_posterior, rebuild
from probinfer.gp.learn import ML2
from probinfer.gp.model import Model, cast
from probinfer.gp.predictive import NormalMixture
from probinfer.gp.priors import default_prior
from probinfer.gp.scaling import Scaling, choose_scaling
from probinfer.gp.storage import save
from probinfer.gp.validate import check_data, check_inputs, check_outputs
from probinfer.identity import notice
from probinfer.infer import infer
from probinfer.posterior import Posterior
from probinfer.types import PRNGKey, field, pytree

__all__ = ["Fit", "fit"]

_MAX_COMPONENTS = 200  # hyperparameter draws in a prediction: Monte Carlo error 7 % of their own spread
_NARROW = (
    "the data are float64 but 64-bit mode is off, so the fit is in float32, with 7 digits; call "
    "jax.config.update('jax_enable_x64', True) first, or pass float32 data to say that this is meant"
)
_CHUNK = 2048  # rows of new inputs predicted at once: memory N * _CHUNK


@pytree
class Fit:
    """A Gaussian process with learned hyperparameters.

    Attributes:
        models: the model at S hyperparameter values of equal weight, leaves ``(S, ...)``, in standardised units.
        posterior: the draws of the hyperparameters by dotted name, in standardised units; None for a point estimate.
        log_evidence: log p(y | X) in the user's units: at the learned hyperparameters for a point estimate, with
            the hyperparameters integrated out where the engine estimates that, else None.
        info: what the learner reports of itself.
        inference: the inference method.
        scaling: the maps between the user's units and those of the model.
        X: training inputs in the model's units.
        y: training outputs in the model's units.
        sites: what the inference method found for each model, leaves ``(S, N)``; None for exact inference.
    """

    models: Any
    posterior: Posterior | None
    log_evidence: Any
    info: Any
    inference: Any
    scaling: Scaling
    X: Any
    y: Any
    is_point: bool = field(static=True)
    sites: Any = None

    def __repr__(self) -> str:
        """One line: the model, the data and what was learned."""
        kinds = [type(getattr(self.models, name, None)).__name__ for name in ("kernel", "likelihood")]
        num, columns = (*getattr(self.X, "shape", ()), "?", "?")[:2]
        learned = "point estimate" if self.is_point else repr(self.posterior)
        return f"Fit({kinds[0]} kernel, {kinds[1]} likelihood; {num} points, {columns} inputs; {learned})"

    @property
    def model(self) -> Model:
        """The learned model of a point estimate.

        Raises:
            AttributeError: the hyperparameters are draws, in ``posterior``.
        """
        if not self.is_point:
            raise AttributeError(
                "this fit has a posterior over hyperparameters, not one model: see .posterior and .models"
            )
        return jax.tree.map(lambda leaf: leaf[0], self.models)

    def predict(self, X_new: Any) -> tuple[jax.Array, jax.Array]:
        """Mean ``(M,)`` and variance ``(M,)`` of the latent function, mixture moments over hyperparameter draws.

        Raises:
            TypeError: ``X_new`` is not floating point or has another dtype than the training inputs.
            ValueError: ``X_new`` has another number of columns, or is not finite.
        """
        latent = NormalMixture(*self._latent(X_new)).affine(self.scaling.y_mean, self.scaling.y_scale)
        return latent.mean, latent.variance

    def predict_y(self, X_new: Any, *, noise_variance: Any = None) -> Any:
        """The distribution of new outputs: ``mean``, ``variance``, ``quantile(q)``, ``log_prob``, ``sample``.

        Args:
            X_new: new inputs ``(M, D)``.
            noise_variance: with ``KnownNoise``, the noise at the new points, in squared units of y.

        Returns:
            A pointwise predictive distribution in the user's units.

        Raises:
            TypeError: see ``predict``.
            ValueError: see ``predict``, and the likelihood's ``predictive``.
        """
        mean, variance = self._latent(X_new)
        if noise_variance is not None:
            noise_variance = jnp.asarray(noise_variance, self.X.dtype) / self.scaling.y_scale**2
        predictive = self.models.likelihood.predictive(mean, variance, noise_variance)
        if not getattr(self.models.likelihood, "outputs_have_unit", False):
            return predictive
        return predictive.affine(self.scaling.y_mean, self.scaling.y_scale)

    def predict_joint(self, X_new: Any) -> tuple[jax.Array, jax.Array]:
        """Mean ``(M,)`` and covariance ``(M, M)`` of the latent function, mixture moments over hyperparameter draws."""
        X_new = self._inputs(X_new)
        means, covariances = components.joint(*self._given(), X_new)
        return self.scaling.y_mean + self.scaling.y_scale * means, self.scaling.y_scale**2 * covariances

    def sample(self, key: PRNGKey, X_new: Any, num: int) -> jax.Array:
        """Draw ``num`` latent functions at ``X_new``, shape ``(num, M)``, each with hyperparameters of its own draw.

        Raises:
            NumericalError: the joint covariance of the new points could not be factored.
        """
        choice_key, noise_key = jax.random.split(key)
        num_models = jax.tree.leaves(self.models)[0].shape[0]
        chosen = jax.random.randint(choice_key, (num,), 0, num_models)
        noise = jax.random.normal(noise_key, (num, len(X_new)), self.X.dtype)
        functions = components.functions(*self._given(), chosen, self._inputs(X_new), noise)
        if not bool(jnp.isfinite(functions).all()):
            raise NumericalError(
                f"sampling failed: {advice(Status.NOT_POSITIVE_DEFINITE)}", Status.NOT_POSITIVE_DEFINITE
            )
        return self.scaling.y_mean + self.scaling.y_scale * functions

    def log_prob(self, X_new: Any, y_new: Any, *, noise_variance: Any = None) -> jax.Array:
        """Pointwise log predictive density ``(M,)``: the log of the mean over hyperparameter draws."""
        check_data(X_new, y_new)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="all labels"
            )  # which matters only where one learns from them
            y_new = check_outputs(self.models.likelihood, y_new)
        return self.predict_y(X_new, noise_variance=noise_variance).log_prob(jnp.asarray(y_new))

    def loo(self) -> jax.Array:
        """Leave-one-out log predictive densities ``(N,)`` of the training outputs, in the user's units.

        log p(y_i | y_-i) = −log mean_s 1 / p(y_i | y_-i, θ_s): the draws were made with point i, and are weighted back
        to what they would be without it (Gelfand, Dey and Chang 1992, eq. 9).
        """
        log_loo = components.leave_one_out(*self._given())
        num = jnp.log(jnp.asarray(log_loo.shape[0], log_loo.dtype))
        return num - logsumexp(-log_loo, axis=0) - jnp.log(self.scaling.y_scale)

    def save(self, path: Any) -> None:
        """Write the fit to a file without pickle; ``gp.load`` reads it.

        Raises:
            TypeError: the model holds an object that cannot be written, such as a lambda in a warped kernel.
        """
        save(path, self)

    def _given(self):
        return self.inference, (self.models, self.sites), self.X, self.y

    def _inputs(self, X_new):
        X_new = check_inputs(X_new, columns=self.X.shape[1], dtype=self.X.dtype)
        return self.scaling.inputs(X_new)

    def _latent(self, X_new):
        """Means and variances ``(S, M)`` in the model's units; rows are padded so that few shapes are compiled."""
        X_new = np.asarray(self._inputs(X_new))
        num = len(X_new)
        padded = max(16, 1 << (num - 1).bit_length()) if num <= _CHUNK else -(-num // _CHUNK) * _CHUNK
        rows = np.concatenate([X_new, np.repeat(X_new[-1:], padded - num, 0)])
        chunks = rows.reshape(-1, min(padded, _CHUNK), X_new.shape[1])
        mean, variance = components.marginals(*self._given(), jnp.asarray(chunks))
        return mean[:, :num], variance[:, :num]


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
        model: the model; its hyperparameters are where learning starts.
        X: inputs ``(N, D)``, floating point.
        y: outputs ``(N,)``, of the same dtype.
        inference: how p(f | X, y) is found: ``gp.Exact()`` (the default for Gaussian likelihoods), ``gp.EP()`` (the
            default for other log-concave ones), ``gp.VI()`` (for the rest), ``gp.Laplace()``, ``gp.Hybrid()``.
        learn: ``gp.ML2()`` (the default), ``gp.MAP()``, or any engine of the library for the whole posterior.
        prior: a tree shaped like the model, from ``gp.default_prior``; ``ML2`` draws its restarts from it.
        standardize: give X, and y where it has a unit, zero mean and unit standard deviation. The model's values,
            the prior and its fixed values, ``fit.model`` and hyperparameter draws are then in these units;
            ``KnownNoise`` and everything that the fit predicts are in the user's. False takes all as given, in the
            units of the data. None standardises, and warns where a prior is given and that changes its units.
        progress: show progress, under a name of your own if it is a text; by default on a terminal.

    Returns:
        The fit.

    Raises:
        TypeError: the data are not floating point, or differ in dtype; ``key`` or ``model`` is not one.
        ValueError: shapes, values or priors do not fit; y is constant.
        NumericalError: no usable hyperparameters were found.
    """
    check_key(key)
    if not isinstance(model, Model):
        raise TypeError(
            f"model must be gp.Model(kernel, likelihood), got {shortened(model)}; wrap a kernel: gp.Model(kernel)"
        )
    notice(model, inference, prior)
    given = getattr(X, "dtype", None)
    X, y = check_data(X, y)
    y = check_outputs(model.likelihood, y)
    if given == np.float64 and X.dtype == np.float32:
        warnings.warn(_NARROW, stacklevel=2)
    inference = default_inference(model) if inference is None else inference
    has_unit = getattr(model.likelihood, "outputs_have_unit", False)
    scaling = choose_scaling(standardize, X, y, outputs=has_unit, has_prior=prior is not None)
    # In NumPy: nothing to compile.
    X, y = jnp.asarray(scaling.inputs(np.asarray(X))), jnp.asarray(scaling.outputs(np.asarray(y)))
    model = cast(model, X.dtype)
    if has_unit:
        model = Model(model.kernel, model.likelihood.rescale(scaling.y_scale), model.mean)
    prior = default_prior(model, X) if prior is None else prior
    start = reference_sites(model, X, y, inference)
    free, target = hyper_posterior(model, prior, X, y, inference, sites=start)
    learn_key, draw_key = jax.random.split(key)
    try:
        posterior = infer(learn_key, target, ML2() if learn is None else learn, progress=progress)
    except NumericalError as error:
        if isinstance(inference, Exact):
            raise
        raise NumericalError(f"{error}. {_advice_on(inference)}", error.status) from error
    is_point = posterior.num_chains * posterior.num_draws == 1
    draws = posterior.flat() if is_point else posterior.resample(draw_key, _num_components(posterior))
    models = _stack(rebuild(free, model, draws), jax.tree.leaves(draws)[0].shape[0], model)
    log_evidence = getattr(posterior.info, "log_likelihood", None) if is_point else posterior.log_evidence
    sites = None
    if not isinstance(inference, Exact) or (is_point and log_evidence is None):
        settled = settle(inference, models, X, y, start)
        _check_settled(inference, settled, is_point)
        sites = None if isinstance(inference, Exact) else settled.sites
        log_evidence = settled.log_evidence[0] if is_point else log_evidence
    if is_point:
        _check_amplitude(models, X)
    if log_evidence is not None:
        log_evidence = jnp.asarray(np.asarray(log_evidence) - y.shape[0] * np.log(scaling.y_scale), y.dtype)
    return Fit(
        models=models,
        posterior=None if is_point else posterior,
        log_evidence=log_evidence,
        info=posterior.info,
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
    """Leading axes for the leaves that are not learned, and the dtype of the data for those that are."""
    return jax.tree.map(
        lambda leaf, old: jnp.broadcast_to(leaf, (num, *np.shape(old))).astype(old.dtype), models, model
    )


def _check_settled(inference, settled, is_point):
    """Say where the approximation did not converge.

    Raises:
        NumericalError: it failed at a point estimate.
    """
    status = np.asarray(settled.status)
    if is_point and failed(int(status[0])):
        raise NumericalError(f"no usable hyperparameters were found: {advice(status[0])}", int(status[0]))
    missed = int(np.sum(status != Status.OK))
    if missed:
        where = (
            "the learned hyperparameters" if is_point else f"{missed} of {len(status)} hyperparameter draws"
        )
        warnings.warn(
            f"{type(inference).__name__} did not converge at {where}: its evidence and predictions are approximate "
            f"there. {_advice_on(inference)}",
            ConvergenceWarning,
            stacklevel=3,
        )


def _advice_on(inference):
    method, most = type(inference).__name__, getattr(inference, "max_updates", None)
    return (
        f"Where {method} is far from its fixed point there is no evidence: raise gp.{method}(max_updates={most}), "
        "start the model at plausible hyperparameters, or take another method"
    )


def _check_amplitude(models, X):
    """Say where a point estimate ran away: outputs that saturate do not bound the kernel's variance."""
    largest = getattr(models.likelihood, "saturates_at", None)
    if largest is None:
        return
    stddev = float(np.sqrt(np.mean(jax.vmap(lambda kernel: kernel.diag(X))(models.kernel))))
    if stddev > largest:
        warnings.warn(
            f"the learned kernel gives latent values of standard deviation {stddev:.3g}, where every probability is 0 "
            "or 1: the classes are separable, or nearly so, and the evidence has no maximum at a finite variance. "
            "Learn with gp.MAP() or an engine such as mcmc.NUTS(): the prior then bounds it",
            ConvergenceWarning,
            stacklevel=3,
        )
