"""Approximate inference by sites: expectation propagation, variational inference, and their hybrid."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.types import Array, Float, field, pytree
from probinfer.gp.approximation.assembly import assemble
from probinfer.gp.approximation.conditioned import Conditioned
from probinfer.gp.approximation.fixed_point import check_settings, default_tolerance
from probinfer.gp.approximation.objectives import Objective, energy, stationary_energy
from probinfer.gp.approximation.sites import Sites
from probinfer.gp.approximation.updates import converged_sites, first_sites
from probinfer.gp.model.model import Model

__all__ = ["EP", "VI", "Hybrid"]


@pytree
class EP:
    """Expectation propagation, or power EP: sites whose tilted moments are those of the marginals.

    All sites are updated at once; updates are damped, accelerated, and undone if they fail. At the fixed point the
    evidence is stationary in the sites, so its gradient costs one more inverse (Rasmussen and Williams 2006, eq. 5.27).

    Attributes:
        power: η in (0, 1]; 1 is EP, towards 0 power EP becomes variational inference.
        num_nodes: quadrature nodes, for likelihoods without closed forms.
        max_updates: maximum number of updates; the status reports if they were not enough.
        tolerance: largest remaining change, in posterior standard deviations; None: 1e-8, and 1e-4 in float32.

    Raises:
        ValueError: a setting is outside its range.

    References:
        Minka (2001), "Expectation propagation for approximate Bayesian inference"; Rasmussen and Williams (2006),
        algorithms 3.5 and 5.2; Minka (2004), "Power EP".
    """

    power: float = field(static=True, default=1.0)
    num_nodes: int = field(static=True, default=48)
    max_updates: int = field(static=True, default=200)
    tolerance: float | None = field(static=True, default=None)

    def __post_init__(self):
        if not 0 < self.power <= 1:
            raise ValueError(f"EP.power must be in (0, 1], got {self.power}; for the limit 0 use gp.VI()")
        check_settings(self)

    def condition(
        self, model: Model, X: Float[Array, "N D"], y: Float[Array, " N"], sites: Any = None
    ) -> Conditioned:
        """Condition on checked data, starting at ``sites`` or at the sites of each output alone."""
        return _condition(self, Objective(self.power, self.num_nodes), model, X, y, sites)


@pytree
class VI:
    """Variational inference with a full Gaussian q, by conjugate-computation natural gradients: 2 N parameters.

    Attributes:
        num_nodes: quadrature nodes, for likelihoods without closed forms.
        max_updates: maximum number of updates; the status reports if they were not enough.
        tolerance: largest remaining change, in posterior standard deviations; None: 1e-8, and 1e-4 in float32.

    Raises:
        ValueError: a setting is outside its range.

    References:
        Khan and Lin (2017), "Conjugate-computation variational inference"; Opper and Archambeau (2009), "The
        variational Gaussian approximation revisited".
    """

    num_nodes: int = field(static=True, default=48)
    max_updates: int = field(static=True, default=200)
    tolerance: float | None = field(static=True, default=None)

    def __post_init__(self):
        check_settings(self)

    def condition(
        self, model: Model, X: Float[Array, "N D"], y: Float[Array, " N"], sites: Any = None
    ) -> Conditioned:
        """Condition on checked data, starting at ``sites`` or at the sites of each output alone."""
        return _condition(self, Objective(0.0, self.num_nodes), model, X, y, sites)


@pytree
class Hybrid:
    """The sites of variational inference, the evidence of EP at them.

    Attributes:
        gradient: ``"total"``, the derivative of the evidence as a function of the hyperparameters, sites included; or
            ``"partial"``, with the sites held fixed, as published: not the gradient of any function.
        num_nodes: quadrature nodes, for likelihoods without closed forms.
        max_updates: maximum number of updates; the status reports if they were not enough.
        tolerance: largest remaining change, in posterior standard deviations; None: 1e-8, and 1e-4 in float32.

    Raises:
        ValueError: a setting is outside its range.

    References:
        Li, John and Solin (2023), "Improving hyperparameter learning under approximate inference in Gaussian process
        models".
    """

    gradient: str = field(static=True, default="total")
    num_nodes: int = field(static=True, default=48)
    max_updates: int = field(static=True, default=200)
    tolerance: float | None = field(static=True, default=None)

    def __post_init__(self):
        if self.gradient not in ("total", "partial"):
            raise ValueError(f"Hybrid.gradient must be 'total' or 'partial', got {self.gradient!r}")
        check_settings(self)

    def condition(
        self, model: Model, X: Float[Array, "N D"], y: Float[Array, " N"], sites: Any = None
    ) -> Conditioned:
        """Condition on checked data, starting at ``sites`` or at the sites of each output alone."""
        fixed_point = _solve(self, Objective(0.0, self.num_nodes), model, X, y, sites)
        stacked = fixed_point.sites
        # The energy of EP is not stationary at these sites: its total derivative goes through them.
        stacked = stacked if self.gradient == "total" else jax.lax.stop_gradient(stacked)
        log_evidence = energy(Objective(1.0, self.num_nodes), model, X, y, stacked)
        return assemble(model, X, y, fixed_point, log_evidence, self.num_nodes)


def _condition(inference, objective, model, X, y, sites):
    fixed_point = _solve(inference, objective, model, X, y, sites)
    log_evidence = stationary_energy(objective, model, X, y, fixed_point.sites, fixed_point.nodes)
    return assemble(model, X, y, fixed_point, log_evidence, inference.num_nodes)


def _solve(inference, objective, model, X, y, sites):
    K, prior_mean = model.kernel.gram(X), model.mean(X)
    if sites is None:
        start = first_sites(model.likelihood, y, prior_mean, jnp.diagonal(K), inference.num_nodes)
    else:
        start = _stacked(sites)
    tolerance = default_tolerance(X.dtype) if inference.tolerance is None else inference.tolerance
    return converged_sites(
        objective,
        model.likelihood,
        y,
        K,
        prior_mean,
        jax.lax.stop_gradient(start),
        tolerance=tolerance,
        max_updates=inference.max_updates,
    )


def _stacked(sites: Sites):
    return jnp.stack([sites.lam1, sites.lam2])
