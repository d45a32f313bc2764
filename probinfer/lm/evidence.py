r"""Bounds on the evidence of a prompt from both sides.

.. math:: E \log\hat Z_{\text{filter}} \le \log Z \le E \log\hat Z_{\text{conditional filter}}

The filter is unbiased for Z, so by Jensen's inequality its log is low in the mean; a filter around one exact draw of
the posterior has :math:`E[1/\hat Z] = 1/Z`, so its log is high. Exact draws come from rejection, which needs a bound on
the reward.

References:
    Grosse, Ghahramani and Adams (2015), bounds from both sides; Zhao et al. (2024), for language models.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.arguments import check_key
from probinfer.core.types import Array, Float, PRNGKey
from probinfer.lm.arguments import as_count
from probinfer.lm.generation.prompts import encode, limits_of, prepare
from probinfer.lm.generation.proposals import Proposal, as_proposal
from probinfer.lm.generation.texts import Record
from probinfer.lm.generation.token_model import TokenModel, feynman_kac
from probinfer.lm.methods.base import check_method
from probinfer.lm.methods.filters import ParticleFilter, independent_draws, resampler_for
from probinfer.lm.models.model import Model, check_model
from probinfer.lm.rewards.deferred import bind
from probinfer.lm.rewards.host.registry import detached
from probinfer.smc.filtering.filter import to_result
from probinfer.smc.filtering.forward_pass import forward

__all__ = ["EvidenceBounds", "evidence_bounds", "exact_paths", "forward_estimates", "reverse_estimates"]


class EvidenceBounds(NamedTuple):
    """Bounds on one log evidence.

    Attributes:
        lower: mean of the log estimates of the filter.
        upper: mean of the log estimates of the conditional filter.
        lower_error: standard error of ``lower``; NaN for a single run.
        upper_error: standard error of ``upper``; NaN for a single run.
        forward: (R,) log estimates of the filter.
        reverse: (R,) log estimates of the conditional filter.
        acceptance: share of the draws that rejection accepted.
    """

    lower: float
    upper: float
    lower_error: float
    upper_error: float
    forward: np.ndarray
    reverse: np.ndarray
    acceptance: float

    @property
    def gap(self) -> float:
        """Distance of the bounds, ``upper - lower``."""
        return self.upper - self.lower


def evidence_bounds(
    key: PRNGKey,
    model: Model,
    prompt: Any,
    reward: Any,
    method: Any,
    *,
    num_repeats: SupportsIndex = 32,
    log_bound: Any = 0.0,
    stop: Any = (),
    max_tokens: SupportsIndex = 512,
    max_steps: SupportsIndex | None = 64,
    proposal: Proposal | None = None,
    chat: bool = False,
    max_draws: SupportsIndex = 100_000,
) -> EvidenceBounds | list[EvidenceBounds]:
    """Bound the log evidence of a prompt from both sides.

    Exact draws by rejection are expensive if the reward is sharp; several filters share them.

    Args:
        key: random key.
        model: as for ``lm.infer``.
        prompt: one prompt.
        reward: a reward whose product over the steps is at most exp(``log_bound``): scores that are probabilities, with
            the meanings "likelihood", "twist" and "terminal", have the bound 0; odds have no useful bound.
        method: the particle filter, or a list of them.
        num_repeats: R, number of runs of each kind; each conditional run has an exact draw of its own.
        log_bound: see ``reward``.
        stop: as for ``lm.infer``, like the next four.
        max_tokens: see there.
        max_steps: see there.
        proposal: see there.
        chat: see there.
        max_draws: maximum number of draws that rejection may try.

    Returns:
        The bounds; a list of them for a list of filters.

    Raises:
        ValueError: the bound is exceeded, rejection finds too few exact draws, the filters cut texts into steps that
            differ, or a count is below 1.
        TypeError: a method is not a particle filter, or another argument is of the wrong kind.
    """
    check_key(key)
    check_model(model)
    is_list = isinstance(method, (list, tuple))
    methods = _check_filters(list(method) if is_list else [method])
    limits, proposal = limits_of(max_tokens, max_steps, stop), as_proposal(proposal)
    num_repeats, max_draws = as_count("num_repeats", num_repeats), as_count("max_draws", max_draws)
    potential = bind(reward, model.tokenizer)
    largest = max(methods, key=lambda method: method.num_rows)
    prompts = [encode(model, prompt, chat)]
    [token_model] = prepare(model, prompts, largest, detached(potential), proposal, limits)
    key_draws, *keys = jax.random.split(key, len(methods) + 1)
    paths, acceptance = exact_paths(key_draws, token_model, num_repeats, log_bound, max_draws)
    bounds = [
        _bounds(key, token_model, method, paths, acceptance)
        for key, method in zip(keys, methods, strict=True)
    ]
    return bounds if is_list else bounds[0]


def _check_filters(methods: list) -> list[ParticleFilter]:
    for method in methods:
        check_method(method)
        if not isinstance(method, ParticleFilter):
            raise TypeError(
                f"bounds come from particle filters, got {type(method).__name__}: use lm.ParticleFilter(...)"
            )
    if not methods:
        raise ValueError("the list of filters is empty: give lm.ParticleFilter(...) or several of them")
    if len({method.step for method in methods}) != 1:
        raise ValueError("the filters must cut texts into the same steps, as they share the exact draws")
    return methods


def _bounds(
    key: Array, model: TokenModel, method: ParticleFilter, paths: Record, acceptance: float
) -> EvidenceBounds:
    key_low, key_high = jax.random.split(key)
    num = paths.length.shape[0]
    low = np.asarray(forward_estimates(key_low, model, method, num), float)
    high = np.asarray(reverse_estimates(key_high, model, method, paths), float)
    return EvidenceBounds(
        lower=float(low.mean()),
        upper=float(high.mean()),
        lower_error=_standard_error(low),
        upper_error=_standard_error(high),
        forward=low,
        reverse=high,
        acceptance=acceptance,
    )


def _standard_error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


@partial(jax.jit, static_argnames="num")
def _candidates(key: Array, model: TokenModel, num: int) -> tuple[Any, Array]:
    result = to_result(independent_draws(key, model, num, None))
    return result.paths, result.log_weights


def exact_paths(
    key: PRNGKey,
    model: TokenModel,
    num: int,
    log_bound: Any = 0.0,
    max_draws: int = 100_000,
    batch: int = 256,
) -> tuple[Record, float]:
    """Draw exactly from the posterior by rejection from the prior.

    Returns:
        Records (num, T, ...), and the share of the draws that was accepted.

    Raises:
        ValueError: the bound is exceeded, or ``max_draws`` do not give ``num``.
    """
    accepted: list[Any] = []
    num_accepted = num_tried = 0
    while num_accepted < num:
        if num_tried >= max_draws:
            raise ValueError(
                f"rejection accepted {num_accepted} of {num_tried} draws and {num} are needed: the reward is too sharp "
                f"for exact draws; bound the evidence of a shorter text or of a tempered reward"
            )
        key, key_draw, key_accept = jax.random.split(key, 3)
        paths, log_weights = _candidates(key_draw, model, batch)
        log_ratio = np.asarray(log_weights, float) - float(log_bound)
        if np.max(log_ratio) > 1e-4:  # room for the rounding of float32 in a sum over steps
            raise ValueError(
                f"a text has the log potential {np.max(log_ratio) + float(log_bound):.3g}, above log_bound="
                f"{float(log_bound):g}: rejection needs a bound"
            )
        log_uniform = np.log(np.asarray(jax.random.uniform(key_accept, (batch,))))
        rows = np.flatnonzero(log_uniform < log_ratio)
        accepted.append(jax.tree.map(lambda leaf, rows=rows: leaf[rows], paths))
        num_accepted, num_tried = num_accepted + len(rows), num_tried + batch
    draws = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:num], *accepted)
    return draws, num_accepted / num_tried


@partial(jax.jit, static_argnames="num_repeats")
def forward_estimates(
    key: PRNGKey, model: TokenModel, method: ParticleFilter, num_repeats: int
) -> Float[Array, " r"]:
    """Return log estimates (R,) of R particle filters.

    Args:
        key: random key.
        model: the token model.
        method: the filter.
        num_repeats: R.
    """
    resampler = resampler_for(method.trigger, method.resampling, model.num_steps)

    def run_filter(key: Array) -> Array:
        num = method.num_particles
        return forward(key, feynman_kac(model), resampler, None, model.num_steps, num, "none").log_evidence

    return jax.lax.map(run_filter, jax.random.split(key, num_repeats))


@jax.jit
def reverse_estimates(
    key: PRNGKey, model: TokenModel, method: ParticleFilter, paths: Record
) -> Float[Array, " r"]:
    """Return log estimates (R,) of conditional filters around exact draws.

    Args:
        key: random key.
        model: the token model.
        method: the filter; its scheme needs a conditional form.
        paths: records (R, T, ...).
    """
    resampler = resampler_for(method.trigger, method.resampling, model.num_steps).conditional()

    def run_filter(xs: tuple) -> Array:
        key, path = xs
        num = method.num_particles
        return forward(key, feynman_kac(model), resampler, path, model.num_steps, num, "none").log_evidence

    return jax.lax.map(run_filter, (jax.random.split(key, paths.length.shape[0]), paths))
