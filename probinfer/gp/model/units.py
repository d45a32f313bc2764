"""Conversion of a user's model, in the units of the data, to the model of standardized data.

The metadata of a field state which powers of the units of inputs and outputs it has. A value that equals the default of
its field was not set by the user: it stands for one standard deviation of the data. A period has no such default,
because the evidence has a maximum at every multiple of it.
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
    """Convert a user's model to the model that is learned.

    Args:
        model: the user's model.
        prior: a tree shaped like it, which marks the fixed leaves.
        scaling: the maps between the user's units and those of the model.
        standardize: the user's setting: with None the values are in the units of the data, and a warning names what
            could not be converted; otherwise all but measured noise are in those of the model already.
    """
    names = leaf_names(model)
    fixed = frozenset(name for name in names if _get_leaf_or_none(prior, name) is fixed_mark)
    converted, unknown = in_model_units(model, scaling, fixed)
    if standardize is not None:
        measured = {name: get_leaf(converted, name) for name in names if name == "likelihood.noise"}
        return replace(model, measured)
    if unknown and not is_near_identity(scaling):
        warnings.warn(
            f"the data are standardized, and the units of {', '.join(unknown)} cannot be converted: they are read in "
            "standard deviations of the data from their mean. Pass standardize=True if that is intended, or "
            "standardize=False to use the data in their own units",
            stacklevel=3,
        )
    return converted


def in_model_units(model: Model, scaling: Scaling, fixed: frozenset[str]) -> tuple[Model, list[str]]:
    """Convert the values of a model from the units of the data to those of the standardized data.

    Args:
        model: values in the units of the data.
        scaling: the maps between the units.
        fixed: dotted names of the leaves that are not learned, whose values always count as set by the user.

    Returns:
        The model, and the dotted names of all that has a unit that could not be converted.
    """
    converter = _Converter(scaling, fixed)
    converter.convert_kernel(
        model.kernel, "kernel", np.asarray(scaling.x_scale, float), converter.output_scale
    )
    converter.convert_mean(model.mean, "mean")
    converter.convert_fields(model.likelihood, "likelihood", None, converter.output_scale)
    dtype = np.asarray(scaling.x_scale).dtype
    values = {name: strong_array(np.asarray(value, dtype)) for name, value in converter.converted.items()}
    return replace(model, values), sorted(converter.unknown)


class _Converter:
    """Collects the converted leaves of a model by name."""

    def __init__(self, scaling, fixed):
        self.fixed = fixed
        self.input_mean = np.asarray(scaling.x_mean, float)
        self.input_scales = np.asarray(scaling.x_scale, float)
        self.output_mean, self.output_scale = float(scaling.y_mean), float(scaling.y_scale)
        self.converted: dict[str, np.ndarray] = {}
        self.unknown: set[str] = set()

    def convert_kernel(self, kernel, name, input_scales, output_scale):
        """``input_scales`` are those of the columns of the kernel; None if these are features of a warp."""
        if isinstance(kernel, Sum):
            for i, term in enumerate(kernel.terms):
                self.convert_kernel(term, f"{name}.terms.{i}", input_scales, output_scale)
        elif isinstance(kernel, Product):
            factors = [(factor, f"{name}.factors.{i}") for i, factor in enumerate(kernel.factors)]
            carrier = self._unit_carrier([list(_amplitudes(*factor)) for factor in factors])
            for i, factor in enumerate(factors):
                self.convert_kernel(*factor, input_scales, output_scale if i == carrier else 1.0)
        elif isinstance(kernel, Scaled):
            inner = kernel.kernel, f"{name}.kernel"
            carrier = self._unit_carrier([[(kernel, name, "variance")], list(_amplitudes(*inner))])
            scale = output_scale if carrier == 0 else 1.0
            self.convert_fields(kernel, name, input_scales, scale, only="variance")
            self.convert_kernel(*inner, input_scales, output_scale if carrier == 1 else 1.0)
        elif isinstance(kernel, ActiveDims):
            has_scales = input_scales is not None and max(kernel.dims) < len(input_scales)
            active_scales = input_scales[list(kernel.dims)] if has_scales else None
            self.convert_kernel(kernel.kernel, f"{name}.kernel", active_scales, output_scale)
        elif isinstance(kernel, Warped):
            self.unknown.add(f"{name}.fn")
            self.convert_kernel(kernel.kernel, f"{name}.kernel", None, output_scale)
        else:
            self.convert_fields(kernel, name, input_scales, output_scale)
            if isinstance(kernel, (Linear, Polynomial)) and np.any(self.input_mean != 0):
                # Their origin is that of the inputs, which moves to the mean of the data.
                self.unknown |= {full for full in _names(kernel, name) if full in self.fixed}

    def _unit_carrier(self, groups):
        """The index of the factor whose variance has the unit of the product: the first that the user set.

        Fixed variances of 1 in a product with a learned one are pure numbers, since only the product matters.
        """
        for i, group in enumerate(groups):
            if any(_differs(part, field) for part, _, field in group):
                return i
        all_fixed = all(f"{name}.{field}" in self.fixed for group in groups for _, name, field in group)
        return 0 if all_fixed else -1

    def convert_mean(self, mean, name):
        if isinstance(mean, means.Constant):
            if self._is_set(mean, name, "value"):
                value = np.asarray(mean.value, float)
                self.converted[f"{name}.value"] = (value - self.output_mean) / self.output_scale
        elif isinstance(mean, means.Linear):
            self._convert_linear_mean(mean, name)
        else:
            self.convert_fields(mean, name, self.input_scales, self.output_scale)

    def _convert_linear_mean(self, mean, name):
        """``a + bᵀx``: the slope per standard deviation, the intercept at the mean of the inputs."""
        self.convert_fields(mean, name, self.input_scales, self.output_scale, only="slope")
        if not self._is_set(mean, name, "intercept"):
            return
        # An intercept that is fixed at x = 0 is not fixed at the mean of the inputs if the slope is learned.
        is_slope_learned = f"{name}.slope" not in self.fixed
        if f"{name}.intercept" in self.fixed and is_slope_learned and np.any(self.input_mean):
            self.unknown.add(f"{name}.intercept")
        slope = np.asarray(mean.slope, float)
        at_input_mean = np.asarray(mean.intercept, float) + np.sum(slope * self.input_mean)
        self.converted[f"{name}.intercept"] = (at_input_mean - self.output_mean) / self.output_scale

    def convert_fields(self, part, name, input_scales, output_scale, only=None):
        """Convert the leaves of one registered class by the powers in the metadata of its fields."""
        if not dataclasses.is_dataclass(part):
            return
        for item in dataclasses.fields(part):
            if item.metadata.get("static") or only not in (None, item.name):
                continue
            full, units = f"{name}.{item.name}", item.metadata.get("units")
            if units is None:  # of a class that does not state them
                self.unknown |= self.fixed & set(_names(getattr(part, item.name), full))
            elif self._is_set(part, name, item.name):
                powers = units(part) if callable(units) else units
                value = np.asarray(getattr(part, item.name), float)
                can_expand = not isinstance(part, Polynomial)
                self._convert_value(full, value, powers, input_scales, output_scale, can_expand)

    def _convert_value(self, name, value, powers, input_scales, output_scale, can_expand):
        """``can_expand``: whether the field may have one value per column in place of a scalar."""
        input_power, output_power = powers
        value = value * output_scale**-output_power
        if input_power:
            if input_scales is None or value.size not in (1, len(input_scales)):
                return  # lengths in the space of features, whose unit the warp decides; or an error reported later
            factors = input_scales**-input_power
            is_shared = value.size == 1 and not np.allclose(factors, factors[0], rtol=1e-6)
            if value.size == 1 and not (is_shared and can_expand and name in self.fixed):
                if is_shared and name in self.fixed:
                    self.unknown.add(name)
                factors = np.exp(np.mean(np.log(factors)))  # an initial value: one length for all columns
            value = value * factors
        self.converted[name] = value

    def _is_set(self, part, name, field):
        """Whether the user set a value: it is fixed, differs from its default, or has no default."""
        return f"{name}.{field}" in self.fixed or field == "period" or _differs(part, field)


def _get_leaf_or_none(prior, name):
    try:
        return get_leaf(prior, name)
    except KeyError:
        return None  # the prior has another structure, which ``free_hyperparameters`` reports


def _amplitudes(kernel, name):
    """The leaves of a kernel with the unit of the outputs: class, name of the class, field."""
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
    """Whether the value of a leaf differs from the default of its field."""
    default = {item.name: item.default for item in dataclasses.fields(part)}[field]
    return default is dataclasses.MISSING or bool(np.any(np.asarray(getattr(part, field)) != default))


def _names(part, name):
    """The dotted names of the leaves of a part with dotted name ``name``."""
    return [f"{name}.{rest}" if rest else name for rest in leaf_names(part)]
