r"""Parameters of a Feynman-Kac model: a prior, and the model for each value.

.. math:: p(\theta, x_{0:T-1}) \propto p(\theta)\,M_0^\theta(x_0)\,G_0^\theta(x_0)
    \prod_{t=1}^{T-1} M_t^\theta(x_{t-1}, x_t)\,G_t^\theta(x_{t-1}, x_t)

The likelihood of the parameters is the evidence :math:`Z(\theta)` of their model, which a particle filter estimates
without bias. ``PMMH`` and ``SMC2`` use such estimates; ``ParticleGibbs`` draws path and parameters in turn, and uses
the joint density above. Positions are unconstrained vectors (d,) in the default float type.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer import targets
from probinfer.core.algorithms import as_partial
from probinfer.core.arguments import check_key
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey, Scalar, field, pytree
from probinfer.smc.filtering.filter import check_counts
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac, FeynmanKac
from probinfer.smc.tempered.bridge import flatten_position, unflatten
from probinfer.targets import Target

__all__ = ["Parameters", "check_parameters", "draw_prior", "log_joint", "log_prior", "model_at"]


@pytree
class Parameters:
    """A state-space model with unknown parameters, for ``PMMH``, ``SMC2`` and ``ParticleGibbs``.

    Args:
        priors: tree of proper NumPyro distributions, as for ``targets.from_prior``; its names are those of the draws.
        model_fn: ``model_fn(params) -> FeynmanKac`` with a tree of constrained values shaped like the priors; pure,
            with its data bound by ``jax.tree_util.Partial(fn, y)`` or ``LogDensity(fn, y)``. For ``PMMH`` and ``SMC2``
            it may return a ``BatchedFeynmanKac``.
        num_steps: T.
        log_initial: ``log_initial(params, x_0) -> ()``, the log density of ``init_sample``; for ``ParticleGibbs``.

    Raises:
        TypeError: ``model_fn`` or ``log_initial`` is not a function, a leaf of ``priors`` is not a distribution, or
            ``model_fn`` does not return a model.
        ValueError: T is below 1, a prior is improper or discrete, or ``log_initial`` does not return one number.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from jax.tree_util import Partial
        >>> from probinfer import smc
        >>> def start(key): return jax.random.normal(key)
        >>> def walk(scale, key, x, t): return x + scale * jax.random.normal(key)
        >>> def fit(y, x_previous, x, t): return -0.5 * (y[t] - x) ** 2
        >>> def model(y, params):
        ...     return smc.FeynmanKac(start, Partial(walk, params["scale"]), Partial(fit, y))
        >>> target = smc.Parameters({"scale": dist.HalfNormal(1.0)}, Partial(model, jnp.zeros(5)), num_steps=5)
        >>> target.names
        ('scale',)
    """

    target: Target
    model_fn: Any
    log_initial: Any
    template: Any
    num_steps: int = field(static=True)

    def __init__(self, priors: Any, model_fn: Any, num_steps: int, log_initial: Any = None):
        check_counts(num_steps=num_steps)
        target = targets.from_prior(priors, _no_likelihood)
        if target.prior is None:
            raise ValueError(
                "the priors must be proper (normalized, not masked): the engines start from draws of them"
            )
        template = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(target.prior.sample, jax.random.key(0)),
        )
        fields = {"target": target, "template": template, "num_steps": num_steps, "log_initial": None}
        fields["model_fn"] = _check_function(model_fn, "model_fn")
        if log_initial is not None:
            fields["log_initial"] = _check_function(log_initial, "log_initial")
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        _check_model(self)

    @property
    def names(self) -> tuple[str, ...]:
        """One dotted name for each leaf of the parameters."""
        return self.target.names

    @property
    def dimension(self) -> int:
        """Number of unconstrained coordinates, d."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.template))

    def constrain(self, position: ArrayTree) -> ArrayTree:
        """Map one unconstrained position (a tree) to parameters."""
        return self.target.constrain(position)

    def unconstrain(self, values: ArrayTree) -> ArrayTree:
        """Map parameters to the unconstrained position, a tree; raises as ``Target.unconstrain`` does."""
        return self.target.unconstrain(values)


