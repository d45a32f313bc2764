"""Learned hyperparameters in the units of the data, labeled with the names of its columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro.distributions import Distribution, constraints

from probinfer import gp
from probinfer.core.types import Float
from probinfer.gp.model.leaves import constraint_of, get_leaf
from probinfer.kernels import ActiveDims, Periodic, Product, Scaled, Stationary, Warped

__all__ = ["Quantity", "interval", "learned_names", "most_relevant", "quantities"]

_MAX_DRAWS = 4000
# In ranges of the column: along a longer lengthscale, the function changes by less than a thousandth of its size.
_IRRELEVANT_LENGTHSCALE = 1000


class Quantity(NamedTuple):
    """One learned hyperparameter.

    Attributes:
        name: dotted name of the leaf, with an index for elements of vectors.
        label: description.
        unit: its unit, or "" for a dimensionless number.
        values: draws ``(S,)`` in this unit; one value for a point estimate.
        standardized: the same in the model's units (standard deviations of the data).
        positive: whether its support is positive.
        irrelevant: whether it is a lengthscale so long that its column does not change the prediction.
    """

    name: str
    label: str
    unit: str
    values: Float[np.ndarray, " S"]
    standardized: Float[np.ndarray, " S"]
    positive: bool
    irrelevant: bool = False


def learned_names(model: Any, prior: Any) -> tuple[str, ...]:
    """Return the dotted names of the learned hyperparameters: those with a distribution in the prior."""
    return tuple(name for name in gp.leaf_names(model) if isinstance(get_leaf(prior, name), Distribution))


def quantities(
    fit: Any,
    names: Sequence[str],
    features: Sequence[str],
    *,
    target: str = "y",
    parts: dict[str, str] | None = None,
) -> list[Quantity]:
    """Return the learned hyperparameters of a fit, one ``Quantity`` for each number.

    Args:
        fit: a ``gp.Fit``.
        names: names of the learned leaves.
        features: names of the input columns; units of lengthscales and periods.
        target: name of the output; unit of standard deviations.
        parts: names of the parts of the kernel by dotted prefix, such as ``{"kernel.terms.0": "trend"}``.
    """
    model = _first_model(fit)
    result = []
    for name in names:
        values = _draws(fit, name)
        positive = constraint_of(model, name) in (constraints.positive, constraints.nonnegative)
        columns = _columns(model, name, len(features))
        for index in np.ndindex(values.shape[1:]):
            element = values[(slice(None), *index)]
            feature = features[columns[index[0]]] if index and len(columns) > index[0] else None
            description, unit, in_units = _in_data_units(
                fit, model, name, element, index, columns, features, target
            )
            description = f"{description} of {feature}" if feature and len(features) > 1 else description
            part = _part(name, parts or {})
            suffix = f"[{','.join(map(str, index))}]" if index else ""
            is_lengthscale = description.startswith("lengthscale")
            result.append(
                Quantity(
                    name=name + suffix,
                    label=f"{part}: {description}" if part else description,
                    unit=unit,
                    values=in_units,
                    standardized=element,
                    positive=positive,
                    irrelevant=is_lengthscale and _is_irrelevant(fit, element, index, columns),
                )
            )
    return result


def _is_irrelevant(fit, values, index, columns):
    """Whether a lengthscale in the model's units is too long, compared with the range of its column or columns."""
    own_columns = [columns[index[0]]] if index and len(columns) > index[0] else list(columns)
    if not own_columns:
        return False
    ranges = np.ptp(np.asarray(fit.X)[:, own_columns], axis=0)
    return bool(np.median(values) > _IRRELEVANT_LENGTHSCALE * ranges.max())


def most_relevant(fit: Any, num: int) -> list[int]:
    """Return the columns with the shortest median lengthscales in standardized units, the shortest first.

    If the model does not have one lengthscale per column, return the first columns.
    """
    for name in gp.leaf_names(fit.models):
        values = _draws(fit, name)
        if name.endswith("lengthscale") and values.ndim == 2 and values.shape[1] == fit.X.shape[1]:
            return np.argsort(np.median(values, axis=0), kind="stable")[:num].tolist()
    return list(range(min(num, fit.X.shape[1])))


def _first_model(fit: Any) -> Any:
    """Return the model at the first of its hyperparameter values, for its structure."""
    return jax.tree.map(lambda leaf: leaf[0], fit.models)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the 5, 50 and 95 % quantiles, which are equal for a point estimate."""
    if len(values) == 1:
        return (float(values[0]),) * 3
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return float(low), float(middle), float(high)


def _draws(fit, name):
    """Return values ``(S, ...)`` in the model's units: all draws, thinned to at most ``_MAX_DRAWS``."""
    posterior = fit.posterior
    if posterior is None or posterior.log_weights is not None or name not in posterior.draws:
        return np.asarray(get_leaf(fit.models, name), np.float64)
    values = np.asarray(posterior.flat()[name], np.float64)
    return values[:: -(-len(values) // _MAX_DRAWS)]


def _in_data_units(fit, model, name, values, index, columns, features, target):
    """Return description, unit and values in that unit; the unit is "" for a dimensionless number."""
    last = name.rsplit(".", 1)[-1]
    owner = get_leaf(model, name.rsplit(".", 1)[0])
    y_scale = float(fit.scaling.y_scale)
    if name == "likelihood.variance":
        return "noise (sd)", target, np.sqrt(values) * y_scale
    if last == "variance" and isinstance(owner, (Stationary, Scaled)) and _is_term_variance(fit, name):
        return "size (sd)", target, np.sqrt(values) * y_scale
    if (
        last == "lengthscale" and isinstance(owner, Stationary) and not isinstance(owner, Periodic)
    ) or last == "period":
        column = columns[index[0]] if index else (columns[0] if len(columns) == 1 else None)
        if column is not None:
            # Maximum likelihood sends lengthscales of irrelevant columns to infinity.
            with np.errstate(over="ignore"):
                return last, features[column], values * float(np.asarray(fit.scaling.x_scale)[column])
        return last, "sd of the columns", values
    if last == "lengthscale" and isinstance(owner, Periodic):
        return "smoothness within a period", "", values
    return last, "", values


def _is_term_variance(fit, name):
    """Whether a variance is that of one additive term: all other factors of the term have variance one."""
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
    """Return the input columns that the kernel of a leaf depends on."""
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
