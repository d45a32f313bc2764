"""Classifier two-sample test: can a classifier tell one set of draws from the other?"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from scipy import special

from probinfer.checks.discrepancy.permutation import Pooled, pool, pvalue, random_labels
from probinfer.checks.draws import FlatDraws, collect_pair
from probinfer.checks.power.ranks import Detectable, smallest
from probinfer.core.errors import check_key
from probinfer.core.types import Array, PRNGKey
from probinfer.plots.ranks import axes_or_new, ink

__all__ = ["C2STReport", "Classifier", "c2st"]

_POWER = 0.9
_CLASSIFIERS = {"linear": (), "network": (32, 32)}


class Classifier(nnx.Module):
    """Logits of a perceptron with ``tanh`` layers; without hidden layers, logistic regression.

    The last layer starts at zero: what a random one calls the draws stays visible after few steps, as an accuracy far
    below one half.
    """

    def __init__(self, dims: int, hidden: tuple[int, ...], rngs: nnx.Rngs):
        sizes = (dims, *hidden, 1)
        pairs = itertools.pairwise(sizes)
        self.layers = nnx.List([nnx.Linear(m, n, rngs=rngs) for m, n in pairs])
        self.layers[-1].kernel[...] = jnp.zeros_like(self.layers[-1].kernel[...])

    def __call__(self, x: Array) -> Array:
        """``(n, d)`` draws to ``(n,)`` logits of belonging to b."""
        for layer in self.layers[:-1]:
            x = jnp.tanh(layer(x))
        return self.layers[-1](x)[:, 0]


@dataclasses.dataclass(frozen=True)
class C2STReport:
    """Accuracies on draws that the classifier did not see.

    Attributes:
        accuracy: the best classifier's, balanced over the two sets, mean over folds; 0.5: indistinguishable.
        accuracies: classifier -> ``(folds,)`` balanced accuracies.
        pvalues: classifier -> ``(folds,)`` permutation p-values of the held-out draws.
        pvalue: the smallest of them times their number (the folds depend on one another).
        sizes: held-out draws of a and b in a fold.
        block: held-out draws that were relabelled together.
        detectable: accuracy in one fold from which on the verdict would be a difference.
        level: of the verdict.
        trained: draws of a and b that a classifier learned from.
        dims: coordinates.
    """

    accuracy: float
    accuracies: dict[str, np.ndarray]
    pvalues: dict[str, np.ndarray]
    pvalue: float
    sizes: tuple[int, int]
    block: int
    detectable: float
    level: float
    trained: tuple[int, int]
    dims: int

    @functools.cached_property
    def power(self) -> Detectable:
        r"""Bias that the linear classifier finds with probability 0.9.

        Learned from n + m draws in d dimensions, its accuracy on two normals that are :math:`\delta` apart is about
        :math:`\Phi(\delta^2/2 / \sqrt{\delta^2 + d(1/n + 1/m)})`; one of the folds must exceed the critical value.
        Wrong widths and correlations only the network sees, how well is not computed: the bounds are 0 and infinite.

        References:
            Raudys and Young (2004), "Results in statistical discriminant analysis", equation 11 (known covariance).
        """
        worth = min(1.0, 8 / self.block)  # a block is of eight correlation times at least
        noise = self.dims * sum(1 / (size * worth) for size in self.trained)

        def found(bias: float) -> bool:
            accuracy = float(special.ndtr(bias**2 / 2 / np.sqrt(bias**2 + noise)))
            deviation = np.sqrt(
                accuracy * (1 - accuracy) * sum(1 / (4 * size * worth) for size in self.sizes)
            )
            missed = special.ndtr((self.detectable - accuracy) / max(deviation, 1e-12))
            return bool(1 - missed ** len(self.accuracies["linear"]) >= _POWER)

        where = "in one coordinate, by the linear classifier; widths and correlations only the network sees"
        return Detectable(smallest(found, 16.0), 0.0, float("inf"), _POWER, self.level, where)

    @property
    def passed(self) -> bool | None:
        """True if no difference was seen, False if one was."""
        return self.pvalue > self.level

    @property
    def verdict(self) -> str:
        """One sentence on what was seen, one on what could have been."""
        found = (
            f"held-out accuracy {self.accuracy:.3f} (p = {self.pvalue:.2g}, {sum(self.sizes)} draws a fold)"
        )
        if self.pvalue <= self.level:
            return f"the draws differ in law: {found}"
        return (
            f"no difference seen: {found}; an accuracy of {self.detectable:.3f} in a fold would have been called one. "
            f"The check {self.power}; a classifier that is too weak sees nothing"
        )

    def plot(self, axes: Any = None) -> Any:
        """Draw the accuracies of every fold; return the axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        axes = axes_or_new(axes)
        for name, values in self.accuracies.items():
            axes.plot(np.arange(len(values)), values, "o", label=name)
        axes.axhline(0.5, color=ink())
        axes.axhline(self.detectable, color=ink(), linestyle=":", label="smallest seen")
        axes.set(xlabel="fold", ylabel="held-out accuracy")
        axes.legend()
        return axes


