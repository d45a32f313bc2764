"""What every method returns, and the pass of particles that most of them are."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import shortened
from probinfer.core.types import Array, PRNGKey
from probinfer.lm.arguments import as_count
from probinfer.lm.generation.steps import Step, every, until
from probinfer.lm.generation.token_model import Ledger, Particles, TokenModel, feynman_kac
from probinfer.smc.filtering.forward_pass import forward
from probinfer.smc.filtering.single_steps import forward_with_callback
from probinfer.smc.filtering.traces import FilterTrace

__all__ = [
    "Draws",
    "Method",
    "check_count",
    "check_method",
    "check_step",
    "default_step",
    "from_filter_trace",
    "has_evidence",
    "log_scores",
    "one_hot",
    "one_pass",
]


class Draws(NamedTuple):
    """M weighted texts.

    Attributes:
        tokens: (M, max_tokens).
        length: (M,).
        ended: (M,) an ``End``.
        log_weights: (M,): their share of the vote.
        log_prior: (M,).
        log_potential: (M,) log factors of the steps.
        log_score: (M,) log score of the whole text, by which a search ranks.
        log_evidence: (), or NaN where the method has none.
        ess: (T,) effective sample size after each step.
        ancestors: (T, N) parents of the particles, or None.
        step_lengths: (T, N) tokens of each step of the particles, or None.
        status: a ``Status``.
        num_steps: () how many steps ran.
        ledger: ``Ledger``.
    """

    tokens: Array
    length: Array
    ended: Array
    log_weights: Array
    log_prior: Array
    log_potential: Array
    log_score: Array
    log_evidence: Array
    ess: Array
    ancestors: Array | None
    step_lengths: Array | None
    status: Array
    num_steps: Array
    ledger: Ledger


class Method(Protocol):
    """A frozen configuration; ``run`` is a pure function that jits and vmaps over prompts.

    With ``watch``, a function of a ``StepSnapshot``, it is run outside jit, and the steps are compiled one by one.
    """

    step: Any

    def run(self, key: PRNGKey, model: TokenModel, watch: Any = None) -> Draws:
        """Sample texts."""
        ...

    @property
    def words(self) -> str:
        """What the weighted texts are draws from, with ``{target}`` for the law and ``{prior}`` without the reward."""
        ...

    @property
    def num_rows(self) -> int:
        """Most texts at work at once: rows of the cache."""
        ...


def has_evidence(method: Any) -> bool:
    """Whether a method estimates the evidence; searches say that they do not."""
    return getattr(method, "has_evidence", True)


def one_pass(
    key: PRNGKey, model: TokenModel, adaptive: Any, num: int, watch: Any = None, extend: Any = None
) -> FilterTrace:
    """N particles from the first step to the last.

    Args:
        key: random key.
        model: the token model.
        adaptive: when and how to resample.
        num: N.
        watch: sees every step; None: all steps are one program.
        extend: as for ``feynman_kac``.
    """
    fk = feynman_kac(model, extend)
    if watch is None:
        return forward(key, fk, adaptive, None, model.num_steps, num, "paths")
    return forward_with_callback(key, fk, adaptive, model.num_steps, num, watch)


def from_filter_trace(
    model: TokenModel, filter_trace: FilterTrace, log_weights: Array | None = None
) -> Draws:
    """The texts of the last particles of a pass.

    Args:
        model: the token model.
        filter_trace: a pass that kept its paths.
        log_weights: instead of those of the pass.
    """
    particles: Particles = filter_trace.particles
    text = particles.text
    lengths = None
    if filter_trace.records is not None:
        first, later = filter_trace.records
        lengths = jnp.concatenate([first.length[None], later.length])
    return Draws(
        text.tokens,
        text.length,
        text.ended,
        filter_trace.log_weights if log_weights is None else log_weights,
        particles.log_prior,
        particles.log_potential,
        log_scores(model, particles),
        filter_trace.log_evidence,
        filter_trace.ess,
        filter_trace.ancestors,
        lengths,
        filter_trace.status,
        filter_trace.num_steps,
        particles.ledger,
    )


def log_scores(model: TokenModel, particles: Particles) -> Array:
    """Log scores of the prefixes (N,), never NaN: what cannot be ranked is last."""
    scores = model.setting.potential.log_score(particles.last, particles.log_potential)
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def one_hot(log_scores: Array) -> Array:
    """All weight on the best one, the first of equals."""
    best = jnp.arange(log_scores.shape[0]) == jnp.argmax(log_scores)
    return jnp.where(best, 0.0, -jnp.inf).astype(log_scores.dtype)


def default_step() -> Step:
    """A line or a paragraph of reasoning."""
    return until("\n\n")


def check_step(step: Any) -> Step:
    """Return a step; an int k is ``every(k)``, a string ``until(string)``.

    Raises:
        TypeError: it is none of them.
    """
    if isinstance(step, Step):
        return step
    if isinstance(step, str):
        return until(step)
    if isinstance(step, (int, np.integer)) and not isinstance(step, bool):
        return every(step)
    raise TypeError(f'step must be lm.until("\\n\\n"), lm.every(k) or the like, got {shortened(step)}')


def check_method(method: Any) -> None:
    """Refuse what is no method.

    Raises:
        TypeError: it is the class of one, or something else.
    """
    example = "lm.ParticleFilter(num_particles=16)"
    if isinstance(method, type):
        raise TypeError(
            f"expected a method such as {example}, got the class {method.__name__} itself: give its settings, "
            f"lm.{method.__name__}(...)"
        )
    if not hasattr(method, "num_rows"):
        raise TypeError(f"expected a method such as {example}, got {shortened(method)}")


def check_count(method: Any, name: str, least: int = 1) -> None:
    """Make a field of a method an int.

    Raises:
        TypeError: it is no integer.
        ValueError: it is too small.
    """
    object.__setattr__(method, name, as_count(name, getattr(method, name), least))
