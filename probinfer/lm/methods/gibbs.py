r"""Particle Gibbs over texts, and several chains of it that exchange their references.

A pass keeps one text, the reference, and draws the others around it; the next reference is drawn by the final weights.
Ancestor sampling asks at every step which particle the rest of the reference continues: its tokens are read in blocks
into the cache of every particle, and the potentials are computed again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from probinfer.core.status import Status
from probinfer.core.types import Array, PRNGKey, field, pytree, strong_array
from probinfer.lm.generation.texts import Record
from probinfer.lm.generation.token_model import Ledger, TokenModel, feynman_kac, init_particles, log_target
from probinfer.lm.methods.base import (
    WeightedTexts,
    as_step_rule,
    check_count,
    default_step_rule,
    texts_from_trace,
)
from probinfer.lm.methods.filters import check_trigger, resampler_for
from probinfer.lm.rewards.algebra import temper
from probinfer.smc.conditional.gibbs import choose_path, gibbs_step
from probinfer.smc.filtering.forward_pass import forward

__all__ = ["ParallelTempering", "ParticleGibbs"]


@pytree
class ParticleGibbs:
    """A chain of passes, each around a text that the pass before chose; all particles of all passes are draws.

    The first reference comes from a particle filter. The texts of an iteration have the weights of its pass, and every
    iteration has the same total weight.

    Attributes:
        num_particles: N of a pass, the reference included, at least 2; static.
        num_iterations: number of passes after the first; static.
        ancestor_sampling: read the reference after every particle, so that its early steps change too; static.
        burn_in: number of iterations to leave out at the start; static.
        trigger: as for ``ParticleFilter``; static.
        step: as for ``ParticleFilter``; static.
        resampling: name of a resampling scheme with a conditional form; static.

    References:
        Andrieu, Doucet and Holenstein (2010); Lindsten, Jordan and Schön (2014).
    """

    num_particles: int = field(static=True)
    num_iterations: int = field(static=True)
    ancestor_sampling: bool = field(static=True, default=True)
    burn_in: int = field(static=True, default=0)
    trigger: str = field(static=True, default="ess")
    step: Any = field(static=True, default_factory=default_step_rule)
    resampling: Any = field(static=True, default="systematic")

    def __post_init__(self):
        _check_chain(self)

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> WeightedTexts:
        """Run the chain."""
        key_start, key_chain = jax.random.split(key)
        initial_pass = _initial_pass if watch is None else _compiled(_initial_pass)
        first, path = initial_pass(self, key_start, model)
        keys = jax.random.split(key_chain, self.num_iterations)
        _, draws = _run_chain(_iterate, watch, self, model, path, keys)
        return _pool(first, draws, self.burn_in)

    description = "draws from {target} by a Markov chain that leaves it invariant"

    @property
    def num_rows(self) -> int:
        """N."""
        return self.num_particles


@pytree
class ParallelTempering:
    r"""Chains of particle Gibbs for :math:`p(x) G(x)^{\beta_k}` that exchange references; the first one has beta = 1.

    Neighbors exchange with probability :math:`\min(1, (G(x_{k+1})/G(x_k))^{\beta_k - \beta_{k+1}})`.

    Attributes:
        num_particles: N of each pass; static.
        num_iterations: number of passes of each chain after the first; static.
        powers: the powers beta_k, decreasing from 1; static.
        ancestor_sampling: as for ``ParticleGibbs``; static.
        burn_in: as for ``ParticleGibbs``; static.
        trigger: as for ``ParticleFilter``; static.
        step: as for ``ParticleFilter``; static.
        resampling: as for ``ParticleGibbs``; static.

    References:
        Geyer (1991); Puri et al. (2025), algorithm 3, with a corrected acceptance ratio.
    """

    num_particles: int = field(static=True)
    num_iterations: int = field(static=True)
    powers: tuple[float, ...] = field(static=True, default=(1.0, 0.5, 0.25))
    ancestor_sampling: bool = field(static=True, default=True)
    burn_in: int = field(static=True, default=0)
    trigger: str = field(static=True, default="ess")
    step: Any = field(static=True, default_factory=default_step_rule)
    resampling: Any = field(static=True, default="systematic")

    def __post_init__(self):
        _check_chain(self)
        powers = tuple(float(power) for power in self.powers)
        decreasing = all(a > b for a, b in pairwise(powers))
        if len(powers) < 2 or powers[0] != 1 or not decreasing or powers[-1] < 0:
            raise ValueError(
                f"powers must be two or more numbers that decrease from 1 and are not negative; got {self.powers}"
            )
        object.__setattr__(self, "powers", powers)

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> WeightedTexts:
        """Run the chains; the draws are those of the first."""
        key_start, key_chain = jax.random.split(key)
        powers = strong_array(list(self.powers)).astype(model.logits.dtype)
        start_keys = jax.random.split(key_start, len(self.powers))
        initial_passes = jax.vmap(lambda power, key: _initial_pass(self, key, _temper_model(model, power)))
        firsts, paths = initial_passes(powers, start_keys)
        keys = jax.random.split(key_chain, self.num_iterations)
        _, draws = _run_chain(_iterate_all, watch, self, model, paths, keys)
        first = jax.tree.map(lambda leaf: leaf[0], firsts)
        untempered = jax.tree.map(lambda leaf: leaf[:, 0], draws)
        ledger = jax.tree.map(lambda a, b: jnp.sum(a) + jnp.sum(b), firsts.ledger, draws.ledger)
        return _pool(first, untempered, self.burn_in)._replace(ledger=ledger)

    description = "draws from {target} by a Markov chain that leaves it invariant, helped by tempered ones"

    @property
    def num_rows(self) -> int:
        """N of all chains."""
        return self.num_particles * len(self.powers)


def _check_chain(method: Any) -> None:
    check_count(method, "num_particles", 2)
    check_count(method, "num_iterations")
    check_count(method, "burn_in", 0)
    if method.burn_in >= method.num_iterations:
        raise ValueError(f"burn_in must leave iterations, got {method.burn_in} of {method.num_iterations}")
    check_trigger(method.trigger, method.resampling)
    resampler_for(method.trigger, method.resampling, 1).conditional()
    object.__setattr__(method, "step", as_step_rule(method.step))


def _initial_pass(method: Any, key: Array, model: TokenModel) -> tuple[WeightedTexts, Record]:
    """Run a particle filter and draw one of its paths."""
    key_filter, key_draw = jax.random.split(key)
    resampler = resampler_for(method.trigger, method.resampling, model.num_steps)
    fk, num = feynman_kac(model), method.num_particles
    trace = forward(key_filter, fk, resampler, None, model.num_steps, num, "paths")
    return texts_from_trace(model, trace), choose_path(key_draw, trace)


def _conditional_pass(method: Any, key: Array, model: TokenModel, path: Record) -> tuple[Record, Any]:
    conditional = resampler_for(method.trigger, method.resampling, model.num_steps).conditional()
    path_update = "ancestor" if method.ancestor_sampling else "genealogy"
    return gibbs_step(key, feynman_kac(model), conditional, path, method.num_particles, path_update)


def _pool(first: WeightedTexts, draws: WeightedTexts, burn_in: int) -> WeightedTexts:
    """Pool the particles of the iterations after burn-in, each iteration with the same total weight."""
    retained = jax.tree.map(lambda leaf: leaf[burn_in:], draws)
    log_weights = jax.vmap(lambda lw: lw - jax.nn.logsumexp(lw))(retained.log_weights)
    flat = {
        name: getattr(retained, name).reshape(-1, *getattr(retained, name).shape[2:])
        for name in ("tokens", "length", "ended", "log_prior", "log_potential", "log_score")
    }
    failed = retained.status != int(Status.OK)
    log_weights = jnp.where(failed[:, None], -jnp.inf, log_weights)
    return WeightedTexts(
        **flat,
        log_weights=log_weights.reshape(-1),
        log_evidence=first.log_evidence,
        ess=draws.ess[-1],
        ancestors=jax.tree.map(lambda leaf: leaf[-1], draws.ancestors),
        step_lengths=jax.tree.map(lambda leaf: leaf[-1], draws.step_lengths),
        status=jnp.maximum(first.status, jnp.max(draws.status)),
        num_steps=draws.num_steps[-1],
        ledger=jax.tree.map(lambda a, b: a + jnp.sum(b), first.ledger, draws.ledger),
    )


def _run_chain(iterate: Any, watch: Any, method: Any, model: TokenModel, path: Record, keys: Array) -> tuple:
    """Run all iterations in one program, or one by one if there is a callback."""
    if watch is None:
        return lax.scan(lambda path, key: iterate(method, model, path, key), path, keys)
    iterations, compiled = [], _compiled(iterate)
    for i, key in enumerate(keys):
        path, draws = compiled(method, model, path, key)
        iterations.append(draws)
        if watch((i, draws)):
            break
    return path, jax.tree.map(lambda *leaves: jnp.stack(leaves), *iterations)


@cache
def _compiled(iterate: Any) -> Any:
    return jax.jit(iterate)


def _iterate(method: Any, model: TokenModel, path: Record, key: Array) -> tuple[Record, WeightedTexts]:
    new_path, trace = _conditional_pass(method, key, model, path)
    draws = texts_from_trace(model, trace)
    if method.ancestor_sampling:
        ledger = _count_ancestor_sampling(draws.ledger, method, model, path, trace.num_steps)
        draws = draws._replace(ledger=ledger)
    return new_path, draws


def _count_ancestor_sampling(
    ledger: Ledger, method: Any, model: TokenModel, path: Record, num_steps: Array
) -> Ledger:
    """Add the cost of ancestor sampling: before each step it reads the rest of the reference after every particle."""
    times = jnp.arange(path.length.shape[0])
    is_read = (times > 0) & (times < num_steps)
    num_reads = jnp.cumsum(is_read)  # how often each step of the reference is read
    tokens = method.num_particles * jnp.sum(num_reads * path.length)
    calls = method.num_particles * model.setup.potential.num_scores * jnp.sum(num_reads * (path.length > 0))
    return ledger._replace(
        rescored=ledger.rescored + tokens.astype(ledger.rescored.dtype),
        scored=ledger.scored + calls.astype(ledger.scored.dtype),
    )


def _iterate_all(
    method: ParallelTempering, model: TokenModel, paths: Record, key: Array
) -> tuple[Record, WeightedTexts]:
    key_pass, key_swap = jax.random.split(key)
    powers = strong_array(list(method.powers)).astype(model.logits.dtype)

    def iterate(power: Array, key: Array, path: Record) -> tuple[Record, WeightedTexts]:
        return _iterate(method, _temper_model(model, power), path, key)

    paths, draws = jax.vmap(iterate)(powers, jax.random.split(key_pass, len(method.powers)), paths)
    return _exchange(key_swap, model, powers, paths), draws


def _temper_model(model: TokenModel, power: Array) -> TokenModel:
    setup = replace(model.setup, potential=temper(model.setup.potential, power))
    return replace(model, setup=setup)


def _exchange(key: Array, model: TokenModel, powers: Array, paths: Record) -> Record:
    """Propose to exchange the paths of each pair of neighbors, beginning with that of the largest power."""
    num = powers.shape[0]
    records = Record(jnp.moveaxis(paths.tokens, 0, 1), paths.length.T)
    log_density, after = log_target(model, init_particles(model, num), records, jnp.int32(0))
    # -inf - (-inf) would be NaN where the prior forbids a path
    log_potential = jnp.where(log_density == -jnp.inf, -jnp.inf, log_density - after.log_prior)

    def swap(k: Array, carry: tuple) -> tuple:
        order, values = carry
        log_acceptance_ratio = (powers[k] - powers[k + 1]) * (values[k + 1] - values[k])
        equal = values[k + 1] == values[k]  # the difference of two infinities is NaN, and the ratio is one
        uniform = jax.random.uniform(jax.random.fold_in(key, k), dtype=log_acceptance_ratio.dtype)
        accept = equal | (jnp.log(uniform) < log_acceptance_ratio)
        exchanged = jnp.arange(num).at[k].set(k + 1).at[k + 1].set(k)
        permutation = jnp.where(accept, exchanged, jnp.arange(num))
        return order[permutation], values[permutation]

    order, _ = lax.fori_loop(0, num - 1, swap, (jnp.arange(num), log_potential))
    return jax.tree.map(lambda leaf: leaf[order], paths)
