"""Laplace's approximation: the mode of p(f | y) and the curvature there.

The mode is found by Newton's method with a line search. Its derivative is a closed form, df = M(dμ + dK ∇ℓ) +
Σ ∂∇ℓ, so the evidence is an ordinary function of it, differentiable to any order that the likelihood is.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.status import Status
from probinfer.core.types import Array, Float, field, pytree
from probinfer.gp.approximation.assembly import assemble
from probinfer.gp.approximation.conditioned import Conditioned
from probinfer.gp.approximation.fixed_point import FixedPoint, check_settings, default_tolerance
from probinfer.gp.approximation.gaussian_marginals import marginals
from probinfer.gp.approximation.updates import first_sites
from probinfer.gp.model.likelihoods.moments import derivatives
from probinfer.gp.model.model import Model
from probinfer.gp.structure.dense import Precision, precision

__all__ = ["Laplace"]

_STEPS = 0.5 ** np.arange(12)  # the Newton step and its halves
# Posterior variances beside those without the convex parts: twice as wide is no local expansion.
_WIDEST = 4.0


@pytree
class Laplace:
    """Laplace's approximation.

    Where the likelihood is log-concave there is one mode. Elsewhere (Student-t noise) there may be several, which come
    and go with the hyperparameters: the evidence jumps from one to another, and where a mode vanishes, the curvature of
    the posterior falls to zero there and the expansion gives any evidence, however large. An evidence is NaN and the
    status ``POOR_APPROXIMATION`` where outputs whose log density is convex at the mode widen a marginal to more than
    twice its standard deviation without them. What is left may have no maximum at all, and ``gp.fit`` then says so: the
    evidence of ``gp.VI`` is a bound and has one.

    Attributes:
        num_nodes: quadrature nodes for leave-one-out densities without a closed form.
        max_updates: the most Newton steps; a status says when they were not enough.
        tolerance: the last Newton step, in posterior standard deviations; None: 1e-8, and 1e-4 in float32.

    Raises:
        ValueError: a setting is outside its range.

    References:
        Williams and Barber (1998); Rasmussen and Williams (2006), algorithms 3.1 and 5.1 (the sign of the implicit part
        there is checked by finite differences here).
    """

    num_nodes: int = field(static=True, default=48)
    max_updates: int = field(static=True, default=100)
    tolerance: float | None = field(static=True, default=None)

    def __post_init__(self):
        check_settings(self)

    def condition(
        self, model: Model, X: Float[Array, "N D"], y: Float[Array, " N"], sites: Any = None
    ) -> Conditioned:
        """Condition on data that were checked before, from the mean that ``sites`` have, or those of each output."""
        K, prior_mean = model.kernel.gram(X), model.mean(X)
        signed = not model.likelihood.log_concave
        if sites is None:
            lam1, lam2 = first_sites(model.likelihood, y, prior_mean, jnp.diagonal(K), self.num_nodes)
        else:
            lam1, lam2 = sites.lam1, sites.lam2
        q = marginals(K, prior_mean, lam1, lam2, signed)
        start = jnp.where((q.status == Status.OK) & jnp.isfinite(q.mean).all(), q.mean, prior_mean)
        tolerance = default_tolerance(X.dtype) if self.tolerance is None else self.tolerance
        settings = self.max_updates, tolerance
        f, residual, num_updates, status = _mode(
            settings, model.likelihood, y, K, prior_mean, jax.lax.stop_gradient(start)
        )
        log_p, slope, curvature, _ = derivatives(model.likelihood, y, f)
        known = precision(K, -curvature, signed)
        is_local = _is_local(K, curvature, known) if signed else True
        log_evidence = jnp.sum(log_p) - 0.5 * jnp.dot(f - prior_mean, slope) - 0.5 * known.log_det
        found = FixedPoint(jnp.stack([slope - curvature * f, -curvature]), residual, num_updates, status)
        return assemble(model, X, y, found, log_evidence, self.num_nodes, is_local)


def _is_local(K: Array, curvature: Array, known: Precision) -> Array:
    """Whether the posterior is not much wider for the outputs whose log density is convex at the mode."""
    K, curvature, covariance = jax.lax.stop_gradient((K, curvature, known.covariance))
    without = precision(K, jnp.maximum(-curvature, 0), False).covariance
    return jnp.all(jnp.diagonal(covariance) <= _WIDEST * jnp.diagonal(without))


class _Search(NamedTuple):
    f: Any
    a: Any  # K⁻¹ (f − μ)
    residual: Any
    num_updates: Any
    status: Any


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _mode(settings, likelihood, y, K, prior_mean, start):
    """The mode, the size of the last Newton step, the number of steps and a status."""
    max_updates, tolerance = settings
    zero = jnp.zeros_like(start)
    # K⁻¹ (start − μ) is not known: one step of Newton's method from the start gives both f and a.
    f, a, _, status = _newton(likelihood, y, K, prior_mean, start)
    at_prior = _height(likelihood, y, prior_mean, prior_mean, zero)
    better = (_height(likelihood, y, prior_mean, f, a) > at_prior) & (status == Status.OK)
    first = _Search(
        jnp.where(better, f, prior_mean),
        jnp.where(better, a, 0),
        jnp.full((), jnp.inf, f.dtype),
        jnp.int32(1),
        jnp.int32(0),
    )

    def unfinished(search):
        return (
            (search.residual > tolerance) & (search.status == Status.OK) & (search.num_updates < max_updates)
        )

    def advance(search):
        f, a, scale, status = _newton(likelihood, y, K, prior_mean, search.f)
        return _line_search(likelihood, y, prior_mean, search, f, a, scale, status)

    search = jax.lax.while_loop(unfinished, advance, first)
    stuck = jnp.where(search.residual > tolerance, int(Status.MAX_ITERATIONS), int(Status.OK))
    status = jnp.where(search.status == Status.OK, stuck, search.status).astype(jnp.int32)
    return search.f, search.residual, search.num_updates, status


@_mode.defjvp
def _mode_jvp(settings, primals, tangents):
    likelihood, y, K, _, _ = primals
    dlikelihood, dy, dK, dprior_mean, _ = tangents
    f, residual, num_updates, status = _mode(settings, *primals)

    def slope_at(likelihood, y):
        return derivatives(likelihood, y, f)[1]

    slope, dslope = jax.jvp(slope_at, (likelihood, y), (dlikelihood, dy))
    curvature = derivatives(likelihood, y, f)[2]
    known = precision(K, -curvature, not likelihood.log_concave)
    df = known.shrinkage @ (dprior_mean + dK @ slope) + known.covariance @ dslope
    none = np.zeros((), jax.dtypes.float0)
    return (f, residual, num_updates, status), (df, jnp.zeros_like(residual), none, none)


def _newton(likelihood, y, K, prior_mean, f):
    """Where a Newton step leads: f, a, the posterior standard deviations, a status.

    Where the log density is convex the curvature of the posterior may have directions that descend; then the convex
    parts are left out, and the direction ascends again.
    """
    _, slope, curvature, _ = derivatives(likelihood, y, f)

    def step(weight, signed):
        q = marginals(K, prior_mean, slope + weight * f, weight, signed)
        return q.mean, q.alpha, jnp.sqrt(q.variance), q.status

    def ascending():
        return step(jnp.maximum(-curvature, 0), False)

    if likelihood.log_concave:
        return ascending()
    exact = step(-curvature, True)
    return jax.lax.cond(exact[3] == Status.OK, lambda: exact, ascending)


def _line_search(likelihood, y, prior_mean, search, f, a, scale, status) -> _Search:
    steps = jnp.asarray(_STEPS, f.dtype)[:, None]
    trial_f, trial_a = search.f + steps * (f - search.f), search.a + steps * (a - search.a)
    heights = jax.vmap(lambda f, a: _height(likelihood, y, prior_mean, f, a))(trial_f, trial_a)
    heights = jnp.where(jnp.isfinite(heights), heights, -jnp.inf)
    here = _height(likelihood, y, prior_mean, search.f, search.a)
    slack = 10 * float(jnp.finfo(f.dtype).eps) * len(f) * (1 + jnp.abs(here))
    # The longest step that does not descend: near the mode heights agree to rounding, and the full step is right.
    good = heights >= here - slack
    chosen = jnp.where(good.any(), jnp.argmax(good), jnp.argmax(heights))
    size = jnp.max(jnp.abs(f - search.f) / scale)
    failed = (status != Status.OK) | ~jnp.isfinite(size)
    why = jnp.where(status == Status.OK, int(Status.NON_FINITE), status)
    status = jnp.where(failed, why, int(Status.OK)).astype(jnp.int32)
    return _Search(
        jnp.where(failed, search.f, trial_f[chosen]),
        jnp.where(failed, search.a, trial_a[chosen]),
        jnp.where(failed, jnp.inf, size),
        search.num_updates + 1,
        status,
    )


def _height(likelihood, y, prior_mean, f, a):
    """Log p(y | f) − ½ (f − μ)ᵀ K⁻¹ (f − μ)."""
    return jnp.sum(likelihood.log_density(y, f)) - 0.5 * jnp.dot(f - prior_mean, a)
