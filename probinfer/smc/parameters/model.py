r"""Parameters of a Feynman-Kac model: a prior, and the model that belongs to each value.

.. math:: p(\theta, x_{0:T-1}) \propto p(\theta)\,M_0^\theta(x_0)\,G_0^\theta(x_0)
    \prod_{t=1}^{T-1} M_t^\theta(x_{t-1}, x_t)\,G_t^\theta(x_{t-1}, x_t)

The likelihood of the parameters is the evidence :math:`Z(\theta)` of their model, which a particle filter estimates
without bias. ``PMMH`` and ``SMC2`` work with such estimates; ``ParticleGibbs`` draws path and parameters in turn, and
works with the joint density above. Positions are unconstrained vectors (d,) in the default float type.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer import targets
from probinfer.core.algorithms import as_partial
from probinfer.core.errors import check_key
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey, Scalar, field, pytree
from probinfer.smc.filtering.filter import check_counts
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac, FeynmanKac
from probinfer.smc.tempered.bridge import flatten_one, unflatten
from probinfer.targets import Target

__all__ = ["Parameters", "check_parameters", "draw", "log_joint", "log_prior", "model_at"]


@pytree
class Parameters:
    """A state-space model with unknown parameters: what ``PMMH``, ``SMC2`` and ``ParticleGibbs`` sample.

    Args:
        priors: tree of proper NumPyro distributions, as for ``targets.from_prior``; its names are those of the draws.
        model_fn: ``model_fn(theta) -> FeynmanKac``, theta a tree of constrained values shaped like the priors; pure,
            its data bound by ``jax.tree_util.Partial(fn, y)`` or ``LogDensity(fn, y)``. ``PMMH`` and ``SMC2`` take a
            ``BatchedFeynmanKac`` too.
        num_steps: T.
        log_initial: ``log_initial(theta, x_0) -> ()``, the log density of ``init_sample``; for ``ParticleGibbs``.

    Raises:
        TypeError: a function is none, a leaf of ``priors`` is no distribution, or ``model_fn`` returns no model.
        ValueError: T is below 1, a prior is improper or discrete, or ``log_initial`` does not return one number.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from jax.tree_util import Partial
        >>> from probinfer import smc
        >>> def start(key): return jax.random.normal(key)
        >>> def walk(scale, key, x, t): return x + scale * jax.random.normal(key)
        >>> def fit(y, x_previous, x, t): return -0.5 * (y[t] - x) ** 2
        >>> def model(y, theta):
        ...     return smc.FeynmanKac(start, Partial(walk, theta["scale"]), Partial(fit, y))
        >>> target = smc.Parameters({"scale": dist.HalfNormal(1.0)}, Partial(model, jnp.zeros(5)), num_steps=5)
        >>> target.names
        ('scale',)
    """

    target: Target
    model_fn: Any
    log_initial: Any
    like: Any
    num_steps: int = field(static=True)

    def __init__(self, priors: Any, model_fn: Any, num_steps: int, log_initial: Any = None):
        check_counts(num_steps=num_steps)
        target = targets.from_prior(priors, _no_likelihood)
        if target.prior is None:
            raise ValueError(
                "the priors must be proper (normalised, not masked): the engines start from draws of them"
            )
        like = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(target.prior.sample, jax.random.key(0)),
        )
        fields = {"target": target, "like": like, "num_steps": num_steps, "log_initial": None}
        fields["model_fn"] = _checked(model_fn, "model_fn")
        if log_initial is not None:
            fields["log_initial"] = _checked(log_initial, "log_initial")
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        _check_model(self)

    @property
    def names(self) -> tuple[str, ...]:
        """One dotted name a leaf of the parameters."""
        return self.target.names

    @property
    def dimension(self) -> int:
        """Of the unconstrained position: d."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.like))

    def constrain(self, position: ArrayTree) -> ArrayTree:
        """Map one unconstrained position (a tree) to parameters."""
        return self.target.constrain(position)

    def unconstrain(self, values: ArrayTree) -> ArrayTree:
        """Map parameters to the unconstrained position, a tree; errors as in ``Target.unconstrain``."""
        return self.target.unconstrain(values)


