"""Laplace's approximation: the mode of p(f | y) and the curvature there.

The mode is found by Newton's method with a line search. Its derivative has a closed form, df = M(dμ + dK ∇ℓ) + Σ ∂∇ℓ,
so the evidence is an ordinary function of the mode, differentiable as often as the likelihood is.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.status import Status
from probinfer.core.types import Array, Float, Int, field, pytree
from probinfer.gp.approximation.assembly import assemble
from probinfer.gp.approximation.conditioned import Conditioned
from probinfer.gp.approximation.fixed_point import FixedPoint, check_settings, default_tolerance
from probinfer.gp.approximation.gaussian_marginals import marginals
from probinfer.gp.approximation.updates import first_sites
from probinfer.gp.model.likelihoods.moments import derivatives
from probinfer.gp.model.model import Model
from probinfer.gp.structure.dense import PosteriorMatrices, posterior_matrices

__all__ = ["Laplace"]

_STEP_SIZES = 0.5 ** np.arange(12)
# Ratio of posterior variances with and without the convex parts: an expansion twice as wide is not local.
_MAX_VARIANCE_RATIO = 4.0


@pytree
class Laplace:
    """Laplace's approximation.

    If the likelihood is log-concave there is one mode. Otherwise (Student-t noise) there may be several, which come
    and go with the hyperparameters: the evidence jumps from one to another, and where a mode vanishes, the curvature of
    the posterior falls to zero there and the expansion can give any evidence, however large. So the evidence is NaN and
    the status ``POOR_APPROXIMATION`` if outputs whose log density is convex at the mode make a marginal more than twice
    as wide as it is without them. The remaining evidence may have no maximum at all, and ``gp.fit`` then says so: the
    evidence of ``gp.VI`` is a bound and has one.

    Attributes:
        num_nodes: quadrature nodes for leave-one-out densities without a closed form.
        max_updates: maximum number of Newton steps; the status reports if they were not enough.
        tolerance: largest last Newton step, in posterior standard deviations; None: 1e-8, and 1e-4 in float32.

    Raises:
        ValueError: a setting is outside its range.

    References:
        Williams and Barber (1998); Rasmussen and Williams (2006), algorithms 3.1 and 5.1 (tests check
        the sign of its implicit part by finite differences).
    """

    num_nodes: int = field(static=True, default=48)
    max_updates: int = field(static=True, default=100)
    tolerance: float | None = field(static=True, default=None)

    def __post_init__(self):
        check_settings(self)

    def condition(
        self, model: Model, X: Float[Array, "N D"], y: Float[Array, " N"], sites: Any = None
    ) -> Conditioned:
        """Condition on checked data, starting at the mean under ``sites`` or under the sites of each output alone."""
        K, prior_mean = model.kernel.gram(X), model.mean(X)
        signed = not model.likelihood.log_concave
        # Start at the posterior mean of the first sites
        if sites is None:
            lam1, lam2 = first_sites(model.likelihood, y, prior_mean, jnp.diagonal(K), self.num_nodes)
        else:
            lam1, lam2 = sites.lam1, sites.lam2
        q = marginals(K, prior_mean, lam1, lam2, signed)
        start = jnp.where((q.status == Status.OK) & jnp.isfinite(q.mean).all(), q.mean, prior_mean)
        tolerance = default_tolerance(X.dtype) if self.tolerance is None else self.tolerance
        settings = self.max_updates, tolerance
        # Find the mode
        f, residual, num_updates, status = _mode(
            settings, model.likelihood, y, K, prior_mean, jax.lax.stop_gradient(start)
        )
        # Expand around the mode: log Z = log p(y | f) − ½ (f − μ)ᵀ K⁻¹ (f − μ) − ½ log |I + KW| (R&W eq. 3.32), where
        # W = −∇∇ℓ and, at the mode, K⁻¹ (f − μ) = ∇ℓ (eq. 3.17): K is never inverted.
        log_p, slope, curvature, _ = derivatives(model.likelihood, y, f)
        matrices = posterior_matrices(K, -curvature, signed)
        is_local = _is_local(K, curvature, matrices) if signed else True
        log_evidence = jnp.sum(log_p) - 0.5 * jnp.dot(f - prior_mean, slope) - 0.5 * matrices.log_det
        fixed_point = FixedPoint(
            sites=jnp.stack([slope - curvature * f, -curvature]),
            residual=residual,
            num_updates=num_updates,
            status=status,
        )
        return assemble(model, X, y, fixed_point, log_evidence, self.num_nodes, is_local)


def _is_local(K: Array, curvature: Array, matrices: PosteriorMatrices) -> Array:
    """Whether the outputs whose log density is convex at the mode leave the width of the posterior about as it is."""
    K, curvature, covariance = jax.lax.stop_gradient((K, curvature, matrices.covariance))
    concave_covariance = posterior_matrices(K, jnp.maximum(-curvature, 0), False).covariance
    return jnp.all(jnp.diagonal(covariance) <= _MAX_VARIANCE_RATIO * jnp.diagonal(concave_covariance))


class _NewtonState(NamedTuple):
    f: Float[Array, " N"]  # latent values
    a: Float[Array, " N"]  # K⁻¹ (f − μ)
    residual: Float[Array, ""]  # largest entry of the last Newton step, in posterior standard deviations
    num_updates: Int[Array, ""]
    status: Int[Array, ""]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _mode(settings, likelihood, y, K, prior_mean, start):
    """The mode, the size of the last Newton step, the number of steps and a status."""
    max_updates, tolerance = settings
    # Start: the prior mean, or the end of one Newton step if it is higher. K⁻¹ (start − μ) is unknown, and a Newton
    # step gives both f and a without an inverse of K.
    f, a, _, status = _newton_step(likelihood, y, K, prior_mean, start)
    prior_height = _log_posterior(likelihood, y, prior_mean, prior_mean, jnp.zeros_like(start))
    is_better = (_log_posterior(likelihood, y, prior_mean, f, a) > prior_height) & (status == Status.OK)
    state = _NewtonState(
        f=jnp.where(is_better, f, prior_mean),
        a=jnp.where(is_better, a, 0),
        residual=jnp.full((), jnp.inf, f.dtype),
        num_updates=jnp.int32(1),
        status=jnp.int32(0),
    )

    # Iterate
    def is_unfinished(state):
        active = (state.residual > tolerance) & (state.status == Status.OK)
        return active & (state.num_updates < max_updates)

    def advance(state):
        f, a, stddev, status = _newton_step(likelihood, y, K, prior_mean, state.f)
        return _line_search(likelihood, y, prior_mean, state, f, a, stddev, status)

    state = jax.lax.while_loop(is_unfinished, advance, state)
    end = jnp.where(state.residual > tolerance, int(Status.MAX_ITERATIONS), int(Status.OK))
    status = jnp.where(state.status == Status.OK, end, state.status).astype(jnp.int32)
    return state.f, state.residual, state.num_updates, status


@_mode.defjvp
def _mode_jvp(settings, primals, tangents):
    likelihood, y, K, _, _ = primals
    dlikelihood, dy, dK, dprior_mean, _ = tangents
    f, residual, num_updates, status = _mode(settings, *primals)

    def slope_at(likelihood, y):
        return derivatives(likelihood, y, f)[1]

    slope, dslope = jax.jvp(slope_at, (likelihood, y), (dlikelihood, dy))
    curvature = derivatives(likelihood, y, f)[2]
    matrices = posterior_matrices(K, -curvature, not likelihood.log_concave)
    # Implicit function theorem at ∇ℓ(f) = K⁻¹ (f − μ) (R&W eq. 5.24, with the terms of μ and of the likelihood).
    df = matrices.shrinkage @ (dprior_mean + dK @ slope) + matrices.covariance @ dslope
    no_tangent = np.zeros((), jax.dtypes.float0)
    return (f, residual, num_updates, status), (df, jnp.zeros_like(residual), no_tangent, no_tangent)


def _newton_step(likelihood, y, K, prior_mean, f):
    """The end of a Newton step, (K⁻¹ + W)⁻¹ (W f + ∇ℓ + K⁻¹ μ) (R&W eq. 3.18), W = −∇∇ℓ.

    Where the log density is convex, W is negative and the step may descend; then W is 0 there, and the step ascends.

    Returns:
        f, a, the posterior standard deviations and a status.
    """
    _, slope, curvature, _ = derivatives(likelihood, y, f)

    def step(weight, signed):
        # The posterior mean of sites of precision W whose first parameters are W f + ∇ℓ.
        q = marginals(K, prior_mean, slope + weight * f, weight, signed)
        return q.mean, q.alpha, jnp.sqrt(q.variance), q.status

    def ascent_step():
        return step(jnp.maximum(-curvature, 0), False)

    if likelihood.log_concave:
        return ascent_step()
    exact = step(-curvature, True)
    return jax.lax.cond(exact[3] == Status.OK, lambda: exact, ascent_step)


def _line_search(likelihood, y, prior_mean, state, f, a, stddev, status) -> _NewtonState:
    # Evaluate: a is linear in f, so trial points cost no solve.
    step_sizes = jnp.asarray(_STEP_SIZES, f.dtype)[:, None]
    trial_f, trial_a = state.f + step_sizes * (f - state.f), state.a + step_sizes * (a - state.a)
    heights = jax.vmap(lambda f, a: _log_posterior(likelihood, y, prior_mean, f, a))(trial_f, trial_a)
    heights = jnp.where(jnp.isfinite(heights), heights, -jnp.inf)
    current = _log_posterior(likelihood, y, prior_mean, state.f, state.a)

    # Choose the longest step that does not descend: near the mode heights agree to rounding, where the full step is
    # right.
    slack = 10 * float(jnp.finfo(f.dtype).eps) * len(f) * (1 + jnp.abs(current))
    ascends = heights >= current - slack
    chosen = jnp.where(ascends.any(), jnp.argmax(ascends), jnp.argmax(heights))

    # Accept, or stay if the step failed
    residual = jnp.max(jnp.abs(f - state.f) / stddev)
    failed = (status != Status.OK) | ~jnp.isfinite(residual)
    failure = jnp.where(status == Status.OK, int(Status.NON_FINITE), status)
    return _NewtonState(
        f=jnp.where(failed, state.f, trial_f[chosen]),
        a=jnp.where(failed, state.a, trial_a[chosen]),
        residual=jnp.where(failed, jnp.inf, residual),
        num_updates=state.num_updates + 1,
        status=jnp.where(failed, failure, int(Status.OK)).astype(jnp.int32),
    )


def _log_posterior(likelihood, y, prior_mean, f, a):
    """Log p(y | f) − ½ (f − μ)ᵀ K⁻¹ (f − μ): the log posterior of f up to a constant (R&W eq. 3.12)."""
    return jnp.sum(likelihood.log_density(y, f)) - 0.5 * jnp.dot(f - prior_mean, a)
