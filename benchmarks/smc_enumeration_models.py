"""Finite Feynman-Kac models of ``smc_enumeration.py``, their exact values, and the errors of samples."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from scipy import stats
from scipy.special import logsumexp

from probinfer import smc

__all__ = ["FiniteModel", "bootstrap", "chi_squared", "masses", "methods", "path_law", "random_model", "z_of"]


class FiniteModel(NamedTuple):
    """Initial distribution (K,), transitions (T, K, K), log potentials (T, K, K)."""

    initial: np.ndarray
    transition: np.ndarray
    log_potential: np.ndarray


def random_model(seed: int, num_states: int, num_steps: int) -> FiniteModel:
    """Return a model without symmetries between its states."""
    rng = np.random.default_rng(seed)
    shape = (num_steps, num_states, num_states)
    log_potential = rng.normal(size=shape) + np.linspace(-1.0, 1.0, num_states)
    log_potential[rng.uniform(size=shape) < 1 / 7] = -np.inf
    transition = rng.dirichlet(np.full(num_states, 0.7), size=shape[:2])
    return FiniteModel(rng.dirichlet(np.ones(num_states)), transition, log_potential)


def masses(model: FiniteModel) -> np.ndarray:
    """Unnormalized smoothing masses (T, K): every row sums to the evidence."""
    steps = model.transition * np.exp(model.log_potential)
    forward = [model.initial * np.exp(np.diag(model.log_potential[0]))]
    for step in steps[1:]:
        forward.append(forward[-1] @ step)
    backward = [np.ones_like(model.initial)]
    for step in steps[:0:-1]:
        backward.insert(0, step @ backward[0])
    return np.stack(forward) * np.stack(backward)


def path_law(model: FiniteModel) -> tuple[np.ndarray, np.ndarray]:
    """Return all paths (K^T, T) and their probabilities."""
    num_steps, num_states = model.log_potential.shape[:2]
    paths = np.array(list(product(range(num_states), repeat=num_steps)))
    mass = model.initial[paths[:, 0]] * np.exp(model.log_potential[0, paths[:, 0], paths[:, 0]])
    for t in range(1, num_steps):
        before, now = paths[:, t - 1], paths[:, t]
        mass = mass * model.transition[t, before, now] * np.exp(model.log_potential[t, before, now])
    return paths, mass / mass.sum()


# The same as Feynman-Kac models


def start(table, key):
    """First state."""
    return jax.random.categorical(key, table).astype(jnp.int32)


def move(table, key, x, t):
    """Next state."""
    return jax.random.categorical(key, table[t, x]).astype(jnp.int32)


def entry(table, before, x, t):
    """Look up the log potential in a table (T, K, K)."""
    return table[t, before, x]


def ahead_of(table, x, t):
    """Look up the log potential in a table (T, K)."""
    return table[t, x]


def bootstrap(model: FiniteModel) -> smc.FeynmanKac:
    """Propagate by the transition."""
    with np.errstate(divide="ignore"):
        initial, transition = jnp.log(model.initial), jnp.log(model.transition)
    potential = jnp.asarray(model.log_potential)
    return smc.FeynmanKac(
        Partial(start, initial),
        Partial(move, transition),
        Partial(entry, potential),
        Partial(entry, transition),
    )


def methods(model: FiniteModel) -> dict:
    """Return models of the same target by name."""
    num_steps = len(model.log_potential)
    plain = bootstrap(model)
    joint = np.log(model.transition) + 0.5 * np.maximum(model.log_potential, -20.0)
    proposal = jnp.asarray(joint - logsumexp(joint, axis=2, keepdims=True))
    lookahead = logsumexp(np.log(model.transition) + np.maximum(model.log_potential, -20.0), axis=2)
    lookahead = jnp.asarray(np.roll(lookahead, -1, axis=0))
    return {
        "bootstrap": plain,
        "guided": smc.guided(plain, Partial(move, proposal), Partial(entry, proposal)),
        "auxiliary": smc.auxiliary(plain, Partial(ahead_of, lookahead), num_steps),
        "nested": smc.nested(plain, 3),
    }


def z_of(samples, expected) -> np.ndarray:
    """Of the mean over axis 0; zero where nothing varies and nothing is wrong."""
    samples = np.asarray(samples, float)
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    difference = samples.mean(axis=0) - expected
    flat = error <= 1e-12 * np.abs(expected)
    wrong = np.where(np.abs(difference) <= 1e-9 * np.abs(expected) + 1e-15, 0.0, np.inf)
    return np.where(flat, wrong, difference / np.where(flat, 1.0, error))


def chi_squared(paths: np.ndarray, probabilities: np.ndarray, num_states: int) -> float:
    """p-value of paths (chains, T); cells with fewer than 10 expected are one."""
    index = paths @ num_states ** np.arange(paths.shape[1])[::-1]
    counts, expected = np.bincount(index, minlength=len(probabilities)), probabilities * len(paths)
    rare = expected < 10
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    is_possible = expected > 0
    if counts[~is_possible].sum():
        return 0.0
    return float(stats.chisquare(counts[is_possible], expected[is_possible]).pvalue)
