"""The particle filter over texts, its entropic form, and independent draws."""

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
    Draws,
    check_count,
    check_step,
    default_step,
    from_filter_trace,
    one_hot,
    one_pass,
)
from probinfer.numerics import weights

__all__ = ["BestOfN", "Entropic", "Greedy", "MajorityVote", "ParticleFilter", "never", "scheme_of"]

TRIGGERS = ("ess", "entropic", "always", "never")


def never(log_weights: Array, t: Any) -> Array:
    """Never resample."""
    return jnp.asarray(False)


@pytree
class Entropic:
    r"""Resampling tempered while it is early, without bias.

    Where the effective sample size is below N / 2, ancestors are drawn in proportion to :math:`w^{1/\tau}` with
    :math:`\tau = \max(1, (N / \mathrm{ESS})(1 - t/T))` in the first half of the steps, 1 after that, and carry
    :math:`w^{1 - 1/\tau}`: particles that look poor early survive longer, and the target stays.

    Attributes:
        scheme: a name or a scheme; static.
        num_steps: T.

    References:
        Giannone et al. (2025), entropic annealing; the carried weights are of Liu and Chen (1998).
    """

    scheme: Any = field(static=True)
    num_steps: Any

    def __call__(self, key: Array, log_weights: Array, num: int, t: Any) -> tuple[Array, Array, Array]:
        """As ``resampling.Adaptive``."""
        ess = weights.ess(log_weights)
        share = jnp.asarray(t, log_weights.dtype) / self.num_steps
        early = jnp.maximum(1, num / jnp.maximum(ess, 1) * (1 - share))
        tau = jnp.where(share < 0.5, early, jnp.ones_like(early))
        tempered = log_weights / tau
        ancestors, shared = resampling.get(self.scheme)(key, tempered, num)
        rest = jnp.where(log_weights == -jnp.inf, -jnp.inf, log_weights - tempered)[ancestors]
        fires = ess < num / 2
        own = jnp.arange(num, dtype=jnp.int32)
        return jnp.where(fires, ancestors, own), jnp.where(fires, shared + rest, log_weights), fires

    def conditional(self) -> Entropic:
        """The same with the conditional form of the scheme."""
        return Entropic(resampling.conditional(self.scheme), self.num_steps)


def scheme_of(trigger: str, scheme: Any, num_steps: int) -> Any:
    """When and how to resample, from its name."""
    if trigger == "entropic":
        return Entropic(scheme, jnp.float32(num_steps))
    fires = {"ess": None, "always": resampling.always(), "never": jax.tree_util.Partial(never)}[trigger]
    return resampling.adaptive(scheme, fires)


def check_trigger(trigger: Any, scheme: Any) -> None:
    """Refuse unknown names.

    Raises:
        ValueError: the trigger or the scheme is unknown.
    """
    if trigger not in TRIGGERS:
        raise ValueError(f"trigger must be one of {', '.join(map(repr, TRIGGERS))}, got {trigger!r}")
    resampling.get(scheme)


@pytree
class ParticleFilter:
    """N texts grow step by step; after a step the ones of little weight are replaced by copies of the others.

    Attributes:
        num_particles: N; static.
        trigger: "ess" (resample where the effective sample size is below N / 2), "entropic" (the same, tempered
            early), "always" (the published filter) or "never"; static.
        step: ``lm.until(...)`` or ``lm.every(k)``; static.
        resampling: name of a scheme; static.

    References:
        Puri et al. (2025); Gordon, Salmond and Smith (1993).
    """

    num_particles: int = field(static=True)
    trigger: str = field(static=True, default="ess")
    step: Any = field(static=True, default_factory=default_step)
    resampling: Any = field(static=True, default="systematic")

    def __post_init__(self):
        check_count(self, "num_particles")
        check_trigger(self.trigger, self.resampling)
        object.__setattr__(self, "step", check_step(self.step))

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> Draws:
        """One pass."""
        adaptive = scheme_of(self.trigger, self.resampling, model.num_steps)
        return from_filter_trace(model, one_pass(key, model, adaptive, self.num_particles, watch))

    words = "weighted draws from {target}"

    @property
    def num_rows(self) -> int:
        """N."""
        return self.num_particles


def independent(key: Array, model: TokenModel, num: int, watch: Any) -> Any:
    """Draw texts without resampling: importance sampling from the prior."""
    adaptive = scheme_of("never", "systematic", model.num_steps)
    return one_pass(key, model, adaptive, num, watch)


@pytree
class MajorityVote:
    """n independent texts, one vote each; the reward is not asked to choose (self-consistency).

    Attributes:
        n: how many; static.
        step: as for ``ParticleFilter``; static.

    References:
        Wang et al. (2023).
    """

    n: int = field(static=True)
    step: Any = field(static=True, default_factory=default_step)

    def __post_init__(self):
        check_count(self, "n")
        object.__setattr__(self, "step", check_step(self.step))

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> Draws:
        """Draw them."""
        filter_trace = independent(key, model, self.n, watch)
        return from_filter_trace(model, filter_trace, jnp.zeros_like(filter_trace.log_weights))

    words = "independent draws from {prior}, one vote each{unused}"

    @property
    def num_rows(self) -> int:
        """N."""
        return self.n


@pytree
class BestOfN:
    """n independent texts, the best by its score; or a vote weighted by the scores.

    Attributes:
        n: how many; static.
        weighted: every text votes with its score; static.
        aggregate: "last", the score of the whole text, or "product" of the factors of all steps; static.
        step: as for ``ParticleFilter``; static.
    """

    n: int = field(static=True)
    weighted: bool = field(static=True, default=False)
    aggregate: str = field(static=True, default="last")
    step: Any = field(static=True, default_factory=default_step)

    def __post_init__(self):
        check_count(self, "n")
        if self.aggregate not in ("last", "product"):
            raise ValueError(f"aggregate must be 'last' or 'product', got {self.aggregate!r}")
        object.__setattr__(self, "step", check_step(self.step))

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> Draws:
        """Draw, score, choose."""
        draws = from_filter_trace(model, independent(key, model, self.n, watch))
        scores = draws.log_score
        if self.aggregate == "product":
            scores = jnp.where(jnp.isnan(draws.log_potential), -jnp.inf, draws.log_potential)
        return draws._replace(log_weights=scores if self.weighted else one_hot(scores), log_score=scores)

    @property
    def words(self) -> str:
        """In words."""
        how = "that vote with their scores" if self.weighted else "of which the best by its score is kept"
        return f"independent draws from {{prior}} {how}: a choice, not a sample"

    @property
    def num_rows(self) -> int:
        """N."""
        return self.n


@pytree
class Greedy:
    """One text of the likeliest tokens.

    Attributes:
        step: as for ``ParticleFilter``; static.
    """

    step: Any = field(static=True, default_factory=default_step)

    def __post_init__(self):
        object.__setattr__(self, "step", check_step(self.step))

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> Draws:
        """Follow the likeliest tokens, whatever the proposal is."""
        setting = replace(model.setting, proposal=Proposal(temperature=0.0))
        filter_trace = independent(key, replace(model, setting=setting), 1, watch)
        draws = from_filter_trace(model, filter_trace, jnp.zeros_like(filter_trace.log_weights))
        return draws._replace(log_evidence=jnp.full_like(draws.log_evidence, jnp.nan))

    words = "the text of the likeliest tokens, a choice{unused}"
    has_evidence = False

    @property
    def num_rows(self) -> int:
        """One."""
        return 1
