"""The base class of likelihoods: a log density log p(y | f), factorizing over the data, and what follows from it.

A likelihood is a registered class whose leaves are its parameters. ``Likelihood`` fills in every other member, by
quadrature where there is no closed form, so that a likelihood of your own is ``log_density`` and nothing else::

    @probinfer.core.types.pytree
    class Laplace(gp.likelihoods.Likelihood):
        scale: Any = field(default=1.0, constraint=constraints.positive)
        log_concave: ClassVar[bool] = True

        def log_density(self, y, f):
            return -jnp.abs(y - f) / self.scale - jnp.log(2 * self.scale)

or, without a class, ``FromLogDensity(fn, {"scale": 1.0})``.

Optional members make inference faster, the quadrature more accurate or the predictive distribution more complete:
``closed_expected_log_density(y, m, v)``, ``closed_log_ratio(y, m, v, lam1, lam2, power)``, ``closed_tilted_moments``
and ``closed_derivatives(y, f)`` (closed forms of the functions of ``moments``; they return None if there is none),
``curvature_location(y)`` (the f at which the curvature of the log density changes most, and about three times the scale
on which it changes), ``peak(y)`` (the f that maximizes a density that is not log-concave; it gives a bound for the
evidence), ``output_moments(mean, variance)``, ``cdf(y, mean, variance)`` and ``sample(key, f)``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from probinfer.core.binding import frozen
from probinfer.core.types import Array, Float, field, pytree, strong_array
from probinfer.gp.model.likelihoods.integral import log_integral
from probinfer.gp.prediction import LatentMixture

__all__ = ["FromLogDensity", "Likelihood"]


class Likelihood:
    """Base class of likelihoods: subclass it, write ``log_density(y, f)``, and decorate with ``types.pytree``.

    Attributes:
        log_concave: log p(y | f) is concave in f for every y. Inference and quadrature rely on it.
        discrete: p(y | f) is a probability mass, as for counts and classes: no evidence is above 1.
        outputs_have_unit: y may be shifted and scaled (``gp.fit`` then standardizes it).
    """

    log_concave: ClassVar[bool] = False
    discrete: ClassVar[bool] = False
    outputs_have_unit: ClassVar[bool] = False

    def __post_init__(self):
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            if not item.metadata.get("static", False):
                object.__setattr__(self, item.name, strong_array(getattr(self, item.name)))

    def log_density(self, y: Float[Array, "..."], f: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log p(y | f), elementwise; differentiable in f.

        Raises:
            TypeError: the subclass does not define it.
        """
        raise TypeError(f"{type(self).__name__} must define log_density(y, f)")

    def check_outputs(self, y: Any) -> Any:
        """Check the outputs and return them in the form that ``log_density`` takes; unchanged by default."""
        return y

    def log_prob(
        self, y: Float[Array, "..."], mean: Float[Array, "..."], variance: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Log ∫ p(y | f) N(f; mean, variance) df, elementwise, by quadrature."""
        return log_integral(self, y, mean, variance)

    def predictive(self, mean: Float[Array, "S M"], variance: Float[Array, "S M"], noise: Any = None) -> Any:
        """The distribution of y at M new points, S hyperparameter draws of equal weight (leaves with an axis S).

        Raises:
            ValueError: a noise variance was passed, which is for ``KnownNoise`` only.
        """
        refuse_noise(self, noise)
        return LatentMixture(self, mean, variance)


def refuse_noise(likelihood: Any, noise: Any) -> None:
    """Refuse a noise variance at new points for a likelihood with its own noise.

    Raises:
        ValueError: one was passed.
    """
    if noise is not None:
        raise ValueError(
            f"noise_variance is for KnownNoise only; the {type(likelihood).__name__} likelihood has its own"
        )


@pytree
class FromLogDensity(Likelihood):
    """A likelihood from a function ``log_density_fn(y, f, **params)``.

    Attributes:
        log_density_fn: elementwise and differentiable in f. It is read when the likelihood is created: a function with
            other captured values, those of arrays included, is compiled again.
        params: its parameters, numbers or arrays by name, on the whole real line (if they must be positive,
            exponentiate inside). They are learned like any hyperparameter.
        concave: log p(y | f) is concave in f. Inference can then locate its integrals and bound the evidence, so set it
            whenever it is true.
        discrete: p(y | f) is a probability mass, as for counts and classes: an evidence above 1 is refused.
    """

    log_density_fn: Any = field(static=True)
    params: Any = field(default_factory=dict)
    concave: bool = field(static=True, default=False)
    discrete: bool = field(static=True, default=False)  # type: ignore[misc]

    def __post_init__(self):
        if not callable(self.log_density_fn):
            raise TypeError(f"FromLogDensity needs a function (y, f, **params), got {self.log_density_fn!r}")
        object.__setattr__(self, "log_density_fn", frozen(self.log_density_fn))
        if not isinstance(self.params, dict):
            raise TypeError(f"FromLogDensity.params must be a dictionary, got {type(self.params).__name__}")
        object.__setattr__(self, "params", {name: strong_array(value) for name, value in self.params.items()})

    @property
    def log_concave(self) -> bool:  # type: ignore[override]
        """The value of ``concave``."""
        return self.concave

    def log_density(self, y: Float[Array, "..."], f: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log p(y | f), elementwise."""
        return self.log_density_fn(y, f, **self.params)
