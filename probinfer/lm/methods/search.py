r"""Steps with several candidates: nested sampling keeps one in proportion to its weight, searches keep the best.

Each of K texts is continued M times; of the M candidates of a text, or of all K M, some are kept. All three methods are
the same expansion with another choice:

- nested: one of each M, :math:`P(m) \propto G_m`, weight :math:`\frac1M\sum_m G_m`: unbiased, like a filter with
  the proposal that looks one step ahead;
- diverse trees (DVTS): the best of each M;
- beam search: the best K of all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from probinfer.core.types import Array, PRNGKey, field, pytree
from probinfer.lm.generation.texts import End
from probinfer.lm.generation.token_model import Particles, TokenModel, fork, step
from probinfer.lm.methods.base import (
    Draws,
    check_count,
    check_step,
    default_step,
    from_filter_trace,
    log_scores,
    one_hot,
    one_pass,
)
from probinfer.lm.methods.filters import check_trigger, scheme_of
from probinfer.numerics import weights

__all__ = ["DVTS", "BeamSearch", "NestedSMC"]


@pytree
class Expansion:
    """How many candidates, and which of them go on.

    Attributes:
        choose: ``(key, log_weights (K, M), scores (K, M), ended (K,)) -> (indices (K,) of K M, log_weights (K,))``;
            static.
        width: M; static.
    """

    choose: Any = field(static=True)
    width: int = field(static=True)


def expand(
    expansion: Expansion, model: TokenModel, key: Array, particles: Particles, forced: Any
) -> tuple[Particles, Array]:
    """Continue every text ``width`` times and keep as many as there were.

    Args:
        expansion: how.
        model: the token model.
        key: random key.
        particles: K.
        forced: must be None: a reference has no candidates.
    """
    if forced is not None:
        raise ValueError("steps with several candidates have no conditional form: use the particle filter")
    num, width = particles.log_prior.shape[0], expansion.width
    key_step, key_choose = jax.random.split(key)
    parents = jnp.repeat(jnp.arange(num, dtype=jnp.int32), width)
    ended = particles.text.ended != End.RUNNING
    moved, log_weights = step(model, key_step, fork(model, particles, parents), None)
    shape = (num, width)
    ranks = _ranks(model, moved, log_weights).reshape(shape)
    chosen, kept = expansion.choose(key_choose, log_weights.reshape(shape), ranks, ended)
    after = fork(model, moved, chosen)
    return after, kept


def _ranks(model: TokenModel, particles: Particles, log_weights: Array) -> Array:
    """Scores of the candidates; one that is dead or not a number is the last."""
    usable = log_weights > -jnp.inf
    return jnp.where(usable, log_scores(model, particles), -jnp.inf)


def choose_nested(key: Array, log_weights: Array, scores: Array, ended: Array) -> tuple[Array, Array]:
    """One of each in proportion to its weight; the weight is their mean."""
    num, width = log_weights.shape
    some = jnp.max(log_weights, axis=1, keepdims=True) > -jnp.inf
    chosen = jax.random.categorical(key, jnp.where(some, log_weights, 0.0), axis=1)
    kept = jax.vmap(weights.log_mean_exp)(log_weights)
    return (jnp.arange(num) * width + chosen).astype(jnp.int32), kept


def choose_best_of_each(key: Array, log_weights: Array, scores: Array, ended: Array) -> tuple[Array, Array]:
    """The best of each tree."""
    num, width = scores.shape
    chosen = (jnp.arange(num) * width + jnp.argmax(scores, axis=1)).astype(jnp.int32)
    return chosen, _alive(scores.reshape(-1)[chosen], ended)


def choose_best(key: Array, log_weights: Array, scores: Array, ended: Array) -> tuple[Array, Array]:
    """The best of all; texts that have ended are set aside and keep their places."""
    num = scores.shape[0]
    first = jnp.arange(scores.shape[1]) == 0
    ranks = jnp.where(ended[:, None], jnp.where(first, jnp.inf, -jnp.inf), scores)
    values, chosen = jax.lax.top_k(ranks.reshape(-1), num)
    return chosen.astype(jnp.int32), jnp.where(values > -jnp.inf, 0.0, -jnp.inf).astype(scores.dtype)


def _alive(scores: Array, ended: Array) -> Array:
    return jnp.where(ended | (scores > -jnp.inf), 0.0, -jnp.inf).astype(scores.dtype)


class _Expanding:
    """Fields and checks of the three methods."""

    step: Any
    width: int

    def _check(self, name: str) -> None:
        check_count(self, name)
        check_count(self, "width")
        object.__setattr__(self, "step", check_step(self.step))


@pytree
class NestedSMC(_Expanding):
    """A particle filter whose steps are the best guess of several: N texts, M candidates each.

    Attributes:
        num_particles: N; static.
        width: M; static.
        trigger: as for ``ParticleFilter``; static.
        step: as for ``ParticleFilter``; static.
        resampling: as for ``ParticleFilter``; static.

    References:
        Naesseth, Lindsten and Schön (2015).
    """

    num_particles: int = field(static=True)
    width: int = field(static=True, default=4)
    trigger: str = field(static=True, default="ess")
    step: Any = field(static=True, default_factory=default_step)
    resampling: Any = field(static=True, default="systematic")

    def __post_init__(self):
        self._check("num_particles")
        check_trigger(self.trigger, self.resampling)

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> Draws:
        """One pass."""
        adaptive = scheme_of(self.trigger, self.resampling, model.num_steps)
        extend = Partial(expand, Expansion(choose_nested, self.width))
        return from_filter_trace(model, one_pass(key, model, adaptive, self.num_particles, watch, extend))

    words = "weighted draws from {target}"

    @property
    def num_rows(self) -> int:
        """N M, and N."""
        return self.num_particles * (self.width + 1)


@pytree
class _Search(_Expanding):
    """Fields and the pass of the two searches: at most n candidates a step, ``width`` of each text."""

    n: int = field(static=True)
    width: int = field(static=True, default=4)
    step: Any = field(static=True, default_factory=default_step)
    weighted: bool = field(static=True, default=False)

    def __post_init__(self):
        self._check("n")

    @property
    def _num_kept(self) -> int:
        """How many texts go on: one where there are fewer than ``width`` candidates in all."""
        return max(self.n // self.width, 1)

    def _searched(self, key: Array, model: TokenModel, watch: Any, choose: Any) -> Draws:
        extend = Partial(expand, Expansion(choose, min(self.n, self.width)))
        adaptive = scheme_of("never", "systematic", model.num_steps)
        draws = from_filter_trace(model, one_pass(key, model, adaptive, self._num_kept, watch, extend))
        scores = jnp.where(draws.log_weights > -jnp.inf, draws.log_score, -jnp.inf)
        nothing = jnp.full_like(draws.log_evidence, jnp.nan)
        log_weights = scores if self.weighted else one_hot(scores)
        return draws._replace(log_weights=log_weights, log_score=scores, log_evidence=nothing)

    def _words(self, search: str) -> str:
        if self.weighted:
            return f"the texts that {search} found, each voting with its score: a choice, not a sample"
        return f"the best text that {search} found by its score: a choice, not a sample"

    has_evidence = False

    @property
    def num_rows(self) -> int:
        """Candidates, and the texts that go on."""
        return self.n + self._num_kept


@pytree
class BeamSearch(_Search):
    """n candidates a step, of which the n / width best by their score go on; the best one at the end.

    Attributes:
        n: candidates a step; n / width is rounded down, but at least 1; static.
        width: candidates of each beam; static.
        step: as for ``ParticleFilter``; static.
        weighted: at the end every beam votes with its score; static.

    References:
        Snell et al. (2024); Beeching, Tunstall and Rush (2024).
    """

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> Draws:
        """Search; the beams choose among all candidates, so their parents are not those of a filter."""
        draws = self._searched(key, model, watch, choose_best)
        return draws._replace(ancestors=None, step_lengths=None)

    @property
    def words(self) -> str:
        """In words."""
        return self._words("a beam search")


@pytree
class DVTS(_Search):
    """n / width independent trees, in each the best of ``width`` candidates goes on; the best one at the end.

    Attributes:
        n: candidates a step; n / width is rounded down, but at least 1; static.
        width: candidates of each tree; static.
        step: as for ``ParticleFilter``; static.
        weighted: at the end every tree votes with its score, which is safer where a reward can be hacked; static.

    References:
        Beeching, Tunstall and Rush (2024), diverse verifier tree search.
    """

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> Draws:
        """Search."""
        return self._searched(key, model, watch, choose_best_of_each)

    @property
    def words(self) -> str:
        """In words."""
        return self._words("a search of diverse trees")
