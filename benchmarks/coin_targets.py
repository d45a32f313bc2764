"""Targets of ``coin_accuracy.py`` with reference draws: exact ones, stored ones, or those of long chains.

``chosen``: constants of the coin rules were once chosen on this target or one like it; the others are held out.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measurements import measurement_path
from posteriordb_data import read_data, read_draws
from posteriordb_models import PORTS, Port

import probinfer as pi
from probinfer import data, mcmc
from probinfer.core.binding import LogDensity

__all__ = ["TARGETS", "Case", "rows"]

DRAWS = 5000
FOLDER = "PROBINFER_BENCH_CACHE"  # where long chains are kept


class Case(NamedTuple):
    """``draws`` (n, d) are rows of flattened positions; ``start(key, N)`` is a cloud."""

    logdensity_fn: Any
    draws: np.ndarray
    start: Callable


def rows(positions: Any, lead: int) -> np.ndarray:
    """Flatten trees with ``lead`` leading axes to one array (..., d)."""
    leaves = [np.asarray(leaf, float) for leaf in jax.tree.leaves(positions)]
    return np.concatenate([leaf.reshape(*leaf.shape[:lead], -1) for leaf in leaves], axis=-1)


def standard_start(dims: int, key: Any, num: int) -> Any:
    """Draw the initial particles from N(0, I), without information about the target."""
    return jax.random.normal(key, (num, dims))


def exact(log_density: Callable, draws: np.ndarray, *arguments: Any) -> Case:
    """Return a case with exact reference draws."""
    fn = LogDensity(log_density, *(jnp.asarray(a, jnp.result_type(float)) for a in arguments))
    return Case(fn, draws, partial(standard_start, draws.shape[1]))


def random() -> np.random.Generator:
    """Of the reference draws."""
    return np.random.default_rng(20230131)


def log_normal(mean, precision_root, x):
    """|R'(x - m)|^2: written so that small variances lose no digits."""
    return -0.5 * jnp.sum((precision_root.T @ (x - mean)) ** 2)


def normal(mean: np.ndarray, covariance_root: np.ndarray) -> Case:
    """N(m, A A')."""
    draws = mean + random().normal(size=(DRAWS, len(mean))) @ covariance_root.T
    return exact(log_normal, draws, mean, np.linalg.inv(covariance_root).T)


def gauss() -> Case:
    """The normal density of the paper, by its precision."""
    precision = np.array([[3.0, -0.5], [-0.5, 1.0]])
    return normal(np.array([-1.0, 1.0]), np.linalg.cholesky(np.linalg.inv(precision)))


def autoregressive() -> Case:
    """50 dimensions, correlation 0.8^|i - j|, standard deviations 0.3 ... 3."""
    scale = np.geomspace(0.3, 3, 50)
    correlation = 0.8 ** np.abs(np.subtract.outer(np.arange(50), np.arange(50)))
    return normal(np.zeros(50), scale[:, None] * np.linalg.cholesky(correlation))


def rotated() -> Case:
    """10 dimensions, variances 1e-2 ... 1e2 along random directions."""
    q = np.linalg.qr(np.random.default_rng(5).normal(size=(10, 10)))[0]
    return normal(np.zeros(10), q * np.geomspace(0.1, 10, 10))


def log_mixture(means, precisions, log_shares, x):
    """Log density of a mixture of isotropic normals; the shares include the normalizing constants."""
    return jax.scipy.special.logsumexp(log_shares - 0.5 * precisions * jnp.sum((x - means) ** 2, axis=1))


def mixture(means: np.ndarray, precisions: np.ndarray, shares: np.ndarray) -> Case:
    """A mixture of isotropic normals."""
    component = random().choice(len(means), DRAWS, p=shares)
    draws = means[component] + random().normal(size=(DRAWS, 2)) / np.sqrt(precisions[component])[:, None]
    return exact(log_mixture, draws, means, precisions, np.log(shares) + np.log(precisions))


def even() -> Case:
    """The mixture with two modes of the paper."""
    return mixture(np.array([[2.0, -2.0], [-2.0, 2.0]]), np.full(2, 2.0), np.full(2, 0.5))


def uneven() -> Case:
    """A mixture of three modes with different weights and widths."""
    means = np.array([[3.0, 0.0], [-3.0, 1.0], [0.0, -3.0]])
    return mixture(means, np.array([1.0, 4.0, 2.0]), np.array([0.6, 0.15, 0.25]))


def log_rosenbrock(a, x):
    """The curved valley of the paper with b = 1."""
    return -((a - x[0]) ** 2) - (x[1] - x[0] ** 2) ** 2


def rosenbrock() -> Case:
    """The valley at a = -1."""
    first, second = random().normal(size=(2, DRAWS)) / np.sqrt(2)
    return exact(log_rosenbrock, np.stack([first - 1, second + (first - 1) ** 2], axis=1), -1.0)


def log_banana(bend, x):
    """The log density of a normal with scales 3 and 1, transformed into a banana shape."""
    return -0.5 * (x[0] / 3) ** 2 - 0.5 * (x[1] + bend * (x[0] ** 2 - 9)) ** 2


def banana() -> Case:
    """Bend 0.1."""
    first, second = random().normal(size=(2, DRAWS)) * [[3.0], [1.0]]
    return exact(log_banana, np.stack([first, second - 0.1 * (first**2 - 9)], axis=1), 0.1)


