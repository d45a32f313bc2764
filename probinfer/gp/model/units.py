"""Values that a user gives to a model, in the units of the data, as values of the model of standardised data.

A field says in its metadata which powers of the units of inputs and outputs it has. A value that is the default of its
field is none that was given: it stands for one standard deviation of the data. A period has no such default, because
the evidence has a maximum at every multiple of it.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np

from probinfer.core.types import strong_array
from probinfer.gp.model import means
from probinfer.gp.model.leaves import get_leaf, leaf_names, replace
from probinfer.gp.model.model import Model
from probinfer.gp.model.priors import fixed as fixed_mark
from probinfer.gp.model.scaling import Scaling, is_near_identity
from probinfer.kernels import ActiveDims, Linear, Polynomial, Product, Scaled, Sum, Warped

__all__ = ["convert", "in_model_units"]


def convert(model: Model, prior: Any, scaling: Scaling, standardize: bool | None) -> Model:
    """The model that is learned, from the one that a user gave.

    Args:
        model: what the user gave.
        prior: a tree shaped like it, for the leaves that are fixed.
        scaling: the maps between the user's units and those of the model.
        standardize: what the user said of units: with None the values are in those of the data, and what could not be
            converted is warned of; otherwise they are those of the model already, all but measured noise.
    """
    names = leaf_names(model)
    fixed = frozenset(name for name in names if _leaf(prior, name) is fixed_mark)
    converted, unknown = in_model_units(model, scaling, fixed)
    if standardize is not None:
        measured = {name: get_leaf(converted, name) for name in names if name == "likelihood.noise"}
        return replace(model, measured)
    if unknown and not is_near_identity(scaling):
        warnings.warn(
            f"the data are standardised, and the units of {', '.join(unknown)} cannot be converted: they are read in "
            "standard deviations of the data from their mean. Pass standardize=True if that is meant, or "
            "standardize=False to take the data in their own units",
            stacklevel=3,
        )
    return converted


def in_model_units(model: Model, scaling: Scaling, fixed: frozenset[str]) -> tuple[Model, list[str]]:
    """The model whose values are stated for the data, stated for the standardised data.

    Args:
        model: values in the units of the data.
        scaling: the maps between the units.
        fixed: dotted names of the leaves that are not learned: what they hold is always a value that was given.

    Returns:
        The model, and what has a unit that could not be converted, by dotted name.
    """
    walk = _Walk(scaling, fixed)
    walk.kernel(model.kernel, "kernel", np.asarray(scaling.x_scale, float), walk.outputs)
    walk.mean(model.mean, "mean")
    walk.fields(model.likelihood, "likelihood", None, walk.outputs)
    dtype = np.asarray(scaling.x_scale).dtype
    values = {name: strong_array(np.asarray(value, dtype)) for name, value in walk.converted.items()}
    return replace(model, values), sorted(walk.unknown)


class _Walk:
    """Collects the converted leaves of a model by name."""

    def __init__(self, scaling, fixed):
        self.fixed = fixed
        self.center = np.asarray(scaling.x_mean, float)
        self.scales = np.asarray(scaling.x_scale, float)
        self.level, self.outputs = float(scaling.y_mean), float(scaling.y_scale)
        self.converted: dict[str, np.ndarray] = {}
        self.unknown: set[str] = set()

    def kernel(self, kernel, name, scales, outputs):
        """``scales``: of the columns that the kernel sees, None where they are features of a warp."""
        if isinstance(kernel, Sum):
            for i, term in enumerate(kernel.terms):
                self.kernel(term, f"{name}.terms.{i}", scales, outputs)
        elif isinstance(kernel, Product):
            factors = [(factor, f"{name}.factors.{i}") for i, factor in enumerate(kernel.factors)]
            carrier = self._carrier([list(_amplitudes(*factor)) for factor in factors])
            for i, factor in enumerate(factors):
                self.kernel(*factor, scales, outputs if i == carrier else 1.0)
        elif isinstance(kernel, Scaled):
            inner = kernel.kernel, f"{name}.kernel"
            carrier = self._carrier([[(kernel, name, "variance")], list(_amplitudes(*inner))])
            self.fields(kernel, name, scales, outputs if carrier == 0 else 1.0, only="variance")
            self.kernel(*inner, scales, outputs if carrier == 1 else 1.0)
        elif isinstance(kernel, ActiveDims):
            known = scales is not None and max(kernel.dims) < len(scales)
            self.kernel(
                kernel.kernel, f"{name}.kernel", scales[list(kernel.dims)] if known else None, outputs
            )
        elif isinstance(kernel, Warped):
            self.unknown.add(f"{name}.fn")
            self.kernel(kernel.kernel, f"{name}.kernel", None, outputs)
        else:
            self.fields(kernel, name, scales, outputs)
            if isinstance(kernel, (Linear, Polynomial)) and np.any(self.center != 0):
                # Their origin is that of the inputs, which moves to the mean of the data.
                self.unknown |= {full for full in _names(kernel, name) if full in self.fixed}

    def _carrier(self, groups):
        """Which factor carries the unit of the variance: the first whose variance was given.

        Variances of 1 that are fixed beside one that is learned are pure numbers: only the product matters.
        """
        for i, group in enumerate(groups):
            if any(_differs(part, field) for part, _, field in group):
                return i
        all_fixed = all(f"{name}.{field}" in self.fixed for group in groups for _, name, field in group)
        return 0 if all_fixed else -1

    def mean(self, mean, name):
        if isinstance(mean, means.Constant):
            if self._is_given(mean, name, "value"):
                self.converted[f"{name}.value"] = (np.asarray(mean.value, float) - self.level) / self.outputs
        elif isinstance(mean, means.Linear):
            self._line(mean, name)
        else:
            self.fields(mean, name, self.scales, self.outputs)

    def _line(self, mean, name):
        """``a + bᵀx``: the slope per standard deviation, the intercept at the mean of the inputs."""
        self.fields(mean, name, self.scales, self.outputs, only="slope")
        if not self._is_given(mean, name, "intercept"):
            return
        if f"{name}.intercept" in self.fixed and f"{name}.slope" not in self.fixed and np.any(self.center):
            self.unknown.add(
                f"{name}.intercept"
            )  # fixed where the inputs are zero, while the slope is learned
        at_center = np.asarray(mean.intercept, float) + np.sum(np.asarray(mean.slope, float) * self.center)
        self.converted[f"{name}.intercept"] = (at_center - self.level) / self.outputs

    def fields(self, part, name, scales, outputs, only=None):
        """Convert the leaves of one registered class by the powers in the metadata of its fields."""
        if not dataclasses.is_dataclass(part):
            return
        for item in dataclasses.fields(part):
            if item.metadata.get("static") or only not in (None, item.name):
                continue
            full, units = f"{name}.{item.name}", item.metadata.get("units")
            if units is None:  # of a class that does not say
                self.unknown |= self.fixed & set(_names(getattr(part, item.name), full))
            elif self._is_given(part, name, item.name):
                powers = units(part) if callable(units) else units
                value = np.asarray(getattr(part, item.name), float)
                self._convert(full, value, powers, scales, outputs, not isinstance(part, Polynomial))

    def _convert(self, name, value, powers, scales, outputs, widens):
        of_inputs, of_outputs = powers
        value = value * outputs**-of_outputs
        if of_inputs:
            if scales is None or value.size not in (1, len(scales)):
                return  # lengths in the space of features, which the warp decides; or an error that is found later
            by_column = scales**-of_inputs
            shared = value.size == 1 and not np.allclose(by_column, by_column[0], rtol=1e-6)
            if value.size == 1 and not (shared and widens and name in self.fixed):
                if shared and name in self.fixed:
                    self.unknown.add(name)
                by_column = np.exp(np.mean(np.log(by_column)))  # a start: one length for all columns
            value = value * by_column
        self.converted[name] = value

    def _is_given(self, part, name, field):
        return f"{name}.{field}" in self.fixed or field == "period" or _differs(part, field)


def _leaf(prior, name):
    try:
        return get_leaf(prior, name)
    except KeyError:
        return None  # the prior has another structure, which is said where it is read


def _amplitudes(kernel, name):
    """The leaves of a kernel that have the unit of the outputs: class, name of the class, field."""
    if isinstance(kernel, Scaled):
        yield kernel, name, "variance"
    if isinstance(kernel, (Scaled, ActiveDims, Warped)):
        yield from _amplitudes(kernel.kernel, f"{name}.kernel")
    elif isinstance(kernel, (Sum, Product)):
        kind = "terms" if isinstance(kernel, Sum) else "factors"
        for i, part in enumerate(getattr(kernel, kind)):
            yield from _amplitudes(part, f"{name}.{kind}.{i}")
    elif dataclasses.is_dataclass(kernel):
        for item in dataclasses.fields(kernel):
            units = item.metadata.get("units")
            if units is not None and (units(kernel) if callable(units) else units)[1]:
                yield kernel, name, item.name


def _differs(part, field):
    """Whether a leaf is another value than the default of its field."""
    default = {item.name: item.default for item in dataclasses.fields(part)}[field]
    return default is dataclasses.MISSING or bool(np.any(np.asarray(getattr(part, field)) != default))


def _names(part, name):
    """The dotted names of the leaves of a part that is called ``name``."""
    return [f"{name}.{rest}" if rest else name for rest in leaf_names(part)]
