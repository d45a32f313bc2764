"""Standardization: the two affine maps between the user's units and those of the model."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from probinfer.core.types import pytree

__all__ = ["Scaling", "choose_scaling", "identity_scaling", "is_near_identity", "standardization"]

_NEAR_UNIT = 0.01  # of a mean from zero and of a standard deviation from one
_PRIOR_MESSAGE = (
    "the data are standardized, so the distributions of the prior are read in units of standard deviations of the "
    "data, while the values of the model, including fixed ones, are in the units of the data; pass standardize=True if "
    "all are in standard deviations, or standardize=False if data, prior and model are in the units of the data"
)


@pytree
class Scaling:
    """x ↦ (x − x_mean) / x_scale by column, y ↦ (y − y_mean) / y_scale.

    Attributes:
        x_mean: column means ``(D,)``.
        x_scale: column standard deviations ``(D,)``.
        y_mean: mean of the outputs; 0 if they have no unit.
        y_scale: standard deviation of the outputs; 1 if they have no unit.
    """

    x_mean: Any
    x_scale: Any
    y_mean: Any
    y_scale: Any

    def inputs(self, X: Any) -> Any:
        """Inputs in the model's units."""
        return (X - self.x_mean) / self.x_scale

    def outputs(self, y: Any) -> Any:
        """Outputs in the model's units."""
        return (y - self.y_mean) / self.y_scale


def identity_scaling(num_columns: int, dtype: Any) -> Scaling:
    """The identity maps."""
    return Scaling(
        x_mean=np.zeros(num_columns, dtype),
        x_scale=np.ones(num_columns, dtype),
        y_mean=np.zeros((), dtype),
        y_scale=np.ones((), dtype),
    )


def choose_scaling(standardize: Any, X: Any, y: Any, *, outputs: bool, has_prior: bool) -> Scaling:
    """Choose the maps that the ``standardize`` argument of ``gp.fit`` requests.

    Args:
        standardize: True: to zero mean and unit standard deviation; False: none; None: as True, with a warning if there
            is a prior whose units change.
        X: checked inputs ``(N, D)``.
        y: checked outputs ``(N,)``.
        outputs: whether the outputs have a unit.
        has_prior: whether the prior is the user's.

    Raises:
        TypeError: ``standardize`` is another object.
        ValueError: see ``standardization``; or squares of entries overflow.
    """
    if standardize is not None and not isinstance(standardize, (bool, np.bool_)):
        raise TypeError(f"standardize must be True, False or None, got {standardize!r}")
    if outputs:
        _check_range("y", np.abs(np.asarray(y)).max(), X.dtype)
    if standardize is not None and not standardize:
        _check_range("X", np.abs(np.asarray(X)).max(), X.dtype)
        return identity_scaling(X.shape[1], X.dtype)
    scaling = standardization(X, y, outputs=outputs)
    if standardize is None and has_prior and not is_near_identity(scaling):
        warnings.warn(_PRIOR_MESSAGE, stacklevel=3)
    return scaling


def is_near_identity(scaling: Scaling) -> bool:
    """Whether standardization leaves the data almost unchanged."""
    means = np.append(scaling.x_mean, scaling.y_mean)
    scales = np.append(scaling.x_scale, scaling.y_scale)
    return bool(np.all(np.abs(means) <= _NEAR_UNIT) and np.all(np.abs(scales - 1) <= _NEAR_UNIT))


def standardization(X: Any, y: Any, *, outputs: bool) -> Scaling:
    """The maps to zero mean and unit standard deviation.

    A constant column, from which nothing can be learned, is not scaled, and a warning names it.

    Args:
        X: checked inputs ``(N, D)``.
        y: checked outputs ``(N,)``.
        outputs: whether the outputs are real numbers with a unit (not classes or counts).

    Returns:
        The maps, in the dtype of the data.

    Raises:
        ValueError: there is only one point, all outputs are equal, or the dtype cannot represent the square of their
            standard deviation.
    """
    X, y = np.asarray(X), np.asarray(y)
    if len(X) < 2:
        raise ValueError("standardization needs at least 2 points; pass standardize=False for a single one")
    x_mean, x_scale = _moments(X)
    constant = np.flatnonzero(x_scale <= 1e-12 * np.maximum(np.abs(x_mean), 1e-300))
    if len(constant):
        warnings.warn(
            f"input columns {constant.tolist()} are constant: they carry no information and their lengthscales follow "
            "the prior; remove them",
            stacklevel=4,
        )
        x_scale[constant] = 1.0
    y_mean, y_scale = _moments(y) if outputs else (0.0, 1.0)
    if y_scale <= 1e-12 * max(abs(float(y_mean)), 1e-300):
        raise ValueError(
            f"y is {float(y_mean):g} at every point, so there is nothing to learn and no spread to standardize by; "
            "check that y is the right column, or pass standardize=False with a prior in the units of y"
        )
    if outputs:
        _check_range("y", y_scale, X.dtype, smallest=1.0)
    return Scaling(
        x_mean=np.asarray(x_mean, X.dtype),
        x_scale=np.asarray(x_scale, X.dtype),
        y_mean=np.asarray(y_mean, X.dtype),
        y_scale=np.asarray(y_scale, X.dtype),
    )


def _moments(values):
    """Mean and standard deviation over rows, without overflow for numbers of any size."""
    largest = np.abs(values).max(0).astype(np.float64)
    unit = np.where(largest > 0, largest, 1.0)
    scaled = values.astype(np.float64) / unit
    return scaled.mean(0) * unit, scaled.std(0) * unit


def _check_range(name, size, dtype, smallest=0.0):
    """Refuse numbers whose squares, which variances are, overflow or vanish or come within ε of that."""
    limits = np.finfo(dtype)
    low, high = (
        np.sqrt(float(limits.tiny) / float(limits.eps)),
        np.sqrt(float(limits.max) * float(limits.eps)),
    )
    if size > high or size < smallest * low:
        quantity = "a standard deviation" if smallest else "entries"
        alternative = "" if np.dtype(dtype) == np.float64 else ", or use float64"
        raise ValueError(
            f"{name} has {quantity} of size {size:.3g}; a fit needs squares, which {np.dtype(dtype)} represents for "
            f"sizes from {low:.0e} to {high:.0e}: change the unit, for example to {name} / {size:.0e}{alternative}"
        )
