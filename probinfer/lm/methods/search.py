r"""Steps with several candidates: nested sampling chooses one in proportion to its weight, searches choose the best.

Each of K texts is continued M times; of the M candidates of each text, or of all K M, some survive. All three methods
are the same expansion with another choice:

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
from probinfer.lm.generation.token_model import Particles, TokenModel, extend_particles, fork_particles
from probinfer.lm.methods.base import (
    WeightedTexts,
    as_step_rule,
    check_count,
    default_step_rule,
    log_scores,
    one_hot,
    run_particles,
    texts_from_trace,
)
from probinfer.lm.methods.filters import check_trigger, resampler_for
from probinfer.numerics import weights

__all__ = ["DVTS", "BeamSearch", "NestedSMC"]


@pytree
class Expansion:
    """How many candidates there are, and which of them survive.

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
    """Continue every text ``width`` times and choose as many candidates as there were texts.

    Args:
        expansion: how many candidates, and how to choose.
        model: the token model.
        key: random key.
        particles: K particles.
        forced: must be None: a reference has no candidates.
    """
    if forced is not None:
        raise ValueError("steps with several candidates have no conditional form: use the particle filter")
    num, width = particles.log_prior.shape[0], expansion.width
    key_step, key_choose = jax.random.split(key)
    parents = jnp.repeat(jnp.arange(num, dtype=jnp.int32), width)
    ended = particles.text.ended != End.RUNNING

    # Propagate and weigh all candidates.
    parents_repeated = fork_particles(model, particles, parents)
    candidates, log_weights = extend_particles(model, key_step, parents_repeated, None)

    # Choose.
    shape = (num, width)
    scores = _candidate_scores(model, candidates, log_weights).reshape(shape)
    chosen, log_weights = expansion.choose(key_choose, log_weights.reshape(shape), scores, ended)
    return fork_particles(model, candidates, chosen), log_weights


def _candidate_scores(model: TokenModel, particles: Particles, log_weights: Array) -> Array:
    """Return log scores of the candidates; minus infinity for one that is dead."""
    alive = log_weights > -jnp.inf
    return jnp.where(alive, log_scores(model, particles), -jnp.inf)


def choose_nested(key: Array, log_weights: Array, scores: Array, ended: Array) -> tuple[Array, Array]:
    """Choose one candidate of each text in proportion to its weight; the new weight is the mean of the M weights."""
    num, width = log_weights.shape
    # Where all candidates are dead any one will do: its new weight is zero.
    any_alive = jnp.max(log_weights, axis=1, keepdims=True) > -jnp.inf
    chosen = jax.random.categorical(key, jnp.where(any_alive, log_weights, 0.0), axis=1)
    log_means = jax.vmap(weights.log_mean_exp)(log_weights)
    return (jnp.arange(num) * width + chosen).astype(jnp.int32), log_means


def choose_best_of_each(key: Array, log_weights: Array, scores: Array, ended: Array) -> tuple[Array, Array]:
    """Choose the best candidate of each tree; weight one, or zero if all its candidates are dead."""
    num, width = scores.shape
    chosen = (jnp.arange(num) * width + jnp.argmax(scores, axis=1)).astype(jnp.int32)
    alive = ended | (scores.reshape(-1)[chosen] > -jnp.inf)
    return chosen, jnp.where(alive, 0.0, -jnp.inf).astype(scores.dtype)


def choose_best(key: Array, log_weights: Array, scores: Array, ended: Array) -> tuple[Array, Array]:
    """Choose the K best of all candidates; a text that has ended always survives, as one candidate."""
    num = scores.shape[0]
    is_first = jnp.arange(scores.shape[1]) == 0
    ranks = jnp.where(ended[:, None], jnp.where(is_first, jnp.inf, -jnp.inf), scores)
    values, chosen = jax.lax.top_k(ranks.reshape(-1), num)
    return chosen.astype(jnp.int32), jnp.where(values > -jnp.inf, 0.0, -jnp.inf).astype(scores.dtype)


class _ExpandingMethod:
    """Fields and checks of the three methods."""

    step: Any
    width: int

    def _check(self, name: str) -> None:
        check_count(self, name)
        check_count(self, "width")
        object.__setattr__(self, "step", as_step_rule(self.step))


