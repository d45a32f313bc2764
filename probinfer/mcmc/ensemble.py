"""A set of chains that move together: one step of the algorithm is one transition of every chain.

The chains share step size and metric. Warm-up and sampling are the same algorithm: during the warm-up each step also
updates its state, afterwards that state does not change. On a CPU the chains of a step run one after another, since
vectorized trajectories all cost as much as the longest; on an accelerator they are vectorized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blackjax.mcmc import hmc, nuts

from probinfer.core.algorithms import Algorithm, algorithm, as_partial
from probinfer.core.trees import map_or_vmap
from probinfer.core.types import Array, Bool, Float, Int, PRNGKey, PyTree, field, pytree
from probinfer.mcmc.adaptation import warmup as warmups
from probinfer.mcmc.adaptation.metric import euclidean, identity

__all__ = ["ChainsInfo", "ChainsState", "Trajectories", "chains", "flatten"]

_MAX_LEAPFROGS = 1000


@pytree
class Trajectories:
    """How a trajectory ends: in NUTS when it turns back, in HMC after a jittered length.

    Attributes:
        kind: ``"nuts"`` or ``"hmc"``.
        max_tree_depth: maximum number of doublings (NUTS).
        mode: ``"map"``, ``"vmap"`` or ``"auto"`` over the chains.
    """

    kind: str = field(static=True)
    max_tree_depth: int = field(static=True, default=10)
    mode: str = field(static=True, default="auto")


class ChainsState(NamedTuple):
    """The chains and their warm-up.

    Attributes:
        chains: position, log density and gradient, with a leading axis for the chains.
        warmup: state of the warm-up.
        remaining: number of draws still to be made after the warm-up.
    """

    chains: hmc.HMCState
    warmup: warmups.Warmup
    remaining: Int[Array, ""]


class ChainsInfo(NamedTuple):
    """One transition of every chain.

    Attributes:
        diverging: whether the energy error exceeded 1000 nats.
        acceptance_rate: mean over the trajectory (NUTS), or of its end (HMC).
        num_leapfrogs: gradient evaluations.
        energy: Hamiltonian at the draw, nats.
        tree_depth: doublings; zero for HMC.
    """

    diverging: Bool[Array, " chain"]
    acceptance_rate: Float[Array, " chain"]
    num_leapfrogs: Int[Array, " chain"]
    energy: Float[Array, " chain"]
    tree_depth: Int[Array, " chain"]


def chains(logdensity_fn: Callable, trajectories: Trajectories, config: warmups.WarmupConfig) -> Algorithm:
    """Return the chains as an algorithm: ``init(positions, metric=None)``, with a leading axis for the chains.

    Args:
        logdensity_fn: log density of one unconstrained position.
        trajectories: NUTS or HMC.
        config: of the warm-up; with ``num_warmup=0`` the first metric and step size are used throughout.
    """
    return algorithm(_init, _step, as_partial(logdensity_fn), trajectories, config)


def flatten(tree: PyTree) -> Float[Array, "chain d"]:
    """Flatten the positions of the chains to one row per chain."""
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def _init(
    logdensity_fn, trajectories: Trajectories, config: warmups.WarmupConfig, positions, metric=None
) -> ChainsState:
    states = map_or_vmap(lambda position: hmc.init(position, logdensity_fn), trajectories.mode, positions)
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
    transition = _nuts_transition if trajectories.kind == "nuts" else _hmc_transition

    def move(key, chain):
        return transition(key, chain, logdensity_fn, trajectories, warmup)

    # Propagate
    keys = jax.random.split(key, state.chains.logdensity.shape[0])
    states, info = map_or_vmap(move, trajectories.mode, keys, state.chains)
    # Adapt
    warmup = warmups.update(
        config,
        warmup,
        flatten(states.position),
        flatten(states.logdensity_grad),
        states.logdensity,
        info.acceptance_rate,
        jnp.sum(info.num_leapfrogs, dtype=jnp.int32),
    )
    # Restart lost chains
    states = jax.tree.map(lambda leaf: leaf[warmup.sources], states)
    return ChainsState(states, warmup, state.remaining - (state.remaining > 0)), info


def _nuts_transition(key, chain, logdensity_fn, trajectories: Trajectories, warmup: warmups.Warmup):
    kernel = nuts.build_kernel()
    metric = euclidean(warmup.choice.metric)
    new, info = kernel(key, chain, logdensity_fn, warmup.step_size, metric, trajectories.max_tree_depth)
    return _in_dtypes_of(chain, new), _info(info, info.num_trajectory_expansions, chain)


def _hmc_transition(key, chain, logdensity_fn, trajectories: Trajectories, warmup: warmups.Warmup):
    """Integrate for a quarter period of the widest direction left by the metric, jittered to avoid resonance."""
    key_length, key_move = jax.random.split(key)
    quarter = 0.5 * jnp.pi * jnp.sqrt(warmup.choice.stretch)
    length = quarter * jax.random.uniform(key_length, (), quarter.dtype, 0.5, 1.5)
    num_steps = jnp.clip(jnp.ceil(length / warmup.step_size), 1, _MAX_LEAPFROGS).astype(jnp.int32)
    kernel = hmc.build_kernel()
    metric = euclidean(warmup.choice.metric)
    new, info = kernel(key_move, chain, logdensity_fn, warmup.step_size, metric, num_steps)
    return _in_dtypes_of(chain, new), _info(info, jnp.zeros((), jnp.int32), chain)


def _info(info, tree_depth: Array, chain: hmc.HMCState) -> ChainsInfo:
    dtype = chain.logdensity.dtype
    return ChainsInfo(
        diverging=jnp.asarray(info.is_divergent),
        acceptance_rate=jnp.asarray(info.acceptance_rate).astype(dtype),
        num_leapfrogs=jnp.asarray(info.num_integration_steps, jnp.int32),
        energy=jnp.asarray(info.energy).astype(dtype),
        tree_depth=jnp.asarray(tree_depth, jnp.int32),
    )


def _in_dtypes_of(chain: hmc.HMCState, new: hmc.HMCState) -> hmc.HMCState:
    return jax.tree.map(lambda leaf, old: jnp.asarray(leaf).astype(old.dtype), new, chain)