def _no_likelihood(params: ArrayTree) -> Array:
    return jnp.zeros((), jnp.result_type(float))


def _check_function(fn: Any, name: str) -> Any:
    if not callable(fn):
        raise TypeError(
            f"{name} of Parameters must be a function, got {type(fn).__name__}; bind data to it with "
            "jax.tree_util.Partial(fn, data)"
        )
    return as_partial(fn)


def _check_model(target: Parameters) -> None:
    """Check what the functions return, by shapes alone."""
    params = jax.eval_shape(target.constrain, target.template)
    model = jax.eval_shape(target.model_fn, params)
    if not isinstance(model, (FeynmanKac, BatchedFeynmanKac)):
        raise TypeError(
            f"model_fn(params) must return a smc.FeynmanKac (or a smc.BatchedFeynmanKac), got {type(model).__name__}"
        )
    if target.log_initial is None or isinstance(model, BatchedFeynmanKac):
        return

    def initial_logdensity(params: ArrayTree) -> Any:
        return target.log_initial(params, target.model_fn(params).init_sample(jax.random.key(0)))

    value = jax.eval_shape(initial_logdensity, params)
    if getattr(value, "shape", None) != ():
        raise ValueError(
            f"log_initial(params, x_0) must return one number (shape ()), got {value}; sum over the entries of x_0"
        )


def check_parameters(key: Any, target: Any, name: str) -> None:
    """Check the key and the target of an engine for state-space models.

    Args:
        key: one typed random key.
        target: a ``Parameters``.
        name: of the engine, for the message.

    Raises:
        TypeError: not a key, or not ``Parameters``.
    """
    check_key(key)
    if not isinstance(target, Parameters):
        raise TypeError(
            f"{name} needs a model with states and parameters, got {type(target).__name__}; write it as "
            "smc.Parameters(priors, model_fn, num_steps). For a density of parameters alone use mcmc.NUTS()"
        )


def draw_prior(target: Parameters, key: PRNGKey) -> Float[Array, " d"]:
    """Draw a position from the prior."""
    assert target.target.prior is not None
    return flatten_position(target.target.prior.sample(key))


def log_prior(target: Parameters, position: Float[Array, " d"]) -> Scalar:
    """Return the log prior density of a position, normalized, the log Jacobian included."""
    assert target.target.prior is not None
    return target.target.prior.logdensity_fn(unflatten(target.template, position)).astype(position.dtype)


def model_at(target: Parameters, position: Float[Array, " d"]) -> Any:
    """Return the model for a position."""
    return target.model_fn(target.constrain(unflatten(target.template, position)))


def log_joint(target: Parameters, position: Float[Array, " d"], path: ArrayTree) -> Scalar:
    """Return the log joint density of parameters and path.

    Args:
        target: with ``log_initial``, its models ``FeynmanKac`` with ``log_transition``.
        position: of the parameters.
        path: leaves (T, ...).
    """
    params = target.constrain(unflatten(target.template, position))
    model = target.model_fn(params)
    first = jax.tree.map(lambda leaf: leaf[0], path)
    previous, current = (
        jax.tree.map(lambda leaf, cut=cut: leaf[cut], path) for cut in (slice(-1), slice(1, None))
    )
    times = jnp.arange(1, target.num_steps, dtype=jnp.int32)
    log_steps = jax.vmap(model.log_transition)(previous, current, times) + jax.vmap(model.log_potential)(
        previous, current, times
    )
    log_start = target.log_initial(params, first) + model.log_potential(first, first, jnp.int32(0))
    return log_prior(target, position) + (log_start + jnp.sum(log_steps)).astype(position.dtype)
