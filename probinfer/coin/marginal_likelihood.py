r"""Maximum marginal likelihood without a learning rate: particles for the latent variables, one iterate of parameters.

The free energy :math:`F(\theta, \mu) = E_\mu[\log \mu(z) - \log p(z, x \mid \theta)]` has its minimum at the maximum of
the marginal likelihood, where :math:`\mu` is the posterior of the latent variables. The particles follow the Stein
direction at the current parameters, in the coordinates of their cloud (``coin.svgd``); the parameters follow the mean
gradient over the particles by a separate bet, or are set to their maximum given the particles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer import betting
from probinfer.coin.cloud.geometry import Diagonal
from probinfer.coin.cloud.particles import check_positions, ravel_particles
from probinfer.coin.cloud_descent import CloudInfo, CloudState, bind_bet, choose_geometry
from probinfer.coin.stein_descent import svgd
from probinfer.core.algorithms import Algorithm, algorithm, as_partial
from probinfer.core.binding import LogDensity, StochasticLogDensity
from probinfer.core.errors import shortened
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Float, Int, PRNGKey, field, pytree

__all__ = ["EMInfo", "EMState", "em"]


class EMState(NamedTuple):
    """State of a run.

    Attributes:
        cloud: state of the cloud of latent variables.
        parameters: the current parameters.
        bet: state of the bet of the parameters; () in a marginal M-step.
    """

    cloud: CloudState
    parameters: ArrayTree
    bet: Any

    @property
    def positions(self) -> ArrayTree:
        """The particles of the latent variables, leaves (N, ...)."""
        return self.cloud.positions


class EMInfo(NamedTuple):
    """Report of a step.

    Attributes:
        cloud: ``CloudInfo`` of the particles before they moved.
        log_joint: mean log joint density before the step, over the particles where it is finite; NaN in a marginal
            M-step, which takes no gradient.
        gradient_norm: length of its gradient with respect to the parameters; NaN in a marginal M-step.
        status: ``NON_FINITE`` if no particle has a score, or a marginal M-step gave parameters that are not finite (the
            old ones are kept); otherwise that of the cloud.
    """

    cloud: CloudInfo
    log_joint: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    status: Int[Array, ""]


@pytree
class _EMConfig:
    """Settings of a step; ``bet`` is that of the parameters, ``svgd`` the settings of the particles."""

    maximize_fn: Any
    bet: Any
    svgd: dict
    bandwidth: str = field(static=True)
    stochastic: bool = field(static=True)


def em(
    log_joint_fn: Any,
    *,
    maximize_fn: Any | None = None,
    parameter_bet: optax.GradientTransformation | None = None,
    kernel: Any = None,
    geometry: Any = None,
    bet: optax.GradientTransformation | None = None,
    bandwidth: str = "median",
) -> Algorithm:
    r"""Find :math:`\arg\max_\theta \log \int p(z, x \mid \theta)\, dz` and the posterior of z there.

    The published algorithm is ``geometry=coin.Identity(), bet=betting.coin(unit=0.5),
    parameter_bet=betting.coin(unit=0.5), bandwidth="published"``.

    Args:
        log_joint_fn: ``log p(z, x | theta)`` of one latent position (a tree) and the parameters (an unconstrained
            tree), or a ``StochasticLogDensity`` of a key, a position and the parameters: one batch per step.
        maximize_fn: ``maximize_fn(particles) -> parameters``, the maximizer of the mean log joint density of particles
            with leaves (N, ...): the marginal M-step. None: a gradient step by ``parameter_bet``.
        parameter_bet: an optax transformation for the parameters. None: ``betting.coin()``, which estimates its unit.
        kernel: of the particles, as in ``coin.svgd``.
        geometry: of the particles. None: ``coin.Full()`` if there are more particles than latent dimensions, otherwise
            ``coin.Diagonal()``.
        bet: of the particles, as in ``coin.svgd``.
        bandwidth: as in ``coin.svgd``.

    Returns:
        ``init(particles, parameters) -> EMState`` with leaves (N, ...) for the particles (``parameters`` may be None
        with a ``maximize_fn``), and ``step(key, state) -> (EMState, EMInfo)``, for ``pi.run``. A step takes one
        gradient in z and one in theta per particle.

    Raises:
        TypeError: ``log_joint_fn`` or ``maximize_fn`` is not a function, or a bet is not an optax transformation; from
            ``init``: particles or parameters are not floating point.
        ValueError: From ``init``: the particles are not a cloud, there are no parameters, or ``maximize_fn`` returns
            parameters of other shapes.

    References:
        Sharrock, Dodd and Nemeth (2024), "Tuning-free maximum likelihood training of latent variable models via coin
        betting", algorithms 2 (joint) and 4 (marginal).
    """
    if not callable(log_joint_fn):
        raise TypeError(
            f"log_joint_fn must be a function of a latent position and parameters, got {shortened(log_joint_fn)}"
        )
    if maximize_fn is not None and not callable(maximize_fn):
        raise TypeError(f"maximize_fn must be a function of the particles, got {shortened(maximize_fn)}")
    svgd_settings = {
        "kernel": kernel,
        "geometry": geometry,
        "bet": None if bet is None else bind_bet(bet),
    }
    svgd(log_joint_fn, **svgd_settings, bandwidth=bandwidth)  # refuses bad settings now
    config = _EMConfig(
        maximize_fn=None if maximize_fn is None else as_partial(maximize_fn),
        bet=bind_bet(betting.coin() if parameter_bet is None else parameter_bet),
        svgd=svgd_settings,
        bandwidth=bandwidth,
        stochastic=isinstance(log_joint_fn, StochasticLogDensity),
    )
    return algorithm(_init, _step, config, as_partial(log_joint_fn))


def _svgd_algorithm(
    config: _EMConfig, log_joint_fn: Any, parameters: ArrayTree, positions: ArrayTree
) -> Algorithm:
    """Return Stein variational gradient descent at the current parameters."""
    num_particles, num_dims = ravel_particles(positions).shape
    geometry = config.svgd["geometry"]
    if not geometry:
        geometry = choose_geometry(num_particles, num_dims) if num_dims < num_particles else Diagonal()
    logdensity_fn: Any
    if config.stochastic:
        logdensity_fn = StochasticLogDensity(_stochastic_log_joint_at, log_joint_fn, parameters)
    else:
        logdensity_fn = LogDensity(_log_joint_at, log_joint_fn, parameters)
    return svgd(logdensity_fn, **(config.svgd | {"geometry": geometry, "bandwidth": config.bandwidth}))


def _log_joint_at(log_joint_fn: Any, parameters: ArrayTree, position: ArrayTree) -> Array:
    return log_joint_fn(position, parameters)


def _stochastic_log_joint_at(
    log_joint_fn: Any, parameters: ArrayTree, key: PRNGKey, position: ArrayTree
) -> Array:
    return log_joint_fn(key, position, parameters)


def _init(
    config: _EMConfig, log_joint_fn: Any, particles: ArrayTree, parameters: ArrayTree = None
) -> EMState:
    check_positions(particles)
    cloud = _svgd_algorithm(config, log_joint_fn, parameters, particles).init(particles)
    if config.maximize_fn is None:
        betting.coin().init(parameters)  # refuses parameters that are not floating point
        parameters = jax.tree.map(jnp.asarray, parameters)
        return EMState(cloud, parameters, config.bet.init(parameters))
    maximum = config.maximize_fn(cloud.positions)
    if parameters is not None and _shapes(maximum) != _shapes(parameters):
        raise ValueError(
            "maximize_fn must return parameters shaped like those given, expected "
            f"{_shapes(parameters)}, got {_shapes(maximum)}"
        )
    return EMState(cloud, jax.tree.map(jnp.asarray, maximum if parameters is None else parameters), ())


def _shapes(tree: ArrayTree) -> Any:
    return jax.tree.map(jnp.shape, tree)


def _step(config: _EMConfig, log_joint_fn: Any, key: PRNGKey, state: EMState) -> tuple[EMState, EMInfo]:
    # Particles
    algorithm = _svgd_algorithm(config, log_joint_fn, state.parameters, state.positions)
    cloud, info = algorithm.step(key, state.cloud)

    # Parameters
    if config.maximize_fn is not None:
        return _marginal_m_step(config, state, cloud, info)
    value, gradient = _mean_gradient(config, log_joint_fn, key, state)
    updates, bet = config.bet.update(jax.tree.map(jnp.negative, gradient), state.bet, state.parameters)
    parameters = jax.tree.map(
        lambda p, u: jnp.where(jnp.isfinite(u), p + u.astype(p.dtype), p), state.parameters, updates
    )
    norm = optax.tree.norm(gradient)
    return EMState(cloud, parameters, bet), EMInfo(info, value, norm, info.status)


def _mean_gradient(
    config: _EMConfig, log_joint_fn: Any, key: PRNGKey, state: EMState
) -> tuple[Array, ArrayTree]:
    """Return the mean log joint density over the particles where it is finite, and its gradient for the parameters."""

    def value_and_grad(position):
        batch = (key,) if config.stochastic else ()
        return jax.value_and_grad(lambda parameters: log_joint_fn(*batch, position, parameters))(
            state.parameters
        )

    values, gradients = jax.vmap(value_and_grad)(state.positions)
    usable = jnp.isfinite(values) & jnp.all(jnp.isfinite(ravel_particles(gradients)), axis=1)
    count = jnp.sum(usable)

    def mean(leaf):
        mask = usable.reshape((-1,) + (1,) * (leaf.ndim - 1))
        total = jnp.sum(jnp.where(mask, leaf, 0), axis=0)
        return jnp.where(count > 0, total / jnp.maximum(count, 1).astype(leaf.dtype), jnp.nan)

    return mean(values), jax.tree.map(mean, gradients)


def _marginal_m_step(
    config: _EMConfig, state: EMState, cloud: CloudState, info: CloudInfo
) -> tuple[EMState, EMInfo]:
    """Set the parameters to their maximum given the particles, if it is finite."""
    maximum = config.maximize_fn(cloud.positions)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(maximum)]))
    parameters = jax.tree.map(
        lambda new, old: jnp.where(finite, jnp.asarray(new, old.dtype), old), maximum, state.parameters
    )
    status = jnp.where(finite, info.status, jnp.int32(Status.NON_FINITE))
    nan = jnp.full((), jnp.nan, cloud.z.dtype)
    return EMState(cloud, parameters, ()), EMInfo(info, nan, nan, status)
