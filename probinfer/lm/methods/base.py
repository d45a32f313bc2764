"""What every method returns, and the pass of particles that most methods are."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import shortened
from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.lm.arguments import as_count
from probinfer.lm.generation.step_rules import StepRule, every, until
from probinfer.lm.generation.token_model import Ledger, Particles, TokenModel, feynman_kac
from probinfer.smc.filtering.forward_pass import forward
from probinfer.smc.filtering.single_steps import forward_with_callback
from probinfer.smc.filtering.traces import FilterTrace

__all__ = [
    "Method",
    "WeightedTexts",
    "as_step_rule",
    "check_count",
    "check_method",
    "default_step_rule",
    "has_evidence",
    "log_scores",
    "one_hot",
    "run_particles",
    "texts_from_trace",
]


class WeightedTexts(NamedTuple):
    """M weighted texts.

    Attributes:
        tokens: (M, L) tokens, padded on the right to L = ``max_tokens``.
        length: (M,) number of tokens of each text.
        ended: (M,) an ``End`` for each text.
        log_weights: (M,) log weights, which decide the share of each text in the vote; not normalized.
        log_prior: (M,) log probability of each text under the prior.
        log_potential: (M,) sum of the log potentials of the steps.
        log_score: (M,) log score of the whole text, by which a search ranks.
        log_evidence: () estimate of log Z; NaN if the method estimates none.
        ess: (T,) effective sample size after each step.
        ancestors: (T, N) parents of the particles, or None.
        step_lengths: (T, N) tokens of each step of the particles, or None.
        status: () a ``Status``.
        num_steps: () number of steps that ran.
        ledger: what the run cost.
    """

    tokens: Int[Array, "M L"]
    length: Int[Array, " M"]
    ended: Int[Array, " M"]
    log_weights: Float[Array, " M"]
    log_prior: Float[Array, " M"]
    log_potential: Float[Array, " M"]
    log_score: Float[Array, " M"]
    log_evidence: Float[Array, ""]
    ess: Float[Array, " T"]
    ancestors: Int[Array, "T N"] | None
    step_lengths: Int[Array, "T N"] | None
    status: Int[Array, ""]
    num_steps: Int[Array, ""]
    ledger: Ledger


class Method(Protocol):
    """A frozen configuration; ``run`` is a pure function that jits and vmaps over prompts.

    With ``watch``, a function that is called after every step, ``run`` is called outside jit, and the steps are
    compiled one by one. A method that keeps no estimate of the evidence sets ``has_evidence = False``.
    """

    step: Any

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> WeightedTexts:
        """Sample texts."""
        ...

    @property
    def description(self) -> str:
        """What the weighted texts are draws from.

        ``{target}`` stands for prior times reward, ``{prior}`` for the prior, ``{unused}`` for a note that the reward
        is not used.
        """
        ...

    @property
    def num_rows(self) -> int:
        """Maximum number of texts at work at once: rows of the cache."""
        ...


def has_evidence(method: Any) -> bool:
    """Return whether a method estimates the evidence."""
    return getattr(method, "has_evidence", True)


def run_particles(
    key: PRNGKey, model: TokenModel, resampler: Any, num: int, watch: Any = None, extend: Any = None
) -> FilterTrace:
    """Run N particles from the first step to the last.

    Args:
        key: random key.
        model: the token model.
        resampler: when and how to resample.
        num: N.
        watch: called after every step; None: all steps are one program.
        extend: as for ``feynman_kac``.
    """
    fk = feynman_kac(model, extend)
    if watch is None:
        return forward(key, fk, resampler, None, model.num_steps, num, "paths")
    return forward_with_callback(key, fk, resampler, model.num_steps, num, watch)


def texts_from_trace(
    model: TokenModel, trace: FilterTrace, log_weights: Array | None = None
) -> WeightedTexts:
    """Return the texts of the last particles of a pass.

    Args:
        model: the token model.
        trace: a pass that stored its paths.
        log_weights: (N,) used instead of those of the pass.
    """
    particles: Particles = trace.particles
    text = particles.text
    step_lengths = None
    if trace.records is not None:
        first, later = trace.records
        step_lengths = jnp.concatenate([first.length[None], later.length])
    return WeightedTexts(
        tokens=text.tokens,
        length=text.length,
        ended=text.ended,
        log_weights=trace.log_weights if log_weights is None else log_weights,
        log_prior=particles.log_prior,
        log_potential=particles.log_potential,
        log_score=log_scores(model, particles),
        log_evidence=trace.log_evidence,
        ess=trace.ess,
        ancestors=trace.ancestors,
        step_lengths=step_lengths,
        status=trace.status,
        num_steps=trace.num_steps,
        ledger=particles.ledger,
    )


def log_scores(model: TokenModel, particles: Particles) -> Array:
    """Return log scores of the prefixes (N,); a NaN becomes minus infinity, so that it ranks last."""
    potential = model.setup.potential
    scores = potential.log_score(particles.last_log_potential, particles.log_potential)
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def one_hot(log_scores: Array) -> Array:
    """Return log weights (N,) with all mass on the highest score, the first of equal ones."""
    best = jnp.arange(log_scores.shape[0]) == jnp.argmax(log_scores)
    return jnp.where(best, 0.0, -jnp.inf).astype(log_scores.dtype)


def default_step_rule() -> StepRule:
    """Return the default rule: a step is a paragraph of reasoning."""
    return until("\n\n")


def as_step_rule(step: Any) -> StepRule:
    """Return a step rule; an int k means ``every(k)``, a string ``until(string)``.

    Raises:
        TypeError: it is none of them.
    """
    if isinstance(step, StepRule):
        return step
    if isinstance(step, str):
        return until(step)
    if isinstance(step, (int, np.integer)) and not isinstance(step, bool):
        return every(step)
    raise TypeError(f'step must be lm.until("\\n\\n"), lm.every(k) or the like, got {shortened(step)}')


def check_method(method: Any) -> None:
    """Refuse anything that is not a method.

    Raises:
        TypeError: it is the class of a method, or something else.
    """
    example = "lm.ParticleFilter(num_particles=16)"
    if isinstance(method, type):
        raise TypeError(
            f"expected a method such as {example}, got the class {method.__name__} itself: give its settings, "
            f"lm.{method.__name__}(...)"
        )
    if not hasattr(method, "num_rows"):
        raise TypeError(f"expected a method such as {example}, got {shortened(method)}")


def check_count(method: Any, name: str, minimum: int = 1) -> None:
    """Convert a field of a method to an int.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below the minimum.
    """
    object.__setattr__(method, name, as_count(name, getattr(method, name), minimum))
