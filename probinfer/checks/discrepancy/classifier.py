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
from probinfer.checks.power.ranks import Detectable, smallest_detected
from probinfer.core.arguments import check_key
from probinfer.core.types import Array, PRNGKey
from probinfer.plots.ranks import axes_or_new, ink

__all__ = ["C2STReport", "Classifier", "c2st"]

_POWER = 0.9
_CLASSIFIERS = {"linear": (), "network": (32, 32)}


class Classifier(nnx.Module):
    """Logits of a perceptron with ``tanh`` layers; without hidden layers, logistic regression.

    The last layer starts at zero: after few steps, a random start would still show as an accuracy far below one half.
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
    """Accuracies of classifiers on held-out draws.

    Attributes:
        accuracy: balanced accuracy of the best classifier, mean over folds; 0.5: indistinguishable.
        accuracies: classifier -> ``(folds,)`` balanced accuracies.
        pvalues: classifier -> ``(folds,)`` permutation p-values of the held-out draws.
        pvalue: smallest p-value times their number (the folds are dependent).
        sizes: numbers of held-out draws of a and b in a fold.
        block: number of held-out draws that were relabeled together.
        detectable: critical accuracy in one fold; a larger one counts as a difference.
        level: significance level of the verdict.
        trained: numbers of draws of a and b that a classifier was trained on.
        dims: number of coordinates.
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
        r"""Bias that the linear classifier detects with probability 0.9.

        Trained on n + m draws in d dimensions, its accuracy on two normals at distance :math:`\delta` is about
        :math:`\Phi(\delta^2/2 / \sqrt{\delta^2 + d(1/n + 1/m)})`; one of the folds must exceed the critical value.
        Only the network detects wrong widths and correlations; its power is not computed, so the bounds are 0 and
        infinite.

        References:
            Raudys and Young (2004), "Results in statistical discriminant analysis", equation 11 (known covariance).
        """
        share = min(
            1.0, 8 / self.block
        )  # effective draws per draw: a block has at least eight correlation times
        noise = self.dims * sum(1 / (size * share) for size in self.trained)

        def detected(bias: float) -> bool:
            accuracy = float(special.ndtr(bias**2 / 2 / np.sqrt(bias**2 + noise)))
            deviation = np.sqrt(
                accuracy * (1 - accuracy) * sum(1 / (4 * size * share) for size in self.sizes)
            )
            missed = special.ndtr((self.detectable - accuracy) / max(deviation, 1e-12))
            return bool(1 - missed ** len(self.accuracies["linear"]) >= _POWER)

        return Detectable(
            bias=smallest_detected(detected, 16.0),
            too_narrow=0.0,
            too_wide=float("inf"),
            power=_POWER,
            level=self.level,
            where="in one coordinate, by the linear classifier; only the network detects widths and correlations",
        )

    @property
    def passed(self) -> bool | None:
        """True if no difference was detected, False if one was."""
        return self.pvalue > self.level

    @property
    def verdict(self) -> str:
        """The verdict in one sentence, and the errors that could have been detected in another."""
        summary = (
            f"held-out accuracy {self.accuracy:.3f} (p = {self.pvalue:.2g}, {sum(self.sizes)} draws per fold)"
        )
        if self.pvalue <= self.level:
            return f"the draws differ in distribution: {summary}"
        return (
            f"no difference seen: {summary}; the critical accuracy in a fold is {self.detectable:.3f}. The check "
            f"{self.power}; a classifier that is too weak detects nothing"
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
        axes.axhline(self.detectable, color=ink(), linestyle=":", label="critical value")
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
    """Train a linear classifier and a small network to tell a from b, and test them on held-out draws.

    Whole chains are held out if there are as many chains as folds, otherwise segments of every chain, so that training
    and held-out draws are not correlated. Given the classifier, the permutation p-value of a fold is exact (with blocks
    of draws for chains). Folds and classifiers are combined by Bonferroni, since the folds share their training draws;
    so few folds with many held-out draws are best.

    Args:
        key: random key of initial weights, batches and permutations.
        a: draws: ``(n, d)`` independent, ``(chain, draw, d)``, or a tree with leaves (chain, draw, ...).
        b: draws of the other set, in any of these forms.
        folds: number of parts of the draws, each held out once.
        num_steps: steps of Adam, on batches of 256 draws of each set.
        num_permutations: number of permutations for each p-value.
        level: significance level of the verdict.

    Returns:
        The accuracies, p-values and verdict.

    Raises:
        TypeError: ``key`` is not a key, or the draws are not floating point.
        ValueError: ``collect_pair`` refuses the draws, there are fewer than two folds, folds are too small, or there
            are too few permutations.

    References:
        Lopez-Paz and Oquab (2017), "Revisiting classifier two-sample tests", section 3.
    """
    check_key(key)
    if folds < 2 or 2 * folds > level * (num_permutations + 1):
        raise ValueError(
            f"folds must be at least 2, and num_permutations at least {int(2 * folds / level)} for that many folds to "
            f"reach p = {level}; got {folds} and {num_permutations}"
        )
    pair = collect_pair(a, b, min_draws=20 * folds)
    rows = jnp.concatenate([draws.rows for draws in pair])
    mean, deviation = jnp.mean(rows, axis=0), jnp.std(rows, axis=0)
    standardized = tuple(draws._replace(values=(draws.values - mean) / deviation) for draws in pair)
    results = [
        _fold(jax.random.fold_in(key, fold), standardized, fold, folds, num_steps, num_permutations)
        for fold in range(folds)
    ]
    accuracies = {name: np.asarray([scores[name][0] for scores, _, _ in results]) for name in _CLASSIFIERS}
    pvalues = {name: np.asarray([scores[name][1] for scores, _, _ in results]) for name in _CLASSIFIERS}
    min_pvalue = min(float(values.min()) for values in pvalues.values())
    nulls = np.sort(np.concatenate([null for _, _, null in results]))
    held_out = results[0][1]
    return C2STReport(
        accuracy=max(float(values.mean()) for values in accuracies.values()),
        accuracies=accuracies,
        pvalues=pvalues,
        pvalue=min(1.0, 2 * folds * min_pvalue),
        sizes=held_out.sizes,
        block=held_out.block,
        detectable=float(np.quantile(nulls, 1 - level / (2 * folds), method="higher")),
        level=float(level),
        trained=(len(pair[0].rows) - held_out.sizes[0], len(pair[1].rows) - held_out.sizes[1]),
        dims=rows.shape[1],
    )


def _fold(
    key: PRNGKey, pair: tuple[FlatDraws, ...], fold: int, folds: int, num_steps: int, num_permutations: int
) -> tuple[dict[str, tuple[float, Any]], Pooled, np.ndarray]:
    """Return accuracy and p-value of every classifier in one fold, the held-out draws, and a null distribution."""
    train_key, label_key = jax.random.split(key)
    train, test = zip(*(_split(draws, fold, folds) for draws in pair), strict=True)
    held_out = pool(*test)
    labels = random_labels(label_key, held_out, num_permutations)
    scores: dict[str, tuple[float, Any]] = {}
    null = np.zeros(0)
    for name, hidden in _CLASSIFIERS.items():
        predicted_b = _train(train_key, *train, held_out.rows, hidden=hidden, num_steps=num_steps) > 0
        accuracies = np.asarray(_accuracies(predicted_b, labels))
        null = accuracies[1:]
        scores[name] = (float(accuracies[0]), pvalue(float(accuracies[0]), null))
    return scores, held_out, null


def _split(draws: FlatDraws, fold: int, folds: int) -> tuple[Array, FlatDraws]:
    """Return the rows to train on, and the held-out draws."""
    values = draws.values
    by_chain = values.shape[0] >= folds
    axis, count = (0, values.shape[0]) if by_chain else (1, values.shape[1])
    in_fold = np.arange(count) * folds // count == fold
    train, test = (jnp.compress(mask, values, axis=axis) for mask in (~in_fold, in_fold))
    return train.reshape(-1, values.shape[-1]), draws._replace(values=test)


@jax.jit
def _accuracies(predicted_b: Array, labels: Array) -> Array:
    """Compute the balanced accuracy for every labeling (true: of a)."""

    def accuracy(in_a: Array) -> Array:
        false_rate = jnp.sum(in_a & predicted_b) / jnp.sum(in_a)
        true_rate = jnp.sum(~in_a & predicted_b) / jnp.sum(~in_a)
        return (0.5 + 0.5 * (true_rate - false_rate)).astype(jnp.float32)

    # One labeling at a time: all of them as numbers would not fit into memory.
    return jax.lax.map(accuracy, labels)


@partial(jax.jit, static_argnames=("hidden", "num_steps"))
def _train(
    key: PRNGKey, a: Array, b: Array, rows: Array, *, hidden: tuple[int, ...], num_steps: int
) -> Array:
    """Return the logits of the rows under a classifier trained on a (0) and b (1), equally weighted."""
    init_key, batch_key = jax.random.split(key)
    graph, parameters = nnx.split(Classifier(a.shape[1], hidden, nnx.Rngs(init_key)))
    parameters = jax.tree.map(lambda leaf: leaf.astype(a.dtype), parameters)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, num_steps))

    def loss(parameters, batch_a, batch_b):
        model = nnx.merge(graph, parameters)
        return jnp.mean(jax.nn.softplus(model(batch_a))) + jnp.mean(jax.nn.softplus(-model(batch_b)))

    def step(state, key):
        parameters, moments = state
        batches = [
            draws[jax.random.randint(k, (min(256, len(draws)),), 0, len(draws))]
            for k, draws in zip(jax.random.split(key), (a, b), strict=True)
        ]
        updates, moments = optimizer.update(jax.grad(loss)(parameters, *batches), moments, parameters)
        return (optax.apply_updates(parameters, updates), moments), None

    initial = (parameters, optimizer.init(parameters))
    (parameters, _), _ = jax.lax.scan(step, initial, jax.random.split(batch_key, num_steps))
    return nnx.merge(graph, parameters)(rows)
