"""A posterior is draws with two leading axes, always: (chain, draw).

Particles and draws of a variational fit are one chain. Draws may carry log weights, and a log evidence where
the engine estimates one; whatever else the engine has to say is its ``info``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from probinfer import resampling
from probinfer.core.algorithms import as_partial
from probinfer.core.errors import close_matches
from probinfer.core.status import Status, with_named_status
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey, field, pytree
from probinfer.inference import arviz_export, summary
from probinfer.numerics import weights
from probinfer.targets.transforms import leaf_names

__all__ = ["Posterior"]


@pytree
class Posterior:
    """Draws from a posterior distribution.

    Attributes:
        draws: pytree of constrained values with leaves (chain, draw, ...).
        log_weights: (chain, draw), unnormalized over both axes together; None when all draws weigh the same.
        log_evidence: scalar estimate of the log normalizer, None where the engine gives none.
        info: the engine's own report, a NamedTuple with ``.status``, or None.
        unconstrained: the draws in unconstrained coordinates, leaves (chain, draw, ...), or None.

    Raises:
        ValueError: the leaves do not share their (chain, draw) axes, or ``log_weights`` is not (chain, draw).
    """

    draws: Any
    log_weights: Any = field(default=None)
    log_evidence: Any = field(default=None)
    info: Any = field(default=None)
    unconstrained: Any = field(default=None)

    def __post_init__(self):
        """Give the status its name, and check the leading axes of everything that has them."""
        object.__setattr__(self, "info", with_named_status(self.info))
        leading = _leading_axes(self.draws)
        if leading is None:
            return
        for name in ("draws", "unconstrained"):
            _check_leading(name, getattr(self, name), leading)
        shape = getattr(self.log_weights, "shape", leading)
        if shape != leading:
            raise ValueError(
                f"log_weights must have one entry a draw, shape (chain, draw) = {leading}, got {shape}"
                "; use None for equal weights"
            )

    def __repr__(self) -> str:
        """One line: the quantities, the size, the verdict."""
        leaves = jax.tree.leaves(self.draws)
        shapes = ["x".join(map(str, getattr(leaf, "shape", ())[2:])) for leaf in leaves]
        names = [n + (f"[{s}]" if s else "") for n, s in zip(leaf_names(self.draws), shapes)]
        more = f", {len(names) - 8} more" if len(names) > 8 else ""
        size = " x ".join(map(str, getattr(leaves[0], "shape", ())[:2])) if leaves else "no"
        weighted = "" if self.log_weights is None else " weighted"
        status = getattr(with_named_status(self.info), "status", None)
        verdict = f"; {status}" if isinstance(status, Status) else ""
        return f"Posterior({', '.join(names[:8])}{more}; {size}{weighted} draws{verdict})"

    def __getitem__(self, name: str) -> Any:
        """The draws of one quantity by its name (``posterior["mu"]``, ``posterior["kernel.variance"]``).

        Raises:
            KeyError: no quantity has this name.
        """
        if isinstance(self.draws, dict) and name in self.draws:
            return self.draws[name]
        found = dict(zip(leaf_names(self.draws), jax.tree.leaves(self.draws)))
        if name not in found:
            raise KeyError(f"no quantity is called {name!r}{close_matches(str(name), found)}")
        return found[name]

    @property
    def num_chains(self) -> int:
        """Number of chains."""
        return jax.tree.leaves(self.draws)[0].shape[0]

    @property
    def num_draws(self) -> int:
        """Number of draws of each chain."""
        return jax.tree.leaves(self.draws)[0].shape[1]

    def flat(self) -> ArrayTree:
        """Return the draws with leaves (chain * draw, ...); their weights are ``flat_log_weights()``."""
        return jax.tree.map(lambda leaf: jnp.reshape(leaf, (-1, *leaf.shape[2:])), self.draws)

    def flat_log_weights(self) -> Float[Array, " n"]:
        """Return normalized log weights (chain * draw,), in the order of ``flat()``; equal ones without weights."""
        if self.log_weights is not None:
            return weights.normalize(jnp.ravel(self.log_weights)).log_weights
        leaves = jax.tree.leaves(self.draws)
        floating = [leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        size = self.num_chains * self.num_draws
        return jnp.full(size, -jnp.log(size), floating[0] if floating else jnp.result_type(float))

    def resample(self, key: PRNGKey, num: int) -> ArrayTree:
        """Return ``num`` equally weighted draws, leaves (num, ...), in random order.

        Systematic resampling by the weights; without weights the draws are thinned or repeated evenly.

        Args:
            key: random key.
            num: how many draws; may exceed the number there are.

        Raises:
            ValueError: ``num`` is not positive.
        """
        key_resample, key_order = jax.random.split(key)
        ancestors, _ = resampling.systematic(key_resample, self.flat_log_weights(), num)
        ancestors = jax.random.permutation(key_order, ancestors)
        return jax.tree.map(lambda leaf: leaf[ancestors], self.flat())

    def expectation(self, fn: Callable[[Any], Any], *, batch_size: int | None = None) -> ArrayTree:
        r"""Return the posterior mean :math:`\sum_i W_i f(x_i)`.

        Args:
            fn: one draw (a pytree without the (chain, draw) axes) -> pytree of arrays. A function defined
                once is traced once.
            batch_size: draws evaluated together; None: one after another on a CPU, all together elsewhere.

        Returns:
            The mean with the structure of ``fn``'s result. Draws of weight zero do not count, whatever ``fn``
            makes of them; NaN if every weight is zero.
        """
        values = _evaluate(_argument(fn), (self.flat(),), batch_size)
        log_weights = self.flat_log_weights()
        return jax.tree.map(lambda value: weights.mean(log_weights, value), values)

    def predictive(
        self, key: PRNGKey, fn: Callable[..., Any], num: int | None = None, *, batch_size: int | None = None
    ) -> ArrayTree:
        """Return draws from the predictive distribution: ``fn(key, draw)`` for equally weighted draws.

        Args:
            key: random key.
            fn: (key, one draw) -> pytree of arrays, a simulated observation. A function defined once is
                traced once.
            num: how many; None: as many as there are draws.
            batch_size: draws evaluated together; None: one after another on a CPU, all together elsewhere.

        Returns:
            ``fn``'s results stacked: leaves (num, ...), all of equal weight. Without ``num`` and weights they
            are in the order of ``flat()``, otherwise in that of ``resample``.

        Raises:
            ValueError: ``num`` is not positive.
        """
        key_resample, key_simulate = jax.random.split(key)
        if num is None and self.log_weights is None:
            draws = self.flat()
        else:
            draws = self.resample(key_resample, self.num_chains * self.num_draws if num is None else num)
        keys = jax.random.split(key_simulate, jax.tree.leaves(draws)[0].shape[0])
        return _evaluate(_argument(fn), (keys, draws), batch_size)

    def summary(self) -> summary.Summary:
        """Return a table with a row for every scalar: mean, sd, quantiles, Monte Carlo error, ESS, R-hat."""
        return summary.summarize(self.draws, self.log_weights)

    def to_arviz(self, key: PRNGKey | None = None) -> Any:
        """Return the draws as ArviZ data: InferenceData (ArviZ below 1.0) or a DataTree (1.0 and above).

        ArviZ takes all draws for equally weighted. So weighted ones are resampled systematically: as many, in their
        order, copies side by side; the attribute ``resampled`` of the group ``posterior`` says so. The per-draw fields
        of ``info`` are in the group ``sample_stats``.

        Args:
            key: random key of the resampling; None: evenly spaced points, the same at every call.

        Raises:
            MissingExtraError: ArviZ is not installed.
            ValueError: every weight is zero, or one is not a number.
        """
        offset = 0.5 if key is None else float(jax.random.uniform(key))
        return arviz_export.export(self.draws, self.log_weights, self.info, self.log_evidence, offset=offset)


def _leading_axes(draws: Any) -> tuple[int, ...] | None:
    leaves = jax.tree.leaves(draws)
    if not leaves:
        raise ValueError("draws has no arrays: a posterior needs at least one quantity")
    shape = getattr(leaves[0], "shape", None)
    return None if shape is None else tuple(shape[:2])


def _check_leading(name: str, tree: Any, leading: tuple[int, ...]) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        shape = getattr(leaf, "shape", leading)
        if len(shape) < 2 or tuple(shape[:2]) != leading:
            where = name + jax.tree_util.keystr(path)
            raise ValueError(
                f"every leaf of {name} must have shape (chain, draw, ...) with (chain, draw) = {leading}, "
                f"got {where} of shape {tuple(shape)}; a single chain needs a leading axis of length 1"
            )


def _argument(fn: Callable) -> Callable:
    """Make a callable an argument of a jitted function: a registered one passes with its arrays as data."""
    return as_partial(fn)


@partial(jax.jit, static_argnames="batch_size")
def _evaluate(fn: Callable, arguments: tuple, batch_size: int | None) -> Any:
    """Map ``fn`` over the leading axis of its arguments."""
    if batch_size is None and jax.default_backend() != "cpu":
        return jax.vmap(fn)(*arguments)
    return jax.lax.map(lambda xs: fn(*xs), arguments, batch_size=batch_size)
