"""A Gaussian process with learned hyperparameters: it predicts in the user's units.

A point estimate is one model, a posterior is many: prediction is the same mixture in both cases. Where the factors of
all models fit into memory they are kept from the first prediction on.
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
from probinfer.gp.hyperparameters.verdicts import warn_lost
from probinfer.gp.model.model import Model
from probinfer.gp.model.scaling import Scaling
from probinfer.gp.model.validation import check_data, check_inputs, check_outputs, is_traced
from probinfer.gp.prediction import LatentMoments, NormalMixture, components
from probinfer.gp.storage import save
from probinfer.inference.posterior import Posterior

__all__ = ["Fit"]

_CHUNK = 2048  # rows of new inputs predicted at once: memory N * _CHUNK
_KEPT = 2**24  # numbers in the factors of all models that are kept: 128 MB in float64


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
        """The learned model of a point estimate, in standardised units.

        To learn on from it, give it to ``gp.fit`` with ``standardize=True``, which says that its values are in them.

        Raises:
            AttributeError: the hyperparameters are draws, in ``posterior``.
        """
        if not self.is_point:
            raise AttributeError(
                "this fit has a posterior over hyperparameters, not one model: see .posterior and .models"
            )
        return jax.tree.map(lambda leaf: leaf[0], self.models)

    def predict(self, X_new: Any) -> LatentMoments:
        """Mean ``(M,)`` and variance ``(M,)`` of the latent function, mixture moments over hyperparameter draws.

        Works under ``jit`` and ``grad``. A variance below what the arithmetic resolves is warned of, and is in the
        ``status`` and ``floor`` of the pair.

        Raises:
            TypeError: ``X_new`` is not floating point or has another dtype than the training inputs.
            ValueError: ``X_new`` has another number of columns, or is not finite.
        """
        given, scale = self._latent(X_new), self.scaling.y_scale
        mixture = NormalMixture(*given).affine(self.scaling.y_mean, scale)
        found = LatentMoments(mixture.mean, mixture.variance, scale**2 * given.floor.mean(0))
        warn_lost(found.variance, found.floor)
        return found

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
        given, scale = self._latent(X_new), self.scaling.y_scale
        if noise_variance is not None:
            noise_variance = jnp.asarray(noise_variance, self.X.dtype) / scale**2
        predictive = self.models.likelihood.predictive(*given, noise_variance)
        if isinstance(predictive, NormalMixture):
            warn_lost(scale**2 * predictive.variance, scale**2 * given.floor.mean(0))
        if not getattr(self.models.likelihood, "outputs_have_unit", False):
            return predictive
        return predictive.affine(self.scaling.y_mean, scale)

    def predict_joint(self, X_new: Any) -> tuple[jax.Array, jax.Array]:
        """Mean ``(M,)`` and covariance ``(M, M)`` of the latent function, mixture moments over hyperparameter draws.

        The covariance is positive semi-definite. Like ``predict``, it warns where precision was lost.
        """
        mean, covariance, floor = components.joint(self._given(), self._inputs(X_new))
        scale = self.scaling.y_scale
        warn_lost(scale**2 * jnp.diagonal(covariance), scale**2 * floor)
        return self.scaling.y_mean + scale * mean, scale**2 * covariance

    def sample(self, key: PRNGKey, X_new: Any, num: int) -> jax.Array:
        """Draw ``num`` latent functions at ``X_new``, shape ``(num, M)``, each with hyperparameters of its own draw.

        The points may lie as close to one another as they like, or on one another: the covariance need not have an
        inverse, and nothing is added to it.

        Raises:
            NumericalError: the covariance of the new points is not finite.
        """
        choice_key, noise_key = jax.random.split(key)
        num_models = jax.tree.leaves(self.models)[0].shape[0]
        chosen = jax.random.randint(choice_key, (num,), 0, num_models)
        noise = jax.random.normal(noise_key, (num, len(X_new)), self.X.dtype)
        functions = components.functions(self._given(), chosen, self._inputs(X_new), noise)
        if not is_traced(functions) and not bool(jnp.isfinite(functions).all()):
            raise NumericalError(f"sampling failed: {advice(Status.NON_FINITE)}", Status.NON_FINITE)
        return self.scaling.y_mean + self.scaling.y_scale * functions

    def log_prob(self, X_new: Any, y_new: Any, *, noise_variance: Any = None) -> jax.Array:
        """Pointwise log predictive density ``(M,)``: the log of the mean over hyperparameter draws."""
        X_new, y_new = check_data(X_new, y_new, self.models.likelihood)
        with warnings.catch_warnings():
            # What matters only where one learns from the labels, or was said then.
            warnings.filterwarnings("ignore", message="(all|the) labels")
            y_new = check_outputs(self.models.likelihood, y_new)
        return self.predict_y(X_new, noise_variance=noise_variance).log_prob(jnp.asarray(y_new))

    def loo(self) -> jax.Array:
        """Leave-one-out log predictive densities ``(N,)`` of the training outputs, in the user's units.

        log p(y_i | y_-i) = −log mean_s 1 / p(y_i | y_-i, θ_s): the draws were made with point i, and are weighted back
        to what they would be without it (Gelfand, Dey and Chang 1992, eq. 9).
        """
        log_loo = components.leave_one_out(self.inference, (self.models, self.sites), self.X, self.y)
        num = jnp.log(jnp.asarray(log_loo.shape[0], log_loo.dtype))
        return num - logsumexp(-log_loo, axis=0) - jnp.log(self.scaling.y_scale)

    def save(self, path: Any) -> None:
        """Write the fit to a file without pickle; ``gp.load`` reads it.

        Raises:
            TypeError: the model holds an object that cannot be written, such as a lambda in a warped kernel.
        """
        save(path, self)

    def _given(self):
        if is_traced(self) or len(self.X) ** 2 * len(jax.tree.leaves(self.models)[0]) > _KEPT:
            return components.Given(self.inference, (self.models, self.sites), self.X, self.y)
        # Beside the fields, so that neither trees nor files hold it; concrete even while something is traced.
        if "_kept" not in self.__dict__:
            with jax.ensure_compile_time_eval():
                kept = components.conditioned(self.inference, (self.models, self.sites), self.X, self.y)
            object.__setattr__(self, "_kept", kept)
        return self.__dict__["_kept"]

    def _inputs(self, X_new):
        X_new = check_inputs(X_new, columns=self.X.shape[1], dtype=self.X.dtype)
        return self.scaling.inputs(X_new)

    def _latent(self, X_new):
        """Moments ``(S, M)`` in the model's units; rows are padded so that few shapes are compiled."""
        X_new = self._inputs(X_new)
        xp: Any = jnp if is_traced(X_new) else np
        X_new = xp.asarray(X_new)
        num = len(X_new)
        padded = max(16, 1 << (num - 1).bit_length()) if num <= _CHUNK else -(-num // _CHUNK) * _CHUNK
        rows = xp.concatenate([X_new, xp.repeat(X_new[-1:], padded - num, 0)])
        chunks = rows.reshape(-1, min(padded, _CHUNK), X_new.shape[1])
        found = components.marginals(self._given(), jnp.asarray(chunks))
        return jax.tree.map(lambda leaf: leaf[:, :num], found)