def _no_likelihood(theta: ArrayTree) -> Array:
    return jnp.zeros((), jnp.result_type(float))


def _checked(fn: Any, name: str) -> Any:
    if not callable(fn):
        raise TypeError(
            f"{name} of Parameters must be a function, got {type(fn).__name__}; bind data to it with "
            "jax.tree_util.Partial(fn, data)"
        )
    return as_partial(fn)


def _check_model(parameters: Parameters) -> None:
    """Refuse functions that return something else than they should; nothing is computed."""
    theta = jax.eval_shape(parameters.constrain, parameters.like)
    model = jax.eval_shape(parameters.model_fn, theta)
    if not isinstance(model, (FeynmanKac, BatchedFeynmanKac)):
        raise TypeError(
            f"model_fn(theta) must return a smc.FeynmanKac (or a smc.BatchedFeynmanKac), got {type(model).__name__}"
        )
    if parameters.log_initial is None or isinstance(model, BatchedFeynmanKac):
        return

    def at_start(theta: ArrayTree) -> Any:
        return parameters.log_initial(theta, parameters.model_fn(theta).init_sample(jax.random.key(0)))

    found = jax.eval_shape(at_start, theta)
    if getattr(found, "shape", None) != ():
        raise ValueError(
            f"log_initial(theta, x_0) must return one number (shape ()), got {found}; sum over the entries of x_0"
        )


def check_parameters(key: Any, target: Any, name: str) -> None:
    """Refuse what an engine for state-space models cannot work with.

    Args:
        key: should be one typed random key.
        target: should be ``Parameters``.
        name: of the engine, for the message.

    Raises:
        TypeError: not a key, or not ``Parameters``.
    """
    check_key(key)
    if not isinstance(target, Parameters):
        raise TypeError(
            f"{name} needs a model with states and parameters, got {type(target).__name__}; write it as "
            "smc.Parameters(priors, model_fn, num_steps). For a density of parameters alone take mcmc.NUTS()"
        )


def draw(target: Parameters, key: PRNGKey) -> Float[Array, " d"]:
    """Draw a position from the prior."""
    assert target.target.prior is not None
    return flatten_one(target.target.prior.sample(key))


def log_prior(target: Parameters, position: Float[Array, " d"]) -> Scalar:
    """Return the log prior density of a position, normalised, the log Jacobian included."""
    assert target.target.prior is not None
    return target.target.prior.logdensity_fn(unflatten(target.like, position)).astype(position.dtype)


def model_at(target: Parameters, position: Float[Array, " d"]) -> Any:
    """Return the model of a position."""
    return target.model_fn(target.constrain(unflatten(target.like, position)))


def log_joint(target: Parameters, position: Float[Array, " d"], path: ArrayTree) -> Scalar:
    """Return the log density of parameters and path together, the log prior of the position included.

    Args:
        target: whose models are ``FeynmanKac`` with ``log_transition``, with ``log_initial``.
        position: of the parameters.
        path: leaves (T, ...).
    """
    theta = target.constrain(unflatten(target.like, position))
    fk = target.model_fn(theta)
    first = jax.tree.map(lambda leaf: leaf[0], path)
    before, after = (
        jax.tree.map(lambda leaf, cut=cut: leaf[cut], path) for cut in (slice(-1), slice(1, None))
    )
    times = jnp.arange(1, target.num_steps, dtype=jnp.int32)
    moves = jax.vmap(fk.log_transition)(before, after, times) + jax.vmap(fk.log_potential)(
        before, after, times
    )
    start = target.log_initial(theta, first) + fk.log_potential(first, first, jnp.int32(0))
    return log_prior(target, position) + (start + jnp.sum(moves)).astype(position.dtype)
