"""A Gaussian-process model is the pytree of its hyperparameters: kernel, likelihood and mean function."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.types import field, pytree
from probinfer.gp.model.likelihoods import Gaussian
from probinfer.gp.model.means import Zero

__all__ = ["Model", "cast"]


@pytree
class Model:
    """f ~ GP(mean, kernel), y_i | f ~ likelihood(f(x_i)).

    Every leaf is a hyperparameter; a tree of the same structure with NumPyro distributions at its leaves is a prior.

    Attributes:
        kernel: the covariance function, one of ``gp.kernels`` or any registered class with its methods.
        likelihood: one of ``gp.likelihoods``.
        mean: one of ``gp.means``.

    Raises:
        TypeError: a part does not have the methods that it needs.
    """

    kernel: Any
    likelihood: Any = field(default_factory=Gaussian)
    mean: Any = field(default_factory=Zero)

    def __post_init__(self):
        for name, methods in {
            "kernel": ("gram", "diag", "contract"),
            "likelihood": ("log_prob", "predictive"),
            "mean": ("__call__",),
        }.items():
            part = getattr(self, name)
            missing = [method for method in methods if not hasattr(part, method)]
            if missing or isinstance(part, type):
                hint = (
                    f"did you forget the parentheses in {part.__name__}()?" if isinstance(part, type) else ""
                )
                raise TypeError(
                    f"Model.{name} must have the methods {', '.join(methods)}; got {part!r}. "
                    f"{hint or f'Use one from gp.{name}s, or write a registered class with these methods.'}"
                )


def cast(tree: Any, dtype: Any) -> Any:
    """Give every floating-point leaf of a tree the dtype of the data, which sets the precision of all computations."""

    def leaf(value):
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating):
            return value.astype(dtype)
        return value

    return jax.tree.map(leaf, tree)
