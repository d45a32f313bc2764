r"""Has a density a finite integral? Asked along lines, far from where it was sampled.

A density is improper if it cannot be integrated along a line, :math:`\int p(x + r v)\,dr = \infty`: if it falls there
no faster than :math:`1/r`. It is also improper if it falls no faster than :math:`r^{-d}` along a direction drawn at
random. So its logarithm is evaluated at distances that grow by factors of eight, over twelve orders of magnitude, and
its slope in :math:`\log r` read off at the far end: -1 or more (-d in a random direction) is improper. A Student-t with
:math:`\nu` degrees of freedom has :math:`-(\nu + 1)` along a line.

The lines: the coordinate axes, the directions in which the gradients at the given points have no component (exact
where data determine a sum and not its terms; followed as far as rounding allows), and the ways that the points went.

Where the far end overflows (an exponential of a log scale) it says nothing, and the density is improper only if it did
not fall at all over the last factor of eight before.

A far end that lies e^-60 below the points is no reason for anything that went wrong: transforms that clip what
underflows end in such a floor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from probinfer.core.algorithms import as_partial
from probinfer.core.status import Status
from probinfer.core.types import ArrayTree
from probinfer.inference import engine

__all__ = ["doubted", "improper"]

_FACTOR = 8.0
_RUNGS = 15
_END = 5  # rungs at the far end, 10^9 to 4 10^12, by which the slope is judged
_NEAR = 3  # rungs before an overflow without which nothing is said
_MOST_AXES = 16
_MOST_WAYS = 4
_RANDOM = 2
_BATCH = 32
_DEEP = 60.0  # nats below the points at which a far end does not matter, and what the limits fall by besides
_SLACK = 0.02  # of the slope
_SMALL = 0.05  # of the largest entry of a direction: not named


def improper(logdensity_fn: Callable, positions: ArrayTree, *, only_far: bool = False) -> str:
    """Say in words along which line the density has no finite integral; an empty text if none was found.

    A text is proof but for the arithmetic; an empty one proves nothing. A few hundred evaluations, and one program to
    compile: ask where a run looks as if it had no density to sample. Outside jit.

    Args:
        logdensity_fn: log density of one unconstrained position.
        positions: leaves (n, ...), places that the run has seen, far apart if possible.
        only_far: say nothing where the far end overflows.

    Returns:
        A clause for a message.
    """
    one = jax.tree.map(lambda leaf: leaf[0], positions)
    rows = np.asarray(jax.vmap(lambda position: ravel_pytree(position)[0])(positions))
    rows = rows[np.all(np.isfinite(rows), axis=1)]
    if not len(rows):
        return ""
    evaluate = _evaluator(logdensity_fn, one, rows.dtype)
    base, (lines, reaches, dimensions) = rows[0], _lines(evaluate, rows)
    seen = evaluate(rows[:_BATCH])[0]
    top = float(np.max(np.where(np.isnan(seen), -np.inf, seen)))
    lengths = np.maximum(1, np.maximum(np.abs(lines @ base), np.max(np.abs((rows - base) @ lines.T), axis=0)))
    steps = (
        lengths[:, None, None] * np.array([1, -1])[:, None] * _FACTOR ** np.arange(_RUNGS)
    )  # (line, sign, rung)
    with np.errstate(over="ignore", invalid="ignore"):
        points = base + steps[..., None] * lines[:, None, None]
    values = evaluate(points.reshape(-1, len(base)))[0].reshape(steps.shape)
    for line, reach, dimension, both, distances in zip(lines, reaches, dimensions, values, steps[:, 0]):
        for sign, column in zip((1, -1), both):
            if only_far and reach < _RUNGS:
                continue
            found = _verdict(column[:reach], top, distances, dimension, only_far)
            if found:
                return f"{found} along {_named(one, sign * line)}"
    return ""


def doubted(
    status: Any, logdensity_fn: Callable, positions: ArrayTree, *, prior: Any = None, always: bool = False
) -> tuple[Status, str]:
    """Return ``IMPROPER_DENSITY`` and words where that is why a run went wrong, else the status it had and no words.

    Args:
        status: of the run.
        logdensity_fn: log density of one unconstrained position.
        positions: leaves (n, ...), places that the run has seen.
        prior: of the target; one that is not None is normalized, and shows that the density can be integrated.
        always: doubt a run that is OK too.
    """
    ask = prior is None and (always or int(status) != Status.OK)
    found = improper(logdensity_fn, positions) if ask else ""
    return (Status.IMPROPER_DENSITY, found) if found else (Status(int(status)), "")


def _lines(evaluate: Callable, rows: np.ndarray) -> tuple[np.ndarray, list[int], list[int]]:
    """Directions (m, d), their largest entry one; how many rungs each is followed; dimensions that it speaks for."""
    dimension, generator = rows.shape[1], np.random.default_rng(0)
    num = min(2 * dimension, 64)
    near = rows[np.arange(num) % len(rows)]
    new = np.arange(num) >= len(rows)
    near = near + (1 + np.abs(near)) * generator.normal(size=near.shape) * (0.1 * new)[:, None]
    gradients = evaluate(near)[1].astype(float)
    gradients = gradients[np.all(np.isfinite(gradients), axis=1)]
    norms = np.sqrt(np.sum(gradients**2, axis=0))
    axes = [*np.eye(dimension)[np.argsort(norms)[:_MOST_AXES]]]
    without = []
    if len(gradients) >= dimension and np.all(norms > 0):
        without = [row / norms for row in np.linalg.svd(gradients / norms)[2][-2:]]
        # the axes are followed further by themselves
        without = [row for row in without if np.sum(np.abs(row) > _SMALL * np.max(np.abs(row))) > 1]
    ways = rows[:_MOST_WAYS] - np.mean(rows, axis=0)
    ways = [*ways[np.any(ways != 0, axis=1)]]
    drawn = [*generator.normal(size=(_RANDOM, dimension))]
    lines = [line / np.max(np.abs(line)) for line in (*axes, *without, *ways, *drawn)]
    within = (
        int(np.log(1e-2 / np.finfo(rows.dtype).eps) / np.log(_FACTOR)) + 1
    )  # a hundredth of what is across
    reaches = [_RUNGS] * len(axes) + [min(within, _RUNGS)] * len(without) + [_RUNGS] * len(ways + drawn)
    return np.stack(lines), reaches, [1] * (len(lines) - _RANDOM) + [dimension] * _RANDOM


def _evaluator(logdensity_fn: Callable, one: ArrayTree, dtype: Any) -> Callable:
    """A function of points (n, d) that returns log densities (n,) and gradients (n, d)."""
    fn = as_partial(logdensity_fn)

    def evaluate(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        missing = -len(points) % _BATCH
        padded = np.concatenate([points, np.repeat(points[-1:], missing, axis=0)]).astype(dtype)
        batches = [
            _values(fn, one, jnp.asarray(part)) for part in padded.reshape(-1, _BATCH, points.shape[1])
        ]
        values, gradients = (np.concatenate([np.asarray(pair[i]) for pair in batches]) for i in (0, 1))
        return values[: len(points)], gradients[: len(points)]

    return evaluate


@jax.jit
def _values(fn: Callable, one: ArrayTree, points: Any) -> tuple[Any, Any]:
    unravel = ravel_pytree(one)[1]
    return jax.lax.map(jax.value_and_grad(lambda flat: fn(unravel(flat))), points)


def _verdict(values: np.ndarray, top: float, distances: np.ndarray, dimension: int, only_far: bool) -> str:
    """What the log density does along half a line, if it cannot be integrated."""
    finite = np.isfinite(values)
    count = len(values) if finite.all() else int(np.argmin(finite))
    if count == len(values):
        fall = float(values[-1]) - float(values[-_END])
        limit = -(dimension + _SLACK) * np.log(_FACTOR) * (_END - 1)
        ends = distances[count - _END], distances[count - 1]
    elif only_far or dimension > 1 or count < _NEAR or finite[count:].any():
        return ""
    else:
        fall = float(values[count - 1]) - float(values[count - 2])
        limit = -64 * float(np.finfo(values.dtype).eps) * float(np.max(np.abs(values[:count])))
        ends = distances[count - 2], distances[count - 1]
    # what a tail of this power falls by on the way is allowed
    power = max(-fall, 0.0) / np.log(ends[1] / ends[0])
    if fall < limit or values[count - 1] < top - _DEEP - power * np.log(ends[1]):
        return ""
    changes = f"changes by only {fall:.3g}" if fall <= 0 else f"grows by {fall:.3g}"
    return f"from {ends[0]:.2g} to {ends[1]:.2g} away the log density {changes}"


def _named(one: ArrayTree, line: np.ndarray) -> str:
    """``a - 0.5 b[1]``, the largest terms first."""
    names = engine.coordinate_names(one)
    order = [i for i in np.argsort(-np.abs(line), kind="stable") if abs(line[i]) >= _SMALL]
    sizes = ["" if abs(line[i]) > 1 - _SMALL else f"{abs(line[i]):.2g} " for i in order]
    terms = [f"{'-' if line[i] < 0 else '+'} {size}{names[i]}" for i, size in zip(order, sizes)]
    text = " ".join(terms[:4]) + (f" and {len(terms) - 4} more" if len(terms) > 4 else "")
    return "-" + text[2:] if text[0] == "-" else text[2:]
