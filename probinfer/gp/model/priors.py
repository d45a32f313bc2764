"""Priors: trees of NumPyro distributions shaped like the model.

``default_prior`` gives one for every hyperparameter, for inputs and outputs of unit scale (to which ``fit``
standardizes; for inputs of another scale the lengthscales follow the spread of ``X``). Any leaf can be replaced: by
another distribution, by ``fixed`` (keep the model's value), or by a tie to another leaf.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints

from probinfer.gp.model.leaves import constraint_of, get_leaf, map_named, replace
from probinfer.gp.model.model import Model
from probinfer.gp.model.validation import check_inputs
from probinfer.kernels import ActiveDims, Warped

__all__ = ["Tied", "default_prior", "fixed", "tie"]


class _Fixed:
    """Marks a hyperparameter that keeps the model's value."""

    def __repr__(self):
        return "fixed"

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self


fixed = _Fixed()


class Tied:
    """Marks a hyperparameter that shares the value of another."""

    def __init__(self, source: str):
        self.source = source

    def __repr__(self):
        return f"Tied({self.source!r})"


def tie(prior: Any, source: str, *others: str) -> Any:
    """Share one hyperparameter: the ``others`` have the value of ``source``, which keeps its prior.

    Args:
        prior: a tree shaped like the model.
        source: dotted name of the learned leaf.
        *others: dotted names of the leaves that share its value; they must have its shape.

    Returns:
        The prior with the ties in it.

    Raises:
        KeyError: a name is not in the tree.
        ValueError: there is no other name, or ``source`` itself is fixed or tied.
    """
    if not others or source in others:
        raise ValueError(
            "tie needs the name of the learned leaf and at least one other name that shares its value"
        )
    if isinstance(get_leaf(prior, source), (_Fixed, Tied)):
        raise ValueError(
            f"{source} is {get_leaf(prior, source)!r}; tie the others to a leaf that has a distribution"
        )
    for name in others:
        get_leaf(prior, name)
    return replace(prior, {name: Tied(source) for name in others})


def default_prior(model: Model, X: Any) -> Any:
    """Weakly informative priors for data of unit scale.

    Lengthscales: LogNormal(√2 + ½ log D + log sd(x_d), √3), scaled with the dimension (Hvarfner, Hellsten and Nardi
    2024, eq. 6). Kernel variances: LogNormal(0, 2). Noise variance: LogNormal(−3, 2.5), 0.0004 to 7 in the central
    95 %; the scale of Student-t noise has the prior of its square root, LogNormal(−1.5, 1.25), and its degrees of
    freedom Gamma(2, 0.1) (Juárez and Steel 2010). Dispersion of counts: LogNormal(−1, 1.5). Period:
    LogNormal(log sd(x_d), 1.5). Other positive parameters LogNormal(0, 1), real ones Normal(0, 1), bounded ones
    uniform. A vector of known noise is fixed.

    Args:
        model: the model; only its structure and the shapes of its leaves matter.
        X: inputs ``(N, D)``, which set the unit of the lengthscales.

    Returns:
        A tree shaped like ``model`` with distributions at its leaves.

    Raises:
        ValueError: a hyperparameter has a constraint without a default; set its prior by ``gp.replace`` on a prior
            that was built without it.
    """
    X = np.asarray(check_inputs(X))
    spread = X.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    return map_named(lambda name, leaf: _default_distribution(model, name, np.shape(leaf), spread), model)


def _default_distribution(model, name, shape, spread):
    last = name.rsplit(".", 1)[-1]
    if name == "likelihood.noise":
        return fixed
    if name == "likelihood.variance":
        return _log_normal(-3.0, 2.5, shape)
    if name == "likelihood.scale":
        return _log_normal(-1.5, 1.25, shape)
    if name == "likelihood.dispersion":
        return _log_normal(-1.0, 1.5, shape)
    if name == "likelihood.df":
        return dist.Gamma(np.full(shape, 2.0), 0.1)
    if last == "variance":
        return _log_normal(0.0, 2.0, shape)
    if last in ("lengthscale", "period"):
        return _length_prior(last, model, name, shape, spread)
    return _by_constraint(constraint_of(model, name), name, shape)


def _length_prior(kind, model, name, shape, spread):
    spread = spread[_active_columns(model, name, len(spread))]
    # One value for several columns: their mean log spread
    loc = np.log(spread) if shape == spread.shape else np.full(shape, np.log(spread).mean())
    if kind == "period":
        return _log_normal(loc, 1.5, shape)
    return _log_normal(loc + math.sqrt(2) + 0.5 * math.log(len(spread)), math.sqrt(3), shape)


def _active_columns(model, name, num_columns):
    """The input columns of a leaf's kernel: those of the innermost restriction to some columns."""
    dims, parts = tuple(range(num_columns)), name.split(".")
    for depth in range(1, len(parts)):
        owner = get_leaf(model, ".".join(parts[:depth]))
        if isinstance(owner, ActiveDims):
            dims = tuple(dims[i] for i in owner.dims)
        elif isinstance(owner, Warped):
            return list(range(num_columns))  # lengthscales in the space of features, whose unit is unknown
    return list(dims)


def _by_constraint(constraint, name, shape):
    if constraint is constraints.positive or constraint is constraints.nonnegative:
        return _log_normal(0.0, 1.0, shape)
    if constraint is constraints.real:
        return dist.Normal(np.zeros(shape), 1.0)
    lower, upper = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    if lower is not None and upper is not None:
        return dist.Uniform(np.full(shape, float(lower)), float(upper))
    raise ValueError(f"no default prior for {name} with support {constraint}; set its prior yourself")


def _log_normal(loc, scale, shape):
    return dist.LogNormal(np.broadcast_to(np.asarray(loc, float), shape), scale)