@pytree
class NestedSMC(_ExpandingMethod):
    """A particle filter whose steps are chosen among several candidates: N texts, M candidates each.

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
    step: Any = field(static=True, default_factory=default_step_rule)
    resampling: Any = field(static=True, default="systematic")

    def __post_init__(self):
        self._check("num_particles")
        check_trigger(self.trigger, self.resampling)

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> WeightedTexts:
        """Run one pass of the filter."""
        resampler = resampler_for(self.trigger, self.resampling, model.num_steps)
        extend = Partial(expand, Expansion(choose_nested, self.width))
        trace = run_particles(key, model, resampler, self.num_particles, watch, extend)
        return texts_from_trace(model, trace)

    description = "weighted draws from {target}"

    @property
    def num_rows(self) -> int:
        """N M candidates, and the N texts that they continue."""
        return self.num_particles * (self.width + 1)


@pytree
class _ScoreSearch(_ExpandingMethod):
    """Fields and pass of the two searches: at most n candidates a step, ``width`` of each text."""

    n: int = field(static=True)
    width: int = field(static=True, default=4)
    step: Any = field(static=True, default_factory=default_step_rule)
    weighted: bool = field(static=True, default=False)

    def __post_init__(self):
        self._check("n")

    @property
    def _num_survivors(self) -> int:
        """Number of texts that survive a step: one if there are fewer than ``width`` candidates in all."""
        return max(self.n // self.width, 1)

    def _search(self, key: Array, model: TokenModel, watch: Any, choose: Any) -> WeightedTexts:
        """Run one pass without resampling; the final weights are the scores, or all on the best text."""
        extend = Partial(expand, Expansion(choose, min(self.n, self.width)))
        resampler = resampler_for("never", "systematic", model.num_steps)
        trace = run_particles(key, model, resampler, self._num_survivors, watch, extend)
        draws = texts_from_trace(model, trace)
        scores = jnp.where(draws.log_weights > -jnp.inf, draws.log_score, -jnp.inf)
        no_evidence = jnp.full_like(draws.log_evidence, jnp.nan)
        log_weights = scores if self.weighted else one_hot(scores)
        return draws._replace(log_weights=log_weights, log_score=scores, log_evidence=no_evidence)

    def _describe(self, search: str) -> str:
        if self.weighted:
            return f"the texts that {search} found, each voting with its score: a choice, not a sample"
        return f"the best text that {search} found by its score: a choice, not a sample"

    has_evidence = False

    @property
    def num_rows(self) -> int:
        """The candidates, and the texts that they continue."""
        return self.n + self._num_survivors


@pytree
class BeamSearch(_ScoreSearch):
    """n candidates a step, of which the n / width with the highest scores survive; the best one at the end.

    Attributes:
        n: candidates a step; n / width is rounded down, but at least 1; static.
        width: candidates of each beam; static.
        step: as for ``ParticleFilter``; static.
        weighted: at the end every beam votes with its score; static.

    References:
        Snell et al. (2024); Beeching, Tunstall and Rush (2024).
    """

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> WeightedTexts:
        """Search; no ancestors are returned, since the choice among all candidates is not recorded as resampling."""
        draws = self._search(key, model, watch, choose_best)
        return draws._replace(ancestors=None, step_lengths=None)

    @property
    def description(self) -> str:
        """What the weighted texts are."""
        return self._describe("a beam search")


@pytree
class DVTS(_ScoreSearch):
    """n / width independent trees, in each of which the best of ``width`` candidates survives; the best at the end.

    Attributes:
        n: candidates a step; n / width is rounded down, but at least 1; static.
        width: candidates of each tree; static.
        step: as for ``ParticleFilter``; static.
        weighted: at the end every tree votes with its score, which is safer where a reward can be hacked; static.

    References:
        Beeching, Tunstall and Rush (2024), diverse verifier tree search.
    """

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> WeightedTexts:
        """Search the trees."""
        return self._search(key, model, watch, choose_best_of_each)

    @property
    def description(self) -> str:
        """What the weighted texts are."""
        return self._describe("a search of diverse trees")
