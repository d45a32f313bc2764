"""The planted faults of particle methods: wrappers around schemes, models and paths of the library."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer import resampling, smc
from probinfer.core.types import pytree
from probinfer.numerics import weights
from probinfer.smc.tempered.bridge import PriorBridge

from .clouds import Cloud, by_filter, by_gibbs, by_tempering
from .state_space import WINDOW

__all__ = ["CLOUD_FAULTS", "CLOUD_NULLS", "cloud_by_name"]

SYSTEMATIC, CONDITIONAL = resampling.systematic, resampling.conditional("systematic")
MULTINOMIAL = resampling.conditional("multinomial")
_FIXED = 20261121


# Resampling schemes


def keep_total(log_weights, chosen):
    """Equal weights with the total of those that came."""
    total = weights.log_mean_exp(log_weights)
    return jnp.full(len(chosen), total)


def dead_chosen(key, log_weights, num):
    """Particles of weight zero are given a fifth of the mean weight when ancestors are chosen."""
    floor = weights.log_mean_exp(log_weights) - jnp.log(5.0)
    ancestors, _ = SYSTEMATIC(key, jnp.where(log_weights == -jnp.inf, floor, log_weights), num)
    return ancestors, keep_total(log_weights, ancestors)


def total_lost(key, log_weights, num):
    ancestors, equal = SYSTEMATIC(key, log_weights, num)
    return ancestors, jnp.zeros_like(equal)


def weights_kept(key, log_weights, num):
    """The weights have chosen the ancestors, and count again."""
    ancestors, equal = SYSTEMATIC(key, log_weights, num)
    ancestor_log_weights = log_weights[ancestors]
    return ancestors, ancestor_log_weights - weights.log_mean_exp(ancestor_log_weights) + equal


def fixed_uniform(key, log_weights, num):
    return SYSTEMATIC(jax.random.key(_FIXED), log_weights, num)


def flattened(key, log_weights, num):
    """Ancestors are chosen by the square roots of the weights, which nothing makes good."""
    ancestors, _ = SYSTEMATIC(key, 0.5 * log_weights, num)
    return ancestors, keep_total(log_weights, ancestors)


# Conditional schemes


def reference_favoured(key, log_weights, num):
    """After resampling slot 0 holds 0.92 of the mass."""
    ancestors, equal = CONDITIONAL(key, log_weights, num)
    favoured = equal.at[0].add(jnp.log((num - 1) * 0.92 / 0.08))
    return ancestors, favoured - weights.log_mean_exp(favoured) + equal[0]


def reference_ignored(key, log_weights, num):
    """The others are chosen as if there were no reference."""
    ancestors, equal = SYSTEMATIC(key, log_weights, num)
    return ancestors.at[0].set(0), equal


# Models and paths


def without_suffix(model: smc.BatchedFeynmanKac) -> smc.BatchedFeynmanKac:
    """Ancestors of the reference by the weights alone: what it does next is not looked at."""
    suffix = jax.tree_util.Partial(_nothing, model.log_suffix)
    return smc.BatchedFeynmanKac(model.init, model.extend, log_suffix=suffix)


def _nothing(log_suffix, particles, records, t):
    return 0 * log_suffix(particles, records, t)


@pytree
class Wrapped:
    """A path with one thing wrong."""

    path: Any

    def sample(self, key):
        return self.path.sample(key)

    def terms(self, flat):
        return self.path.terms(flat)


@pytree
class ForgetsPrior(Wrapped):
    """Moves leave a power of the likelihood as it is, without the prior."""

    def terms(self, flat):
        log_base, log_ratio = self.path.terms(flat)
        return 0 * log_base, log_ratio


@pytree
class StartsNarrow(Wrapped):
    """Particles begin with 0.8 of the standard deviations of the base law."""

    def sample(self, key):
        return 0.8 * self.path.sample(key)


def _forgets(path: PriorBridge) -> Any:
    return ForgetsPrior(path)


def _narrow(path: PriorBridge) -> Any:
    return StartsNarrow(path)


CLOUD_NULLS = (
    by_filter("none, filter", "systematic resampling at every step", SYSTEMATIC),
    by_filter("none, filter with dead particles", "the same, some weights zero", SYSTEMATIC, WINDOW),
    by_gibbs("none, particle Gibbs", "a path along the genealogy", CONDITIONAL, "genealogy"),
    by_gibbs("none, ancestor sampling", "ancestors of the reference drawn anew", CONDITIONAL, "ancestor"),
    by_gibbs("none, backward sampling", "the path drawn backwards", MULTINOMIAL, "backward"),
    by_tempering("none, tempered SMC", "six levels, waste-free"),
)

CLOUD_FAULTS = (
    by_filter(
        "dead particles chosen", "weight zero counts as a fifth of the mean weight", dead_chosen, WINDOW
    ),
    by_filter("evidence lost", "resampling sets the weights to one", total_lost),
    by_filter("weights used twice", "they choose the ancestors, and stay", weights_kept),
    by_filter("fixed uniform", "systematic resampling with the same number every time", fixed_uniform),
    by_filter("square roots of weights", "ancestors by the roots, weights then equal", flattened),
    by_gibbs(
        "reference favoured", "it has 0.92 of the mass after resampling", reference_favoured, "genealogy"
    ),
    by_gibbs("reference ignored", "the others drawn as if without it", reference_ignored, "genealogy"),
    by_gibbs(
        "ancestor sampling by weights alone",
        "the transition density left out",
        CONDITIONAL,
        "ancestor",
        without_suffix,
    ),
    by_gibbs(
        "backward sampling by weights alone",
        "the transition density left out",
        MULTINOMIAL,
        "backward",
        without_suffix,
    ),
    by_tempering("moves forget the prior", "they leave another law invariant", _forgets),
    by_tempering("initial distribution too narrow", "0.8 of its standard deviations", _narrow),
)


def cloud_by_name(name: str) -> Cloud:
    """The method of that name."""
    return next(cloud for cloud in (*CLOUD_NULLS, *CLOUD_FAULTS) if cloud.name == name)
