"""The particle filter over texts, its entropic form, and methods of independent draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from probinfer import resampling
from probinfer.core.types import Array, PRNGKey, field, pytree
from probinfer.lm.generation.proposals import Proposal
from probinfer.lm.generation.token_model import TokenModel
from probinfer.lm.methods.base import (
    WeightedTexts,
    as_step_rule,
    check_count,
    default_step_rule,
    one_hot,
    run_particles,
    texts_from_trace,
)
from probinfer.numerics import weights

__all__ = [
    "BestOfN",
    "Entropic",
    "Greedy",
    "MajorityVote",
    "ParticleFilter",
    "check_trigger",
    "independent_draws",
    "never",
    "resampler_for",
]

TRIGGERS = ("ess", "entropic", "always", "never")


def never(log_weights: Array, t: Any) -> Array:
    """Never resample."""
    return jnp.asarray(False)


@pytree
class Entropic:
    r"""Resampling that is tempered in early steps, without bias.

    If the effective sample size is below N / 2, ancestors are drawn in proportion to :math:`w^{1/\tau}` with
    :math:`\tau = \max(1, (N / \mathrm{ESS})(1 - t/T))` in the first half of the steps, 1 after that, and keep the
    weight :math:`w^{1 - 1/\tau}`: particles of low early weight survive longer, and the target does not change.

    Attributes:
        scheme: a resampling scheme or its name; static.
        num_steps: T.

    References:
        Giannone et al. (2025), entropic annealing; the carried weights are of Liu and Chen (1998).
    """

    scheme: Any = field(static=True)
    num_steps: Any

    def __call__(self, key: Array, log_weights: Array, num: int, t: Any) -> tuple[Array, Array, Array]:
        """As ``resampling.Adaptive``."""
        ess = weights.ess(log_weights)
        progress = jnp.asarray(t, log_weights.dtype) / self.num_steps
        early = jnp.maximum(1, num / jnp.maximum(ess, 1) * (1 - progress))
        tau = jnp.where(progress < 0.5, early, jnp.ones_like(early))
        tempered = log_weights / tau
        ancestors, log_shares = resampling.get(self.scheme)(key, tempered, num)
        # -inf - (-inf) would be NaN: a dead particle stays dead.
        remainder = jnp.where(log_weights == -jnp.inf, -jnp.inf, log_weights - tempered)[ancestors]
        fires = ess < num / 2
        identity = jnp.arange(num, dtype=jnp.int32)
        ancestors = jnp.where(fires, ancestors, identity)
        return ancestors, jnp.where(fires, log_shares + remainder, log_weights), fires

    def conditional(self) -> Entropic:
        """Return the same with the conditional form of the scheme."""
        return Entropic(resampling.conditional(self.scheme), self.num_steps)


def resampler_for(trigger: str, scheme: Any, num_steps: int) -> Any:
    """Return when and how to resample, for the name of a trigger."""
    if trigger == "entropic":
        return Entropic(scheme, jnp.float32(num_steps))
    fires = {"ess": None, "always": resampling.always(), "never": jax.tree_util.Partial(never)}[trigger]
    return resampling.adaptive(scheme, fires)


def check_trigger(trigger: Any, scheme: Any) -> None:
    """Refuse unknown names of triggers and schemes.

    Raises:
        ValueError: the trigger or the scheme is unknown.
    """
    if trigger not in TRIGGERS:
        raise ValueError(f"trigger must be one of {', '.join(map(repr, TRIGGERS))}, got {trigger!r}")
    resampling.get(scheme)


@pytree
class ParticleFilter:
    """N texts grow step by step; after a step, texts of low weight are replaced by copies of the others.

    Attributes:
        num_particles: N; static.
        trigger: "ess" (resample if the effective sample size is below N / 2), "entropic" (the same, tempered in early
            steps), "always" (the published filter) or "never"; static.
        step: ``lm.until(...)`` or ``lm.every(k)``; static.
        resampling: name of a resampling scheme; static.

    References:
        Puri et al. (2025); Gordon, Salmond and Smith (1993).
    """

    num_particles: int = field(static=True)
    trigger: str = field(static=True, default="ess")
    step: Any = field(static=True, default_factory=default_step_rule)
    resampling: Any = field(static=True, default="systematic")

    def __post_init__(self):
        check_count(self, "num_particles")
        check_trigger(self.trigger, self.resampling)
        object.__setattr__(self, "step", as_step_rule(self.step))

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> WeightedTexts:
        """Run one pass of the filter."""
        resampler = resampler_for(self.trigger, self.resampling, model.num_steps)
        return texts_from_trace(model, run_particles(key, model, resampler, self.num_particles, watch))

    description = "weighted draws from {target}"

    @property
    def num_rows(self) -> int:
        """N."""
        return self.num_particles


def independent_draws(key: Array, model: TokenModel, num: int, watch: Any) -> Any:
    """Draw texts without resampling: importance sampling from the prior."""
    resampler = resampler_for("never", "systematic", model.num_steps)
    return run_particles(key, model, resampler, num, watch)


@pytree
class MajorityVote:
    """n independent texts, one vote each (self-consistency); the reward has no influence on the vote.

    Attributes:
        n: number of texts; static.
        step: as for ``ParticleFilter``; static.

    References:
        Wang et al. (2023).
    """

    n: int = field(static=True)
    step: Any = field(static=True, default_factory=default_step_rule)

    def __post_init__(self):
        check_count(self, "n")
        object.__setattr__(self, "step", as_step_rule(self.step))

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> WeightedTexts:
        """Draw the texts."""
        trace = independent_draws(key, model, self.n, watch)
        return texts_from_trace(model, trace, jnp.zeros_like(trace.log_weights))

    description = "independent draws from {prior}, one vote each{unused}"

    @property
    def num_rows(self) -> int:
        """The number of texts n."""
        return self.n


@pytree
class BestOfN:
    """n independent texts, of which the one with the highest score is chosen; or a vote weighted by the scores.

    Attributes:
        n: number of texts; static.
        weighted: every text votes with its score; static.
        aggregate: "last", the score of the whole text, or "product" of the potentials of all steps; static.
        step: as for ``ParticleFilter``; static.
    """

    n: int = field(static=True)
    weighted: bool = field(static=True, default=False)
    aggregate: str = field(static=True, default="last")
    step: Any = field(static=True, default_factory=default_step_rule)

    def __post_init__(self):
        check_count(self, "n")
        if self.aggregate not in ("last", "product"):
            raise ValueError(f"aggregate must be 'last' or 'product', got {self.aggregate!r}")
        object.__setattr__(self, "step", as_step_rule(self.step))

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> WeightedTexts:
        """Draw the texts, score them and choose."""
        draws = texts_from_trace(model, independent_draws(key, model, self.n, watch))
        scores = draws.log_score
        if self.aggregate == "product":
            scores = jnp.where(jnp.isnan(draws.log_potential), -jnp.inf, draws.log_potential)
        return draws._replace(log_weights=scores if self.weighted else one_hot(scores), log_score=scores)

    @property
    def description(self) -> str:
        """What the weighted texts are."""
        how = "that vote with their scores" if self.weighted else "of which the best by its score is kept"
        return f"independent draws from {{prior}} {how}: a choice, not a sample"

    @property
    def num_rows(self) -> int:
        """The number of texts n."""
        return self.n


@pytree
class Greedy:
    """One text of the likeliest tokens.

    Attributes:
        step: as for ``ParticleFilter``; static.
    """

    step: Any = field(static=True, default_factory=default_step_rule)

    def __post_init__(self):
        object.__setattr__(self, "step", as_step_rule(self.step))

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> WeightedTexts:
        """Follow the likeliest tokens, whatever the proposal is."""
        setup = replace(model.setup, proposal=Proposal(temperature=0.0))
        trace = independent_draws(key, replace(model, setup=setup), 1, watch)
        draws = texts_from_trace(model, trace, jnp.zeros_like(trace.log_weights))
        return draws._replace(log_evidence=jnp.full_like(draws.log_evidence, jnp.nan))

    description = "the text of the likeliest tokens, a choice{unused}"
    has_evidence = False

    @property
    def num_rows(self) -> int:
        """One."""
        return 1
