"""Kernels of transformed inputs: input warping, deep kernels."""

from __future__ import annotations

from typing import Any

import jax
from jax.tree_util import Partial

from probinfer.core.binding import frozen
from probinfer.core.types import Array, Float, Scalar, field, pytree
from probinfer.kernels.base import Kernel, check_inputs

__all__ = ["Warped"]


@pytree
class Warped(Kernel):
    """``k(fn(x), fn(z))`` for a map ``fn`` that may have parameters.

    ``fn`` maps a matrix (N, D) to (N, E), row by row. Its parameters are hyperparameters of the kernel: use a
    ``jax.tree_util.Partial`` of a module-level function over arrays, or a registered pytree with ``__call__``. A plain
    function has no parameters. Split a flax module first: ``graphdef, state = nnx.split(module)``, then
    ``Partial(apply, graphdef, state)`` with ``def apply(graphdef, state, X): return nnx.merge(graphdef, state)(X)``.

    References:
        Wilson, Hu, Salakhutdinov and Xing (2016), Deep kernel learning, equation 5.
    """

    kernel: Any = field()
    fn: Any = field()

    def __post_init__(self):
        if not callable(self.fn):
            raise TypeError(f"fn must be callable, got {type(self.fn).__name__}")
        if isinstance(self.fn, Partial):
            fn = Partial(frozen(self.fn.func), *self.fn.args, **self.fn.keywords)
        else:
            fn = Partial(frozen(self.fn)) if jax.tree_util.all_leaves([self.fn]) else self.fn
        object.__setattr__(
            self, "fn", fn
        )  # frozen: arrays that the function captures are not hyperparameters

    def evaluate(self, x: Float[Array, " D"], z: Float[Array, " D"]) -> Scalar:
        """``k(fn(x), fn(z))``."""
        return self.kernel.evaluate(self.fn(x[None])[0], self.fn(z[None])[0])

    def gram(self, X: Float[Array, "N D"], Z: Float[Array, "M D"] | None = None) -> Float[Array, "N M"]:
        """The gram of the transformed points."""
        check_inputs(X, Z)
        return self.kernel.gram(self.fn(X), None if Z is None else self.fn(Z))

    def diag(self, X: Float[Array, "N D"]) -> Float[Array, " N"]:
        """The diagonal at the transformed points."""
        return self.kernel.diag(self.fn(X))

    def contract(self, X: Float[Array, "N D"], G: Float[Array, "N N"]) -> tuple[Any, Float[Array, "N D"]]:
        """Pull the gradient with respect to the transformed points back through ``fn``."""
        features, pullback = jax.vjp(lambda fn, X: fn(X), self.fn, X)
        through_kernel, dfeatures = self.kernel.contract(features, G)
        through_fn, dX = pullback(dfeatures)
        structure = jax.tree.structure(self, is_leaf=lambda node: node is not self)
        return jax.tree.unflatten(structure, [through_kernel, through_fn]), dX
