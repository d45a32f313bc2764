"""A Gaussian process with learned hyperparameters: it predicts in the user's units.

A point estimate is one model and a posterior is many, so prediction is a mixture in both cases. If the factors of all
models fit into memory they are computed by the first prediction and cached.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import PRNGKey, field, pytree
from probinfer.gp.hyperparameters.verdicts import warn_lost_precision
from probinfer.gp.model.model import Model
from probinfer.gp.model.scaling import Scaling
from probinfer.gp.model.validation import check_data, check_inputs, check_outputs, is_traced
from probinfer.gp.prediction import LatentMoments, NormalMixture, components
from probinfer.gp.storage import save
from probinfer.inference.posterior import Posterior

__all__ = ["Fit"]

_CHUNK_SIZE = 2048  # rows of new inputs predicted at once: memory N * _CHUNK_SIZE
_MAX_CACHED = 2**24  # numbers in the cached factors of all models: 128 MB in float64


@pytree
class Fit:
    """A Gaussian process with learned hyperparameters.

    Attributes:
        models: the model at S hyperparameter values of equal weight, leaves ``(S, ...)``, in standardized units.
        posterior: the draws of the hyperparameters by dotted name, in standardized units; None for a point estimate.
        log_evidence: log p(y | X) in the user's units: at the learned hyperparameters for a point estimate, with
            the hyperparameters integrated out if the engine estimates that, else None.
        info: the report of the learner.
        inference: the inference method.
        scaling: the maps between the user's units and those of the model.
        X: training inputs in the model's units.
        y: training outputs in the model's units.
        sites: the sites of each model, leaves ``(S, N)``; None for exact inference.
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
        """One line: the model, the data and the learned hyperparameters."""
        kinds = [type(getattr(self.models, name, None)).__name__ for name in ("kernel", "likelihood")]
        num, columns = (*getattr(self.X, "shape", ()), "?", "?")[:2]
        learned = "point estimate" if self.is_point else repr(self.posterior)
        return f"Fit({kinds[0]} kernel, {kinds[1]} likelihood; {num} points, {columns} inputs; {learned})"

    @property
    def model(self) -> Model:
        """The learned model of a point estimate, in standardized units.

        To continue learning from it, pass it to ``gp.fit`` with ``standardize=True``, which states these units.

        Raises:
            AttributeError: the fit has draws of the hyperparameters, in ``posterior``.
        """
        if not self.is_point:
            raise AttributeError(
                "this fit has a posterior over hyperparameters, not one model: see .posterior and .models"
            )
        return jax.tree.map(lambda leaf: leaf[0], self.models)

    def predict(self, X_new: Any) -> LatentMoments:
        """Mean ``(M,)`` and variance ``(M,)`` of the latent function, mixture moments over hyperparameter draws.

        Works under ``jit`` and ``grad``. A warning reports variances below the resolution of the arithmetic, and so do
        ``status`` and ``floor`` of the result.

        Raises:
            TypeError: ``X_new`` is not floating point or has another dtype than the training inputs.
            ValueError: ``X_new`` has another number of columns, or is not finite.
        """
        latent, scale = self._latent(X_new), self.scaling.y_scale
        mixture = NormalMixture(*latent).affine(self.scaling.y_mean, scale)
        moments = LatentMoments(mixture.mean, mixture.variance, scale**2 * latent.floor.mean(0))
        warn_lost_precision(moments.variance, moments.floor)
        return moments

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
        latent, scale = self._latent(X_new), self.scaling.y_scale
        if noise_variance is not None:
            noise_variance = jnp.asarray(noise_variance, self.X.dtype) / scale**2
        predictive = self.models.likelihood.predictive(*latent, noise_variance)
        if isinstance(predictive, NormalMixture):
            warn_lost_precision(scale**2 * predictive.variance, scale**2 * latent.floor.mean(0))
        if not getattr(self.models.likelihood, "outputs_have_unit", False):
            return predictive
        return predictive.affine(self.scaling.y_mean, scale)

    def predict_joint(self, X_new: Any) -> tuple[jax.Array, jax.Array]:
        """Mean ``(M,)`` and covariance ``(M, M)`` of the latent function, mixture moments over hyperparameter draws.

        The covariance is positive semi-definite. Like ``predict``, it warns about lost precision.
        """
        mean, covariance, floor = components.joint(self._components(), self._inputs(X_new))
        scale = self.scaling.y_scale
        warn_lost_precision(scale**2 * jnp.diagonal(covariance), scale**2 * floor)
        return self.scaling.y_mean + scale * mean, scale**2 * covariance

    def sample(self, key: PRNGKey, X_new: Any, num: int) -> jax.Array:
        """Draw ``num`` latent functions at ``X_new``, shape ``(num, M)``, each from a random hyperparameter draw.

        The points may be arbitrarily close to one another, or equal: the covariance need not have an inverse, and
        nothing is added to it.

        Raises:
            NumericalError: the covariance of the new points is not finite.
        """
        choice_key, noise_key = jax.random.split(key)
        num_models = jax.tree.leaves(self.models)[0].shape[0]
        chosen = jax.random.randint(choice_key, (num,), 0, num_models)
        noise = jax.random.normal(noise_key, (num, len(X_new)), self.X.dtype)
        functions = components.functions(self._components(), chosen, self._inputs(X_new), noise)
        if not is_traced(functions) and not bool(jnp.isfinite(functions).all()):
            raise NumericalError(f"sampling failed: {advice(Status.NON_FINITE)}", Status.NON_FINITE)
        return self.scaling.y_mean + self.scaling.y_scale * functions

    def log_prob(self, X_new: Any, y_new: Any, *, noise_variance: Any = None) -> jax.Array:
        """Pointwise log predictive density ``(M,)``: the log of the mean over hyperparameter draws."""
        X_new, y_new = check_data(X_new, y_new, self.models.likelihood)
        with warnings.catch_warnings():
            # These warnings matter for learning from the labels, and were issued then.
            warnings.filterwarnings("ignore", message="(all|the) labels")
            y_new = check_outputs(self.models.likelihood, y_new)
        return self.predict_y(X_new, noise_variance=noise_variance).log_prob(jnp.asarray(y_new))

    def loo(self) -> jax.Array:
        """Leave-one-out log predictive densities ``(N,)`` of the training outputs, in the user's units.

        log p(y_i | y_-i) = −log mean_s 1 / p(y_i | y_-i, θ_s): the draws are conditional on point i, and are reweighted
        to the posterior without it (Gelfand, Dey and Chang 1992, eq. 9).
        """
        log_loo = components.leave_one_out(self.inference, (self.models, self.sites), self.X, self.y)
        num = jnp.log(jnp.asarray(log_loo.shape[0], log_loo.dtype))
        return num - logsumexp(-log_loo, axis=0) - jnp.log(self.scaling.y_scale)

    def save(self, path: Any) -> None:
        """Write the fit to a file without pickle; ``gp.load`` reads it.

        Raises:
            TypeError: the model contains an object that cannot be written, such as a lambda in a warped kernel.
        """
        save(path, self)

    def _components(self):
        """The conditioned components, or unconditioned ones if their factors do not fit into the cache."""
        if is_traced(self) or len(self.X) ** 2 * len(jax.tree.leaves(self.models)[0]) > _MAX_CACHED:
            return components.UnconditionedComponents(
                inference=self.inference, components=(self.models, self.sites), X=self.X, y=self.y
            )
        # The cache is no field, so that it is part of neither trees nor files, and concrete even within a trace.
        if "_cached" not in self.__dict__:
            with jax.ensure_compile_time_eval():
                cached = components.conditioned(self.inference, (self.models, self.sites), self.X, self.y)
            object.__setattr__(self, "_cached", cached)
        return self.__dict__["_cached"]

    def _inputs(self, X_new):
        X_new = check_inputs(X_new, columns=self.X.shape[1], dtype=self.X.dtype)
        return self.scaling.inputs(X_new)

    def _latent(self, X_new):
        """Moments ``(S, M)`` in the model's units; rows are padded, so that few shapes are compiled."""
        X_new = self._inputs(X_new)
        xp: Any = jnp if is_traced(X_new) else np
        X_new = xp.asarray(X_new)
        num = len(X_new)
        # A power of two up to the size of a chunk, whole chunks beyond it
        padded = (
            max(16, 1 << (num - 1).bit_length())
            if num <= _CHUNK_SIZE
            else -(-num // _CHUNK_SIZE) * _CHUNK_SIZE
        )
        rows = xp.concatenate([X_new, xp.repeat(X_new[-1:], padded - num, 0)])
        chunks = rows.reshape(-1, min(padded, _CHUNK_SIZE), X_new.shape[1])
        moments = components.marginals(self._components(), jnp.asarray(chunks))
        return jax.tree.map(lambda leaf: leaf[:, :num], moments)