def c2st(
    key: Any,
    a: Any,
    b: Any,
    *,
    folds: int = 2,
    num_steps: int = 400,
    num_permutations: int = 999,
    level: float = 0.05,
) -> C2STReport:
    """Train a linear classifier and a small network to tell a from b; judge them on draws held out.

    Whole chains are held out where there are as many chains as folds, else stretches of every chain, so correlated
    draws do not stand on both sides. Given the classifier the permutation p-value of a fold is exact (blocks of
    draws for chains); folds and classifiers are joined by Bonferroni, since the folds share their training draws. So
    few folds with many held-out draws serve best.

    Args:
        key: for initial weights, batches and permutations.
        a: draws: ``(n, d)`` independent, ``(chain, draw, d)``, or a tree with leaves (chain, draw, ...).
        b: draws of the other set.
        folds: parts of the draws, each held out once.
        num_steps: of Adam, on batches of 256 draws of each set.
        num_permutations: for each p-value.
        level: of the verdict.

    Returns:
        Accuracies, p-values, verdict.

    Raises:
        TypeError: not a key, draws that are not floating point.
        ValueError: draws that ``collect_pair`` refuses, fewer than two folds, folds too small, too few permutations.

    References:
        Lopez-Paz and Oquab (2017), "Revisiting classifier two-sample tests", section 3.
    """
    check_key(key)
    if folds < 2 or 2 * folds > level * (num_permutations + 1):
        raise ValueError(
            f"folds must be at least 2, and num_permutations at least {int(2 * folds / level)} for that many folds to "
            f"reach p = {level}; got {folds} and {num_permutations}"
        )
    pair = collect_pair(a, b, least=20 * folds)
    rows = jnp.concatenate([draws.rows for draws in pair])
    mean, deviation = jnp.mean(rows, axis=0), jnp.std(rows, axis=0)
    scaled = tuple(draws._replace(values=(draws.values - mean) / deviation) for draws in pair)
    results = [
        _fold(jax.random.fold_in(key, fold), scaled, fold, folds, num_steps, num_permutations)
        for fold in range(folds)
    ]
    accuracies = {name: np.asarray([found[name][0] for found, _, _ in results]) for name in _CLASSIFIERS}
    pvalues = {name: np.asarray([found[name][1] for found, _, _ in results]) for name in _CLASSIFIERS}
    smallest = min(float(values.min()) for values in pvalues.values())
    nulls = np.sort(np.concatenate([null for _, _, null in results]))
    held = results[0][1]
    return C2STReport(
        accuracy=max(float(values.mean()) for values in accuracies.values()),
        accuracies=accuracies,
        pvalues=pvalues,
        pvalue=min(1.0, 2 * folds * smallest),
        sizes=held.sizes,
        block=held.block,
        detectable=float(np.quantile(nulls, 1 - level / (2 * folds), method="higher")),
        level=float(level),
        trained=(len(pair[0].rows) - held.sizes[0], len(pair[1].rows) - held.sizes[1]),
        dims=rows.shape[1],
    )


def _fold(
    key: PRNGKey, pair: tuple[FlatDraws, ...], fold: int, folds: int, num_steps: int, num_permutations: int
) -> tuple[dict[str, tuple[float, Any]], Pooled, np.ndarray]:
    """Accuracy and p-value of every classifier in one fold, the held-out draws, and a null distribution."""
    train_key, label_key = jax.random.split(key)
    train, test = zip(*(_split(draws, fold, folds) for draws in pair), strict=True)
    held = pool(*test)
    labels = random_labels(label_key, held, num_permutations)
    found: dict[str, tuple[float, Any]] = {}
    null = np.zeros(0)
    for name, hidden in _CLASSIFIERS.items():
        called_b = _train(train_key, *train, held.rows, hidden=hidden, num_steps=num_steps) > 0
        accuracies = np.asarray(_accuracies(called_b, labels))
        null = accuracies[1:]
        found[name] = (float(accuracies[0]), pvalue(float(accuracies[0]), null))
    return found, held, null


def _split(draws: FlatDraws, fold: int, folds: int) -> tuple[Array, FlatDraws]:
    """Rows to train on, and held-out draws."""
    values = draws.values
    by_chain = values.shape[0] >= folds
    axis, count = (0, values.shape[0]) if by_chain else (1, values.shape[1])
    own = np.arange(count) * folds // count == fold
    train, test = (jnp.compress(mask, values, axis=axis) for mask in (~own, own))
    return train.reshape(-1, values.shape[-1]), draws._replace(values=test)


@jax.jit
def _accuracies(called_b: Array, labels: Array) -> Array:
    """Balanced accuracy for every labelling (true: of a)."""

    def one(in_a: Array) -> Array:  # one labelling at a time: all of them as numbers would fill the memory
        false = jnp.sum(in_a & called_b) / jnp.sum(in_a)
        true = jnp.sum(~in_a & called_b) / jnp.sum(~in_a)
        return (0.5 + 0.5 * (true - false)).astype(jnp.float32)

    return jax.lax.map(one, labels)


@partial(jax.jit, static_argnames=("hidden", "num_steps"))
def _train(
    key: PRNGKey, a: Array, b: Array, rows: Array, *, hidden: tuple[int, ...], num_steps: int
) -> Array:
    """Logits of the rows under a classifier trained on a (0) and b (1), equally weighted."""
    init_key, batch_key = jax.random.split(key)
    graph, parameters = nnx.split(Classifier(a.shape[1], hidden, nnx.Rngs(init_key)))
    parameters = jax.tree.map(lambda leaf: leaf.astype(a.dtype), parameters)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, num_steps))

    def loss(parameters, x, z):
        model = nnx.merge(graph, parameters)
        return jnp.mean(jax.nn.softplus(model(x))) + jnp.mean(jax.nn.softplus(-model(z)))

    def step(state, key):
        parameters, moments = state
        batches = [
            draws[jax.random.randint(k, (min(256, len(draws)),), 0, len(draws))]
            for k, draws in zip(jax.random.split(key), (a, b), strict=True)
        ]
        updates, moments = optimizer.update(jax.grad(loss)(parameters, *batches), moments, parameters)
        return (optax.apply_updates(parameters, updates), moments), None

    start = (parameters, optimizer.init(parameters))
    (parameters, _), _ = jax.lax.scan(step, start, jax.random.split(batch_key, num_steps))
    return nnx.merge(graph, parameters)(rows)