def log_donut(radius, variance, x):
    """A ring."""
    return -((radius - jnp.sqrt(jnp.sum(x**2) + 1e-12)) ** 2) / variance


def donut() -> Case:
    """Radius 2.5, variance 0.5."""
    grid = np.linspace(0, 8, 20001)
    cumulative = np.cumsum(grid * np.exp(-((2.5 - grid) ** 2) / 0.5))
    radius = np.interp(random().uniform(size=DRAWS), cumulative / cumulative[-1], grid)
    angle = np.random.default_rng(1).uniform(0, 2 * np.pi, DRAWS)
    return exact(log_donut, radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), 2.5, 0.5)


def log_funnel(sd, x):
    """Log variance first."""
    return -0.5 * (x[0] / sd) ** 2 - 0.5 * x[1] ** 2 * jnp.exp(-x[0]) - 0.5 * x[0]


def funnel() -> Case:
    """Log variance of standard deviation 1.5."""
    first, second = random().normal(size=(2, DRAWS)) * [[1.5], [1.0]]
    return exact(log_funnel, np.stack([first, second * np.exp(first / 2)], axis=1), 1.5)


def log_squiggle(root, frequency, x):
    """A normal density under a wave."""
    z = jnp.array([x[0], x[1] + jnp.sin(frequency * x[0])])
    return -0.5 * jnp.sum((root.T @ z) ** 2)


def squiggle() -> Case:
    """Covariance [[2, 1/4], [1/4, 1/2]], frequency 2."""
    root = np.linalg.cholesky(np.array([[2.0, 0.25], [0.25, 0.5]]))
    z = random().normal(size=(DRAWS, 2)) @ root.T
    draws = np.stack([z[:, 0], z[:, 1] - np.sin(2 * z[:, 0])], axis=1)
    return exact(log_squiggle, draws, np.linalg.inv(root).T, 2.0)


def log_student(scale, x):
    """Independent, three degrees of freedom."""
    return -2.0 * jnp.sum(jnp.log1p((x / scale) ** 2 / 3))


def student() -> Case:
    """Five coordinates of scales 0.1 ... 10."""
    scale = np.geomspace(0.1, 10, 5)
    return exact(log_student, scale * random().standard_t(3, (DRAWS, 5)), scale)


def log_logistic(X, signs, x):
    """Logistic regression under N(0, I)."""
    return -0.5 * jnp.sum(x**2) + jnp.sum(jax.nn.log_sigmoid(signs * (X @ x)))


def logistic(name: str, X: np.ndarray, y: np.ndarray) -> Case:
    """Standardized features and an intercept; the draws are those of long chains, kept on disk."""
    X = np.concatenate([np.ones((len(X), 1)), (X - X.mean(0)) / X.std(0)], axis=1)
    fn = LogDensity(log_logistic, jnp.asarray(X), jnp.asarray(2.0 * y - 1))
    path = Path(os.environ.get(FOLDER, tempfile.gettempdir())) / f"coin_reference_{name}.npy"
    if not path.exists():
        target = pi.targets.from_logdensity(fn, jnp.zeros(X.shape[1]))
        posterior = pi.infer(jax.random.key(7), target, mcmc.NUTS(num_draws=2500), progress=False)
        draws = np.asarray(jax.tree.leaves(posterior.draws)[0]).reshape(-1, X.shape[1])
        np.save(path, draws[:: max(1, len(draws) // DRAWS)])
    return Case(fn, np.load(path), partial(standard_start, X.shape[1]))


def breast_cancer() -> Case:
    """569 tumors, 31 coefficients."""
    table = data.breast_cancer()
    return logistic("breast_cancer", np.asarray(table.X, float), np.asarray(table.y, float))


def banknote() -> Case:
    """1372 banknotes, 5 coefficients."""
    table = np.loadtxt(measurement_path("coin/data_banknote_authentication.txt"), delimiter=",")
    return logistic("banknote", table[:, :-1], table[:, -1])


def stored(port: Port) -> Case:
    """A posterior with stored draws, unconstrained; the particles start where every engine of the library does."""
    target = port.target(read_data(port.data))
    positions = port.positions(target, read_draws(port.name))
    draws = rows(positions, 2)
    draws = draws.reshape(-1, draws.shape[-1])
    return Case(target.logdensity_fn, draws[:: max(1, len(draws) // DRAWS)], target.init)


# When restarts come and when a cloud has settled was chosen with these in view.
SEEN = ("arma", "hmm_example", "kilpisjarvi", "low_dim_gauss_mix", "sblrc")

TARGETS: dict[str, tuple[Callable[[], Case], bool]] = {
    "gauss": (gauss, False),
    "two modes": (even, True),
    "rosenbrock": (rosenbrock, False),
    "donut": (donut, True),
    "funnel": (funnel, True),
    "squiggle": (squiggle, False),
    "uneven mixture": (uneven, False),
    "banana": (banana, True),
    "student t": (student, True),
    "AR(0.8), d = 50": (autoregressive, True),
    "rotated, d = 10": (rotated, True),
    "breast cancer": (breast_cancer, True),
    "banknote": (banknote, False),
    **{port.name: (partial(stored, port), port.name.startswith(SEEN)) for port in PORTS},
}
