r"""Latent variables by particles, parameters by one iterate: maximum marginal likelihood without a learning rate.

The free energy :math:`F(\theta, \mu) = E_\mu[\log \mu(z) - \log p(z, x \mid \theta)]` is least at the maximum of the
marginal likelihood, with the posterior of the latent variables in the place of :math:`\mu`. The particles follow the
Stein direction at the current parameters, in the coordinates of their cloud (``coin.svgd``); the parameters follow the
mean gradient over the particles by a bet of their own, or are set to their best values given the particles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probinfer import betting
from probinfer.coin.cloud.geometry import Diagonal
from probinfer.coin.cloud.particles import check_positions, ravel_particles
from probinfer.coin.cloud_descent import CloudInfo, CloudState, choose_geometry
from probinfer.coin.stein_descent import svgd
from probinfer.core.algorithms import Algorithm, algorithm, as_partial
from probinfer.core.binding import LogDensity, StochasticLogDensity
from probinfer.core.errors import shortened
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, PRNGKey, field, pytree

__all__ = ["EMInfo", "EMState", "em"]


class EMState(NamedTuple):
    """Where a run stands: ``cloud`` of the latent variables, ``parameters``, and the state of their bet (or ())."""

    cloud: CloudState
    parameters: ArrayTree
    bet: Any

    @property
    def positions(self) -> ArrayTree:
        """The particles of the latent variables, leaves (N, ...)."""
        return self.cloud.positions


class EMInfo(NamedTuple):
    """Report of a step.

    ``cloud`` is the ``CloudInfo`` of the particles before they moved. ``log_joint`` is the mean log joint density of
    the particles with a finite one, and ``gradient_norm`` the length of its gradient in the parameters, both before the
    step; NaN in a marginal M-step, which takes no gradient. ``status`` is ``NON_FINITE`` where the particles have no
    score, or a marginal M-step gave parameters that are not finite (the old ones are kept), else that of the cloud.
    """

    cloud: CloudInfo
    log_joint: Array
    gradient_norm: Array
    status: Array


@pytree
class _EMConfig:
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

    The published set-up is ``geometry=coin.Identity(), bet=betting.coin(unit=0.5),
    parameter_bet=betting.coin(unit=0.5), bandwidth="published"``.

    Args:
        log_joint_fn: ``log p(z, x | theta)`` of one latent position (a tree) and the parameters (an unconstrained
            tree), or a ``StochasticLogDensity`` of a key, a position and the parameters: one batch a step.
        maximize_fn: ``maximize_fn(particles) -> parameters``, the maximum over theta of the mean log joint density of
            particles with leaves (N, ...): the marginal M-step. None: a gradient step by ``parameter_bet``.
        parameter_bet: an optax transformation for the parameters. None: ``betting.coin()``, which finds their units.
        kernel: of the particles, as in ``coin.svgd``.
        geometry: of the particles. None: ``coin.Full()`` where there are more particles than latent numbers, else
            ``coin.Diagonal()``.
        bet: of the particles, as in ``coin.svgd``.
        bandwidth: as in ``coin.svgd``.

    Returns:
        ``init(particles, parameters) -> EMState`` with leaves (N, ...) for the particles (``parameters`` may be None
        with a ``maximize_fn``), and ``step(key, state) -> (EMState, EMInfo)``, for ``pi.run``. A gradient in z and one
        in theta a particle and step.

    Raises:
        TypeError: functions that are none; from ``init``: particles or parameters that are not floating point.
        ValueError: from ``init``: particles that are no cloud, no parameters, or a ``maximize_fn`` whose value is not
            shaped like them.

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
    parameter_bet = betting.coin() if parameter_bet is None else parameter_bet
    parameter_bet = optax.GradientTransformation(
        as_partial(parameter_bet.init), as_partial(parameter_bet.update)
    )
    if bet is not None:
        bet = optax.GradientTransformation(as_partial(bet.init), as_partial(bet.update))
    settings = {"kernel": kernel, "geometry": geometry, "bet": bet}
    stochastic = isinstance(log_joint_fn, StochasticLogDensity)
    svgd(log_joint_fn, **settings, bandwidth=bandwidth)  # refuses bad settings now
    maximize_fn = None if maximize_fn is None else as_partial(maximize_fn)
    config = _EMConfig(maximize_fn, parameter_bet, settings, bandwidth, stochastic)
    return algorithm(_init, _step, config, as_partial(log_joint_fn))


def _particles(
    config: _EMConfig, log_joint_fn: Any, parameters: ArrayTree, positions: ArrayTree
) -> Algorithm:
    """Stein variational gradient descent at the current parameters."""
    num, dims = ravel_particles(positions).shape
    geometry = config.svgd["geometry"] or (choose_geometry(num, dims) if dims < num else Diagonal())
    kind = StochasticLogDensity if config.stochastic else LogDensity
    at = _noisy_at if config.stochastic else _at
    settings = config.svgd | {"geometry": geometry, "bandwidth": config.bandwidth}
    return svgd(kind(at, log_joint_fn, parameters), **settings)


def _at(log_joint_fn: Any, parameters: ArrayTree, position: ArrayTree) -> Array:
    return log_joint_fn(position, parameters)


def _noisy_at(log_joint_fn: Any, parameters: ArrayTree, key: PRNGKey, position: ArrayTree) -> Array:
    return log_joint_fn(key, position, parameters)


def _init(
    config: _EMConfig, log_joint_fn: Any, particles: ArrayTree, parameters: ArrayTree = None
) -> EMState:
    check_positions(particles)
    latents = _particles(config, log_joint_fn, parameters, particles).init(particles)
    if config.maximize_fn is None:
        betting.coin().init(parameters)  # refuses what is not floating point, in words
        parameters = jax.tree.map(jnp.asarray, parameters)
        return EMState(latents, parameters, config.bet.init(parameters))
    best = config.maximize_fn(latents.positions)
    if parameters is not None and _shapes(best) != _shapes(parameters):
        raise ValueError(
            "maximize_fn must return parameters shaped like those given, expected "
            f"{_shapes(parameters)}, got {_shapes(best)}"
        )
    return EMState(latents, jax.tree.map(jnp.asarray, best if parameters is None else parameters), ())


def _shapes(tree: ArrayTree) -> Any:
    return jax.tree.map(jnp.shape, tree)


def _step(config: _EMConfig, log_joint_fn: Any, key: PRNGKey, state: EMState) -> tuple[EMState, EMInfo]:
    algorithm = _particles(config, log_joint_fn, state.parameters, state.positions)
    latents, info = algorithm.step(key, state.cloud)
    if config.maximize_fn is not None:
        return _marginal(config, state, latents, info)
    value, gradient = _mean_gradient(config, log_joint_fn, key, state)
    updates, bet = config.bet.update(jax.tree.map(jnp.negative, gradient), state.bet, state.parameters)
    parameters = jax.tree.map(
        lambda p, u: jnp.where(jnp.isfinite(u), p + u.astype(p.dtype), p), state.parameters, updates
    )
    norm = optax.tree.norm(gradient)
    return EMState(latents, parameters, bet), EMInfo(info, value, norm, info.status)


def _mean_gradient(
    config: _EMConfig, log_joint_fn: Any, key: PRNGKey, state: EMState
) -> tuple[Array, ArrayTree]:
    """Mean log joint density over the particles that have one, and its gradient in the parameters."""

    def of_one(position):
        batch = (key,) if config.stochastic else ()
        return jax.value_and_grad(lambda parameters: log_joint_fn(*batch, position, parameters))(
            state.parameters
        )

    values, gradients = jax.vmap(of_one)(state.positions)
    fine = [
        jnp.all(jnp.isfinite(leaf).reshape(len(values), -1), axis=1) for leaf in jax.tree.leaves(gradients)
    ]
    usable = jnp.all(jnp.stack([jnp.isfinite(values), *fine]), axis=0)
    count = jnp.sum(usable)

    def mean(leaf):
        mask = usable.reshape((-1,) + (1,) * (leaf.ndim - 1))
        total = jnp.sum(jnp.where(mask, leaf, 0), axis=0)
        return jnp.where(count > 0, total / jnp.maximum(count, 1).astype(leaf.dtype), jnp.nan)

    return mean(values), jax.tree.map(mean, gradients)


def _marginal(
    config: _EMConfig, state: EMState, latents: CloudState, info: CloudInfo
) -> tuple[EMState, EMInfo]:
    """The best parameters given the particles, where they are finite."""
    best = config.maximize_fn(latents.positions)
    usable = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(best)]))
    parameters = jax.tree.map(
        lambda new, old: jnp.where(usable, jnp.asarray(new, old.dtype), old), best, state.parameters
    )
    status = jnp.where(usable, info.status, jnp.int32(Status.NON_FINITE))
    unknown = jnp.full((), jnp.nan, latents.z.dtype)
    return EMState(latents, parameters, ()), EMInfo(info, unknown, unknown, status)
