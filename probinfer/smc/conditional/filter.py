"""The conditional particle filter: one path is given, the other particles are drawn conditionally on it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.arguments import check_key
from probinfer.core.types import ArrayTree, PRNGKey, strong_array
from probinfer.smc.filtering.filter import Result, as_adaptive, check_counts, check_store, to_result
from probinfer.smc.filtering.forward_pass import forward
from probinfer.smc.models.feynman_kac import BatchedFeynmanKac, FeynmanKac, as_batched

__all__ = ["check_reference", "check_suffix", "conditional_filter"]


def conditional_filter(
    key: PRNGKey,
    fk: FeynmanKac | BatchedFeynmanKac,
    reference: ArrayTree,
    num_particles: int,
    *,
    resampling: Any = "systematic",
    ess_threshold: Any = 0.5,
    ancestor_sampling: bool = False,
    store: str = "paths",
) -> Result:
    r"""Run a particle filter in which slot 0 follows the reference path and is weighed like the others.

    If the reference is a draw from the distribution of paths, so is a path chosen by the final weights, and
    :math:`E[1/\hat Z] = 1/Z`: the log evidence is then an upper bound in expectation, as that of
    ``particle_filter`` is a lower one.

    Args:
        key: random key.
        fk: the model, of one particle or batched.
        reference: the records of one path, leaves (T, ...); T is the number of steps.
        num_particles: N, the reference included; at least 1.
        resampling: name of a scheme that has a conditional form, or ``resampling.adaptive(scheme, trigger)``.
        ess_threshold: resample when the effective sample size is below this fraction of N.
        ancestor_sampling: draw at every step which particle the rest of the reference continues; requires
            ``log_transition`` (``log_suffix``).
        store: "paths", "ancestors" or "none", as for ``particle_filter``.

    Returns:
        The result; slot 0 ends in the last record of the reference.

    Raises:
        TypeError: as ``particle_filter``.
        ValueError: as ``particle_filter``; the reference does not have the shape of a path; the scheme has no
            conditional form; ancestor sampling without a transition density.

    References:
        Andrieu, Doucet and Holenstein (2010), section 4.3; Lindsten, Jordan and Schön (2014), ancestor sampling;
        Chopin and Singh (2015), conditional schemes other than the multinomial.
    """
    check_key(key)
    check_store(store)
    check_counts(num_particles=num_particles)
    model = as_batched(fk)
    reference = check_reference(model, reference)
    check_suffix(model, ancestor_sampling)
    adaptive = as_adaptive(resampling, ess_threshold).conditional()
    num_steps = jax.tree.leaves(reference)[0].shape[0]
    filter_trace = forward(
        key, model, adaptive, reference, num_steps, num_particles, store, ancestor_sampling
    )
    return to_result(filter_trace)


def check_suffix(model: BatchedFeynmanKac, ancestor_sampling: bool) -> None:
    """Check that ancestor sampling knows the density of a continuation.

    Raises:
        ValueError: the model has no ``log_suffix``.
    """
    if ancestor_sampling and model.log_suffix is None:
        raise ValueError(
            "ancestor and backward sampling need the density of a step: give log_transition (or log_suffix of a "
            "batched model), or switch them off with ancestor_sampling=False"
        )


def check_reference(
    model: BatchedFeynmanKac, reference: ArrayTree, num_steps: int | None = None
) -> ArrayTree:
    """Return the reference as strong arrays with the dtypes of the records.

    Args:
        model: the batched model.
        reference: records of one path, leaves (T, ...).
        num_steps: T; None: the length of the reference.

    Raises:
        ValueError: its structure or shapes are not those of T records.
        TypeError: its dtypes are not.
    """
    record = jax.eval_shape(lambda key: model.records(model.init(key, 1)[0]), jax.random.key(0))
    reference = jax.tree.map(lambda leaf: strong_array(jnp.asarray(leaf)), reference)
    leaves = jax.tree.leaves(reference)
    length = leaves[0].shape[:1] if leaves else ()
    expected_length = length if num_steps is None else (num_steps,)
    expected = jax.tree.map(lambda leaf: (*expected_length, *leaf.shape[1:]), record)
    actual = jax.tree.map(lambda leaf: leaf.shape, reference)
    if expected != actual or not length or length[0] < 1:
        raise ValueError(
            f"the reference must have one record per step, at least one: expected shapes {expected}, got {actual}; "
            f"a path of a result is jax.tree.map(lambda leaf: leaf[i], result.paths)"
        )
    expected, actual = (jax.tree.map(lambda leaf: str(leaf.dtype), tree) for tree in (record, reference))
    if expected != actual:
        raise TypeError(
            f"the reference must have the dtypes of the particles: expected {expected}, got {actual}"
        )
    return reference
