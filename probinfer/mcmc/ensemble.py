"""A set of chains that move together: one step of the algorithm is one transition of every chain.

The chains share step size and metric. Warm-up and sampling are the same algorithm: while the warm-up lasts each
step also teaches it, afterwards its state stands still. On a CPU the chains of a step run one after another, since
vectorised trajectories all cost as much as the longest; on an accelerator they are vectorised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.mcmc import hmc, nuts

from probinfer.core.algorithms import Algorithm, algorithm, as_partial
from probinfer.core.types import Array, Float, PRNGKey, PyTree, field, pytree
from probinfer.inference.engine import over
from probinfer.mcmc.adaptation import warmup as warmups
from probinfer.mcmc.adaptation.metric import euclidean, identity

__all__ = ["ChainsInfo", "ChainsState", "Trajectories", "chains", "flatten"]

_MAX_LEAPFROGS = 1000


@pytree
class Trajectories:
    """How a trajectory ends: NUTS when it turns back, HMC after a jittered length.

    Attributes:
        kind: ``"nuts"`` or ``"hmc"``.
        max_tree_depth: the most doublings of NUTS.
        mode: ``"map"``, ``"vmap"`` or ``"auto"`` over the chains.
    """

    kind: str = field(static=True)
    max_tree_depth: int = field(static=True, default=10)
    mode: str = field(static=True, default="auto")


class ChainsState(NamedTuple):
    """The chains, blackjax's ``HMCState`` with a leading axis, and their warm-up.

    ``remaining`` counts the draws that are still wanted once the warm-up is over.
    """

    chains: hmc.HMCState
    warmup: warmups.Warmup
    remaining: Any


class ChainsInfo(NamedTuple):
    """One transition, fields (chain,).

    ``energy`` is the Hamiltonian of the draw; ``tree_depth`` is zero for HMC.
    """

    diverging: Any
    acceptance_rate: Any
    num_leapfrogs: Any
    energy: Any
    tree_depth: Any


def chains(logdensity_fn: Callable, trajectories: Trajectories, config: warmups.WarmupConfig) -> Algorithm:
    """Return the chains as an algorithm: ``init(positions, metric=None)``, a leading axis for the chains.

    Args:
        logdensity_fn: log density of one unconstrained position.
        trajectories: NUTS or HMC.
        config: of the warm-up; ``num_warmup=0`` keeps the first metric and step size.
    """
    return algorithm(_init, _step, as_partial(logdensity_fn), trajectories, config)


def flatten(tree: PyTree) -> Float[Array, "chain d"]:
    """Return one row a chain."""
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def _init(
    logdensity_fn, trajectories: Trajectories, config: warmups.WarmupConfig, positions, metric=None
) -> ChainsState:
    states = over(lambda position: hmc.init(position, logdensity_fn), trajectories.mode, positions)
    num_chains, dimension = flatten(states.position).shape
    if metric is None:
        metric = identity(dimension, config.rank, states.logdensity.dtype)
    return ChainsState(states, warmups.init(config, num_chains, metric), jnp.zeros((), jnp.int32))


def _step(
    logdensity_fn,
    trajectories: Trajectories,
    config: warmups.WarmupConfig,
    key: PRNGKey,
    state: ChainsState,
) -> tuple[ChainsState, ChainsInfo]:
    warmup = state.warmup
    kernel = _nuts_kernel if trajectories.kind == "nuts" else _hmc_kernel

    def transition(key, chain):
        return kernel(key, chain, logdensity_fn, trajectories, warmup)

    keys = jax.random.split(key, state.chains.logdensity.shape[0])
    moved, info = over(transition, trajectories.mode, keys, state.chains)
    warmup = warmups.update(
        config,
        warmup,
        flatten(moved.position),
        flatten(moved.logdensity_grad),
        moved.logdensity,
        info.acceptance_rate,
        jnp.sum(info.num_leapfrogs, dtype=jnp.int32),
    )
    moved = jax.tree.map(lambda leaf: leaf[warmup.rows], moved)  # a hopeless chain goes on from another one
    return ChainsState(moved, warmup, state.remaining - (state.remaining > 0)), info


def _nuts_kernel(key, chain, logdensity_fn, trajectories: Trajectories, warmup: warmups.Warmup):
    kernel = nuts.build_kernel()
    metric = euclidean(warmup.choice.metric)
    moved, info = kernel(key, chain, logdensity_fn, warmup.step_size, metric, trajectories.max_tree_depth)
    return _like(moved, chain), _info(info, info.num_trajectory_expansions, chain)


def _hmc_kernel(key, chain, logdensity_fn, trajectories: Trajectories, warmup: warmups.Warmup):
    """A quarter period of the widest direction left by the metric, jittered by a half to avoid resonance."""
    key_length, key_move = jax.random.split(key)
    quarter = 0.5 * jnp.pi * jnp.sqrt(warmup.choice.stretch)
    length = quarter * jax.random.uniform(key_length, (), quarter.dtype, 0.5, 1.5)
    num_steps = jnp.clip(jnp.ceil(length / warmup.step_size), 1, _MAX_LEAPFROGS).astype(jnp.int32)
    kernel = hmc.build_kernel()
    metric = euclidean(warmup.choice.metric)
    moved, info = kernel(key_move, chain, logdensity_fn, warmup.step_size, metric, num_steps)
    return _like(moved, chain), _info(info, jnp.zeros((), jnp.int32), chain)


def _info(info, tree_depth: Array, chain: hmc.HMCState) -> ChainsInfo:
    dtype = chain.logdensity.dtype
    return ChainsInfo(
        jnp.asarray(info.is_divergent),
        jnp.asarray(info.acceptance_rate).astype(dtype),
        jnp.asarray(info.num_integration_steps, jnp.int32),
        jnp.asarray(info.energy).astype(dtype),
        jnp.asarray(tree_depth, jnp.int32),
    )


def _like(moved: hmc.HMCState, chain: hmc.HMCState) -> hmc.HMCState:
    return jax.tree.map(lambda new, old: jnp.asarray(new).astype(old.dtype), moved, chain)
