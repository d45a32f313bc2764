"""A finite Feynman-Kac model, solved by writing out every path."""

from itertools import product
from typing import NamedTuple

import numpy as np


class FiniteModel(NamedTuple):
    """Start probabilities (K,), transition (T, K, K) (row 0 unused), log potentials (T, K, K) (step 0: diagonal)."""

    initial: np.ndarray
    transition: np.ndarray
    log_potential: np.ndarray

    @property
    def num_steps(self):
        return len(self.log_potential)

    @property
    def num_states(self):
        return len(self.initial)


def random_model(seed, num_states, num_steps, *, dead=0.0):
    """An asymmetric model; a share ``dead`` of the potentials is zero."""
    rng = np.random.default_rng(seed)
    shape = (num_steps, num_states, num_states)
    log_potential = rng.normal(size=shape) + np.linspace(-1.0, 1.0, num_states)
    log_potential[rng.uniform(size=shape) < dead] = -np.inf
    transition = rng.dirichlet(np.full(num_states, 0.7), size=shape[:2])
    return FiniteModel(rng.dirichlet(np.ones(num_states)), transition, log_potential)


def enumerate_paths(model):
    """All paths (K^T, T) and their unnormalized masses (K^T,)."""
    paths = np.array(list(product(range(model.num_states), repeat=model.num_steps)))
    masses = []
    for path in paths:
        mass = model.initial[path[0]] * np.exp(model.log_potential[0, path[0], path[0]])
        for t in range(1, model.num_steps):
            before, now = path[t - 1], path[t]
            mass *= model.transition[t, before, now] * np.exp(model.log_potential[t, before, now])
        masses.append(mass)
    return paths, np.array(masses)


def marginals(model):
    """Unnormalized smoothing masses (T, K): every row sums to the evidence."""
    paths, masses = enumerate_paths(model)
    return np.stack([np.bincount(paths[:, t], masses, model.num_states) for t in range(model.num_steps)])


def path_index(paths, num_states):
    """The row of each path (..., T) in ``enumerate_paths``."""
    index = np.zeros(paths.shape[:-1], int)
    for t in range(paths.shape[-1]):
        index = index * num_states + paths[..., t]
    return index
