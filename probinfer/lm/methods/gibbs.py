r"""Particle Gibbs over texts, and several chains of it that exchange their references.

A pass keeps one text, the reference, and draws the others around it; the next reference is chosen by the final weights.
Ancestor sampling asks at every step which particle the rest of the reference continues best: its tokens are read into
the cache of every particle in blocks, and the potentials are asked again.
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
from probinfer.lm.generation.token_model import Ledger, TokenModel, empty, feynman_kac, log_target
from probinfer.lm.methods.base import Draws, check_count, check_step, default_step, from_filter_trace
from probinfer.lm.methods.filters import check_trigger, scheme_of
from probinfer.lm.rewards.algebra import temper
from probinfer.smc.conditional.gibbs import choose_path, gibbs_step
from probinfer.smc.filtering.forward_pass import forward

__all__ = ["ParallelTempering", "ParticleGibbs"]


@pytree
class ParticleGibbs:
    """A chain of passes, each around a text that the one before chose; all particles of all passes are draws.

    The first reference comes from a particle filter. The texts of an iteration carry the weights of its pass, every
    iteration the same share.

    Attributes:
        num_particles: N of a pass, the reference included, at least 2; static.
        num_iterations: passes after the first; static.
        ancestor_sampling: read the reference after every particle, so that its early steps change too; static.
        burn_in: how many of the iterations to leave out; static.
        trigger: as for ``ParticleFilter``; static.
        step: as for ``ParticleFilter``; static.
        resampling: name of a scheme with a conditional form; static.

    References:
        Andrieu, Doucet and Holenstein (2010); Lindsten, Jordan and Schön (2014).
    """

    num_particles: int = field(static=True)
    num_iterations: int = field(static=True)
    ancestor_sampling: bool = field(static=True, default=True)
    burn_in: int = field(static=True, default=0)
    trigger: str = field(static=True, default="ess")
    step: Any = field(static=True, default_factory=default_step)
    resampling: Any = field(static=True, default="systematic")

    def __post_init__(self):
        _check_chain(self)

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> Draws:
        """Run the chain."""
        key_start, key_chain = jax.random.split(key)
        start = _start if watch is None else _compiled(_start)
        first, path = start(self, key_start, model)
        _, draws = _chain(
            _iterate, watch, self, model, path, jax.random.split(key_chain, self.num_iterations)
        )
        return _pooled(first, draws, self.burn_in)

    words = "draws from {target} by a Markov chain that leaves it invariant"

    @property
    def num_rows(self) -> int:
        """N."""
        return self.num_particles


@pytree
class ParallelTempering:
    r"""Chains of particle Gibbs for :math:`p(x) G(x)^{\beta_k}` that exchange references; the first one has beta = 1.

    Neighbours exchange with probability :math:`\min(1, (G(x_{k+1})/G(x_k))^{\beta_k - \beta_{k+1}})`.

    Attributes:
        num_particles: N of each pass; static.
        num_iterations: passes of each chain after the first; static.
        powers: decreasing from 1; static.
        ancestor_sampling: as for ``ParticleGibbs``; static.
        burn_in: as for ``ParticleGibbs``; static.
        trigger: as for ``ParticleFilter``; static.
        step: as for ``ParticleFilter``; static.
        resampling: as for ``ParticleGibbs``; static.

    References:
        Geyer (1991); Puri et al. (2025), algorithm 3, with the ratio put right.
    """

    num_particles: int = field(static=True)
    num_iterations: int = field(static=True)
    powers: tuple[float, ...] = field(static=True, default=(1.0, 0.5, 0.25))
    ancestor_sampling: bool = field(static=True, default=True)
    burn_in: int = field(static=True, default=0)
    trigger: str = field(static=True, default="ess")
    step: Any = field(static=True, default_factory=default_step)
    resampling: Any = field(static=True, default="systematic")

    def __post_init__(self):
        _check_chain(self)
        powers = tuple(float(power) for power in self.powers)
        falling = all(a > b for a, b in pairwise(powers))
        if len(powers) < 2 or powers[0] != 1 or not falling or powers[-1] < 0:
            raise ValueError(f"powers must fall from 1 to at least 0, two or more of them; got {self.powers}")
        object.__setattr__(self, "powers", powers)

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> Draws:
        """Run the chains; the draws are those of the first."""
        key_start, key_chain = jax.random.split(key)
        powers = strong_array(list(self.powers)).astype(model.logits.dtype)
        starts = jax.random.split(key_start, len(self.powers))
        tempered = jax.vmap(lambda power, key: _start(self, key, _tempered(model, power)))
        firsts, paths = tempered(powers, starts)
        keys = jax.random.split(key_chain, self.num_iterations)
        _, draws = _chain(_iterate_all, watch, self, model, paths, keys)
        first = jax.tree.map(lambda leaf: leaf[0], firsts)
        cold = jax.tree.map(lambda leaf: leaf[:, 0], draws)
        costs = [jnp.sum(leaf) for leaf in firsts.ledger]
        costs = [a + jnp.sum(b) for a, b in zip(costs, draws.ledger, strict=True)]
        return _pooled(first, cold, self.burn_in)._replace(ledger=Ledger(*costs))

    words = "draws from {target} by a Markov chain that leaves it invariant, helped by tempered ones"

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
    scheme_of(method.trigger, method.resampling, 1).conditional()
    object.__setattr__(method, "step", check_step(method.step))


def _start(method: Any, key: Array, model: TokenModel) -> tuple[Draws, Record]:
    """A particle filter and one path of it."""
    key_filter, key_draw = jax.random.split(key)
    adaptive = scheme_of(method.trigger, method.resampling, model.num_steps)
    fk, num = feynman_kac(model), method.num_particles
    filter_trace = forward(key_filter, fk, adaptive, None, model.num_steps, num, "paths")
    return from_filter_trace(model, filter_trace), choose_path(key_draw, filter_trace)


def _pass(method: Any, key: Array, model: TokenModel, path: Record) -> tuple[Record, Any]:
    conditional = scheme_of(method.trigger, method.resampling, model.num_steps).conditional()
    path_update = "ancestor" if method.ancestor_sampling else "genealogy"
    return gibbs_step(key, feynman_kac(model), conditional, path, method.num_particles, path_update)


def _pooled(first: Draws, draws: Draws, burn_in: int) -> Draws:
    """All particles of the iterations that count, each iteration with the same total weight."""
    kept = jax.tree.map(lambda leaf: leaf[burn_in:], draws)
    log_weights = jax.vmap(lambda lw: lw - jax.nn.logsumexp(lw))(kept.log_weights)
    flat = {
        name: getattr(kept, name).reshape(-1, *getattr(kept, name).shape[2:])
        for name in ("tokens", "length", "ended", "log_prior", "log_potential", "log_score")
    }
    failed = (draws.status != int(Status.OK))[burn_in:]
    log_weights = jnp.where(failed[:, None], -jnp.inf, log_weights)
    costs = [a + jnp.sum(b) for a, b in zip(first.ledger, draws.ledger, strict=True)]
    return Draws(
        **flat,
        log_weights=log_weights.reshape(-1),
        log_evidence=first.log_evidence,
        ess=draws.ess[-1],
        ancestors=jax.tree.map(lambda leaf: leaf[-1], draws.ancestors),
        step_lengths=jax.tree.map(lambda leaf: leaf[-1], draws.step_lengths),
        status=jnp.maximum(first.status, jnp.max(draws.status)),
        num_steps=draws.num_steps[-1],
        ledger=Ledger(*costs),
    )


def _chain(iterate: Any, watch: Any, method: Any, model: TokenModel, path: Record, keys: Array) -> tuple:
    """All iterations in one program, or one by one where somebody looks on."""
    if watch is None:
        return lax.scan(lambda path, key: iterate(method, model, path, key), path, keys)
    rows, compiled = [], _compiled(iterate)
    for i, key in enumerate(keys):
        path, draws = compiled(method, model, path, key)
        rows.append(draws)
        if watch((i, draws)):
            break
    return path, jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


@cache
def _compiled(iterate: Any) -> Any:
    return jax.jit(iterate)


def _iterate(method: Any, model: TokenModel, path: Record, key: Array) -> tuple[Record, Draws]:
    following, filter_trace = _pass(method, key, model, path)
    draws = from_filter_trace(model, filter_trace)
    if method.ancestor_sampling:
        draws = draws._replace(
            ledger=_with_reading(draws.ledger, method, model, path, filter_trace.num_steps)
        )
    return following, draws


def _with_reading(ledger: Ledger, method: Any, model: TokenModel, path: Record, num_steps: Array) -> Ledger:
    """Ancestor sampling reads, before each step, what is left of the reference after every particle."""
    times = jnp.arange(path.length.shape[0])
    asked = (times > 0) & (times < num_steps)
    readings = jnp.cumsum(asked)  # how often a step of the reference is read
    tokens = method.num_particles * jnp.sum(readings * path.length)
    calls = method.num_particles * model.setting.potential.num_scores * jnp.sum(readings * (path.length > 0))
    return ledger._replace(
        rescored=ledger.rescored + tokens.astype(ledger.rescored.dtype),
        scored=ledger.scored + calls.astype(ledger.scored.dtype),
    )


def _iterate_all(
    method: ParallelTempering, model: TokenModel, paths: Record, key: Array
) -> tuple[Record, Draws]:
    key_pass, key_swap = jax.random.split(key)
    powers = strong_array(list(method.powers)).astype(model.logits.dtype)

    def one(power: Array, key: Array, path: Record) -> tuple[Record, Draws]:
        return _iterate(method, _tempered(model, power), path, key)

    paths, draws = jax.vmap(one)(powers, jax.random.split(key_pass, len(method.powers)), paths)
    return _exchange(key_swap, model, powers, paths), draws


def _tempered(model: TokenModel, power: Array) -> TokenModel:
    setting = replace(model.setting, potential=temper(model.setting.potential, power))
    return replace(model, setting=setting)


def _exchange(key: Array, model: TokenModel, powers: Array, paths: Record) -> Record:
    """Sweep over neighbours from the coldest pair on."""
    num = powers.shape[0]
    records = Record(jnp.moveaxis(paths.tokens, 0, 1), paths.length.T)
    log_density, after = log_target(model, empty(model, num), records, jnp.int32(0))
    log_factor = jnp.where(log_density == -jnp.inf, -jnp.inf, log_density - after.log_prior)

    def swap(k: Array, carry: tuple) -> tuple:
        order, values = carry
        gain = (powers[k] - powers[k + 1]) * (values[k + 1] - values[k])
        same = values[k + 1] == values[k]  # minus infinity against itself
        uniform = jax.random.uniform(jax.random.fold_in(key, k), dtype=gain.dtype)
        accept = same | (jnp.log(uniform) < gain)
        pair = jnp.arange(num).at[k].set(k + 1).at[k + 1].set(k)
        turn = jnp.where(accept, pair, jnp.arange(num))
        return order[turn], values[turn]

    order, _ = lax.fori_loop(0, num - 1, swap, (jnp.arange(num), log_factor))
    return jax.tree.map(lambda leaf: leaf[order], paths)
