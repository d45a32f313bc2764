"""What an engine is, and what every engine does at its boundary.

An engine is a frozen configuration with ``sample(key, target) -> Posterior``. It checks its arguments here, samples in
unconstrained space in the default float dtype, and hands its draws back through ``finish``: constrained, in the dtype
of the target, with (chain, draw) first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from probinfer.core.algorithms import as_partial
from probinfer.core.arguments import check_key
from probinfer.core.errors import ConvergenceWarning, advice, levels_to_caller
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Float, PRNGKey
from probinfer.inference.posterior import Posterior
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.history import History
from probinfer.targets import Target
from probinfer.targets.transforms import leaf_names

__all__ = [
    "Engine",
    "chains_first",
    "check_target",
    "coordinate_names",
    "exact_logdensity",
    "finish",
    "flat_position",
    "interrupted_part",
    "notice",
    "to_default_dtype",
    "warn",
    "was_interrupted",
]


@runtime_checkable
class Engine(Protocol):
    """Anything with ``sample``: a configuration that turns a target into a posterior."""

    def sample(
        self,
        key: PRNGKey,
        target: Any,
        *,
        progress: bool | str | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Draw from the target. The members document what differs.

        Args:
            key: one typed random key.
            target: a ``Target``, exact unless the engine says otherwise, or what the engine is made for.
            progress: show a bar; ``None``: if the error stream is a terminal.
            checkpoint: where to keep checkpoints. The same call made again continues from the last one and returns the
                same draws.

        Returns:
            Draws in the constrained space and the dtypes of the target, with leading axes (chain, draw), and the
            engine's report as ``info``.

        Raises:
            TypeError: not a key, not a target, or a target that the engine is not made for.
            NumericalError: there are no draws that could be used; the message says why and what to do.
            ValueError: the checkpoint belongs to another run.

        Warns:
            ConvergenceWarning: the draws are not to be trusted yet, or Ctrl-C ended the run early.
        """
        ...


def check_target(key: Any, target: Any, name: str) -> None:
    """Refuse what no exact engine can work with.

    Args:
        key: should be one typed random key.
        target: should be a ``Target`` with an exact log density.
        name: of the engine, for the message.

    Raises:
        TypeError: not a key, not a target, or a target that estimates its density from minibatches.
    """
    check_key(key)
    if not isinstance(target, Target):
        raise TypeError(
            f"{name} needs a Target, got {type(target).__name__}; make one with targets.from_numpyro(model, *data) or "
            "targets.from_logdensity(logdensity_fn, example)"
        )
    if target.stochastic:
        raise TypeError(
            f"{name} needs the exact log density, but this target estimates it from minibatches; build the target "
            "from the whole data with targets.from_logdensity or targets.from_numpyro"
        )


def exact_logdensity(target: Target, position: ArrayTree) -> jax.tree_util.Partial:
    """Return the log density as a function of positions in the default float dtype.

    Args:
        target: the target.
        position: one position (or several) in the dtype of the target.

    Returns:
        The target's own function where the dtypes agree, otherwise one that converts on the way in and out.
    """
    dtypes = jax.tree.map(jnp.result_type, position)
    fn = as_partial(target.logdensity_fn)
    if all(dtype == jnp.result_type(float) for dtype in jax.tree.leaves(dtypes)):
        return fn
    return jax.tree_util.Partial(_converted, fn, jax.tree.map(lambda dtype: jnp.zeros(0, dtype), dtypes))


def _converted(fn: Callable, like: ArrayTree, position: ArrayTree) -> Array:
    value = fn(jax.tree.map(lambda x, empty: x.astype(empty.dtype), position, like))
    return value.astype(jnp.result_type(float))


def to_default_dtype(position: ArrayTree) -> ArrayTree:
    """Convert the leaves to the default float dtype."""
    dtype = jnp.result_type(float)
    return jax.tree.map(lambda x: x if x.dtype == dtype else jnp.asarray(x, dtype), position)


def coordinate_names(position: ArrayTree) -> list[str]:
    """Return one name a coordinate of the flattened position, such as ``weights[3]``."""
    names: list[str] = []
    for name, leaf in zip(leaf_names(position), jax.tree.leaves(position), strict=True):
        shape = jnp.shape(leaf)
        names += [name] if not shape else [f"{name}[{i}]" for i in range(leaf.size)]
    return names


def finish(target: Target, positions: ArrayTree, like: ArrayTree, info: Any, **fields: Any) -> Posterior:
    """Return the posterior of unconstrained positions.

    Args:
        target: the target.
        positions: leaves (chain, draw, ...).
        like: a tree of the dtypes that the target works in.
        info: the engine's report.
        **fields: further fields of the posterior.
    """
    positions = jax.tree.map(lambda x, y: x if x.dtype == y.dtype else x.astype(y.dtype), positions, like)
    return Posterior(_constrain(target, positions), info=info, unconstrained=positions, **fields)


@jax.jit
def _constrain(target: Target, positions: ArrayTree) -> ArrayTree:
    return jax.lax.map(jax.vmap(target.constrain), positions)


def warn(status: Status | int | Array, details: str, name: str, advised: str = "") -> None:
    """Warn that a result is not to be trusted; an ``OK`` status says nothing.

    Args:
        status: of the result.
        details: what was found, a clause.
        name: of the engine.
        advised: what to do, in the engine's own settings; empty: the general advice for the status.
    """
    if int(status) != Status.OK:
        message = f"{name}: {details}; {advised or advice(int(status))}"
        warnings.warn(message, ConvergenceWarning, stacklevel=levels_to_caller())


def notice(details: str, name: str) -> None:
    """Say what a user should know of a result that is right.

    Args:
        details: a sentence.
        name: of the engine.
    """
    warnings.warn(f"{name}: {details}", UserWarning, stacklevel=levels_to_caller())


def was_interrupted(history: History) -> bool:
    """Refuse a run that left nothing to use; say whether it is a part of what was asked (Ctrl-C).

    Args:
        history: of the run that makes draws.

    Raises:
        NumericalError: the run stopped at a non-finite state.
        Interrupted: Ctrl-C before the first record.
    """
    if history.interrupted and int(history.num_records):
        return True
    history.check()
    return False


def interrupted_part(found: str, status: Status | int | Array, details: str = "") -> tuple[Status, str]:
    """Return status and details of a result that Ctrl-C left unfinished.

    Args:
        found: how much there is, a clause.
        status: of what there is.
        details: what was found of it, a clause.
    """
    return max(Status(int(status)), Status.INTERRUPTED), f"{found}; {details}" if details else found


@jax.jit
def chains_first(records: ArrayTree) -> ArrayTree:
    """Turn leaves (draw, chain, ...) into (chain, draw, ...)."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), records)


@jax.jit
def flat_position(positions: ArrayTree) -> Float[Array, "chain draw d"]:
    """Return one row a draw."""
    leaves = jax.tree.leaves(positions)
    return jnp.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=2)
