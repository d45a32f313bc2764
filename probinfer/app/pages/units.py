"""Learned hyperparameters as a person reads them: in the units of the data, with the names of its columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro.distributions import Distribution, constraints

from probinfer import gp
from probinfer.gp.model.leaves import constraint_of, get_leaf
from probinfer.kernels import ActiveDims, Periodic, Product, Scaled, Stationary, Warped

__all__ = ["Quantity", "learned_names", "most_relevant", "quantities", "spread"]

_MAX_DRAWS = 4000
_IDLE = 1000  # ranges of a column: the function changes by less than a thousandth of its size along it


class Quantity(NamedTuple):
    """One learned number.

    Attributes:
        name: dotted name of the leaf, with an index for vectors.
        label: what it is, in words.
        unit: its unit, or "" for a pure number.
        values: one value of a point estimate, else draws ``(S,)``, in that unit.
        standardized: the same in the model's units (standard deviations of the data).
        positive: whether it can only be positive.
        idle: whether it is a lengthscale so long that its column changes nothing.
    """

    name: str
    label: str
    unit: str
    values: np.ndarray
    standardized: np.ndarray
    positive: bool
    idle: bool = False


def learned_names(model: Any, prior: Any) -> tuple[str, ...]:
    """The dotted names of the hyperparameters that are learned: those with a distribution in the prior."""
    return tuple(name for name in gp.leaf_names(model) if isinstance(get_leaf(prior, name), Distribution))


def quantities(
    fit: Any,
    names: Sequence[str],
    features: Sequence[str],
    *,
    target: str = "y",
    parts: dict[str, str] | None = None,
) -> list[Quantity]:
    """The learned hyperparameters of a fit, one number each.

    Args:
        fit: a ``gp.Fit``.
        names: which leaves were learned.
        features: names of the input columns; units of lengthscales and periods.
        target: name of the output; unit of standard deviations.
        parts: words for parts of a kernel by dotted prefix, such as ``{"kernel.terms.0": "trend"}``.
    """
    model = _one(fit)
    found = []
    for name in names:
        values = _draws(fit, name)
        positive = constraint_of(model, name) in (constraints.positive, constraints.nonnegative)
        columns = _columns(model, name, len(features))
        for index in np.ndindex(values.shape[1:]):
            one = values[(slice(None), *index)]
            seen = features[columns[index[0]]] if index and len(columns) > index[0] else None
            word, unit, natural = _natural(fit, model, name, one, index, columns, features, target)
            word = f"{word} of {seen}" if seen and len(features) > 1 else word
            part = _part(name, parts or {})
            label = f"{part}: {word}" if part else word
            suffix = f"[{','.join(map(str, index))}]" if index else ""
            idle = word.startswith("lengthscale") and _is_idle(fit, one, index, columns)
            found.append(Quantity(name + suffix, label, unit, natural, one, positive, idle))
    return found


def _is_idle(fit, values, index, columns):
    """Whether a lengthscale in the model's units is beyond ``_IDLE`` times the range of its column or columns."""
    seen = [columns[index[0]]] if index and len(columns) > index[0] else list(columns)
    return bool(seen) and bool(np.median(values) > _IDLE * np.ptp(np.asarray(fit.X)[:, seen], axis=0).max())


def most_relevant(fit: Any, num: int) -> list[int]:
    """The columns with the shortest lengthscales in standard units (their medians over draws), the shortest first.

    A model without one lengthscale a column says nothing about relevance: then the first columns.
    """
    for name in gp.leaf_names(fit.models):
        values = _draws(fit, name)
        if name.endswith("lengthscale") and values.ndim == 2 and values.shape[1] == fit.X.shape[1]:
            return np.argsort(np.median(values, axis=0), kind="stable")[:num].tolist()
    return list(range(min(num, fit.X.shape[1])))


def _one(fit: Any) -> Any:
    """The model at the first of its hyperparameter values, for its structure."""
    return jax.tree.map(lambda leaf: leaf[0], fit.models)


def spread(values: np.ndarray) -> tuple[float, float, float]:
    """The 5, 50 and 95 % quantiles; three times the same for a point estimate."""
    if len(values) == 1:
        return (float(values[0]),) * 3
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return float(low), float(middle), float(high)


def _draws(fit, name):
    """Values ``(S, ...)`` in the model's units: all draws where there are not too many, else an even selection."""
    posterior = fit.posterior
    if posterior is None or posterior.log_weights is not None or name not in posterior.draws:
        return np.asarray(get_leaf(fit.models, name), np.float64)
    values = np.asarray(posterior.flat()[name], np.float64)
    return values[:: -(-len(values) // _MAX_DRAWS)]


def _natural(fit, model, name, values, index, columns, features, target):
    """Word, unit and values in that unit; a pure number where a unit has no meaning."""
    last = name.rsplit(".", 1)[-1]
    owner = get_leaf(model, name.rsplit(".", 1)[0])
    y_scale = float(fit.scaling.y_scale)
    if name == "likelihood.variance":
        return "noise (sd)", target, np.sqrt(values) * y_scale
    if last == "variance" and isinstance(owner, (Stationary, Scaled)) and _is_size(fit, name):
        return "size (sd)", target, np.sqrt(values) * y_scale
    if (
        last == "lengthscale" and isinstance(owner, Stationary) and not isinstance(owner, Periodic)
    ) or last == "period":
        column = columns[index[0]] if index else (columns[0] if len(columns) == 1 else None)
        if column is not None:
            with np.errstate(
                over="ignore"
            ):  # maximum likelihood sends lengthscales of idle columns to infinity
                return last, features[column], values * float(np.asarray(fit.scaling.x_scale)[column])
        return last, "sd of the columns", values
    if last == "lengthscale" and isinstance(owner, Periodic):
        return "smoothness within a period", "", values
    return last, "", values


def _is_size(fit, name):
    """Whether a variance is that of one term of the function: the factors beside it, if any, have variance one."""
    pieces = name.split(".")
    for depth in range(1, len(pieces) - 1):
        owner = get_leaf(fit.models, ".".join(pieces[:depth]))
        if isinstance(owner, (Scaled, Warped)):
            return False
        if isinstance(owner, Product):
            others = [factor for i, factor in enumerate(owner.factors) if str(i) != pieces[depth + 1]]
            if not all(
                isinstance(other, Stationary) and np.all(np.asarray(other.variance) == 1) for other in others
            ):
                return False
    return True


def _columns(model, name, num):
    """The input columns that the kernel of a leaf sees."""
    dims, pieces = tuple(range(num)), name.split(".")
    for depth in range(1, len(pieces)):
        owner = get_leaf(model, ".".join(pieces[:depth]))
        if isinstance(owner, ActiveDims):
            dims = tuple(dims[i] for i in owner.dims)
        elif isinstance(owner, Warped):
            return ()
    return dims


def _part(name, parts):
    matches = [prefix for prefix in parts if name == prefix or name.startswith(prefix + ".")]
    return parts[max(matches, key=len)] if matches else ""
