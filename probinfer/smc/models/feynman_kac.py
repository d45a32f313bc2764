r"""The Feynman-Kac model: a Markov chain of particles and the potentials that weigh its steps.

.. math:: \gamma_t(x_{0:t}) = M_0(x_0)\,G_0(x_0)\prod_{s=1}^{t} M_s(x_{s-1}, x_s)\,G_s(x_{s-1}, x_s)

State-space models, tempering and language models with a reward are all of this form; the filter knows none of them.
``FeynmanKac`` describes one particle and is lifted by ``vmap``. ``BatchedFeynmanKac`` is what the engine runs: it
propagates and weighs all particles at once, so that they may share storage and change it in place.

References:
    Del Moral (2004), "Feynman-Kac Formulae"; Chopin and Papaspiliopoulos (2020), chapter 5.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.algorithms import as_partial
from probinfer.core.types import Array, ArrayTree, Float, Int, PRNGKey, pytree

__all__ = ["BatchedFeynmanKac", "FeynmanKac", "as_batched", "lift", "take"]


def take(particles: ArrayTree, ancestors: Int[Array, " k"]) -> ArrayTree:
    """Gather rows: particle j of the result is particle ``ancestors[j]``.

    Args:
        particles: tree of arrays with one leading axis of particles.
        ancestors: indices into that axis, as many as the result is to have.
    """
    return jax.tree.map(lambda leaf: leaf[ancestors], particles)


@pytree
class FeynmanKac:
    r"""One particle: :math:`x_0\sim M_0,\; x_t\sim M_t(x_{t-1},\cdot)`, weighed by :math:`G_t(x_{t-1}, x_t)`.

    Functions are compared by what they depend on when the model is built; the data they need are bound as arrays, by
    ``jax.tree_util.Partial(fn, data)`` or ``LogDensity(fn, data)``: new data of the same shape trace nothing.

    Attributes:
        init_sample: ``init_sample(key) -> x_0``, a tree of arrays.
        propagate: ``propagate(key, x, t) -> x_t`` given :math:`x_{t-1}` = x, t = 1 ... T-1.
        log_potential: ``log_potential(x_previous, x, t) -> ()``, t = 0 ... T-1; at t = 0 ``x_previous`` is x_0.
        log_transition: ``log_transition(x_previous, x, t) -> ()``, the log density of ``propagate``; required for
            ancestor and backward sampling, and by ``guided``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probinfer import smc
        >>> def init(key): return jax.random.normal(key)
        >>> def walk(key, x, t): return x + jax.random.normal(key)
        >>> def log_potential(y, x_previous, x, t): return -0.5 * (y[t] - x) ** 2
        >>> y = jnp.array([0.3, 1.0, 0.4])
        >>> fk = smc.FeynmanKac(init, walk, jax.tree_util.Partial(log_potential, y))
        >>> result = smc.particle_filter(jax.random.key(0), fk, 3, 100)
        >>> result.paths.shape
        (100, 3)
    """

    init_sample: Any
    propagate: Any
    log_potential: Any
    log_transition: Any = None

    def __init__(
        self,
        init_sample: Any,
        propagate: Any,
        log_potential: Any,
        log_transition: Any = None,
    ):
        functions = {"init_sample": init_sample, "propagate": propagate, "log_potential": log_potential}
        _set_functions(self, functions, {"log_transition": log_transition})


@pytree
class BatchedFeynmanKac:
    """All particles at once, the form that the engine runs.

    Attributes:
        init: ``init(key, num_particles, reference=None) -> (particles, log_weights (N,))``: step 0, weighed.
        extend: ``extend(key, particles, t, reference=None) -> (particles, log_weight_increments (N,))``,
            t = 1 ... T-1: potential and proposal correction together. The old particles may be donated. With a
            reference (one record, no particle axis) slot 0 takes that step instead of drawing it, and is weighed like
            the others.
        gather: ``gather(particles, ancestors (K,)) -> particles``: copies or moves rows, or changes pointers to pages.
            It is not called if every particle is its own ancestor.
        done: ``done(particles) -> (N,)`` booleans. A particle that is done keeps its weight, and ``extend`` must leave
            it as it is; the loop ends when all are done.
        record: ``record(particles) -> `` what a step adds to a path, leaves (N, ...): tokens, never a cache; ``None``:
            the particles. The particles of a model with its own ``record`` or ``gather`` are assumed to be too large
            to copy: the engine then never keeps two generations of them.
        log_suffix: ``log_suffix(particles, records, t) -> (N,)``: log density, potentials included, of the steps
            t ... T-1 of the reference ``records`` (leaves (T, ...)) after each particle, up to a constant common to
            all particles; required for ancestor and backward sampling.
    """

    init: Any
    extend: Any
    gather: Any
    done: Any
    record: Any
    log_suffix: Any

    def __init__(
        self,
        init: Any,
        extend: Any,
        gather: Any = take,
        done: Any = None,
        record: Any = None,
        log_suffix: Any = None,
    ):
        functions = {"init": init, "extend": extend, "gather": gather}
        _set_functions(self, functions, {"done": done, "record": record, "log_suffix": log_suffix})

    @property
    def copies_freely(self) -> bool:
        """Whether particles are plain rows and their own records, so that copies are cheap."""
        return self.record is None and self.gather.func is take

    def records(self, particles: ArrayTree) -> ArrayTree:
        """Return what the last step adds to each path, leaves (N, ...)."""
        return particles if self.record is None else self.record(particles)


def _set_functions(model: Any, functions: dict, optional: dict) -> None:
    for name, fn in (functions | optional).items():
        if fn is None and name in optional:
            object.__setattr__(model, name, None)
        elif callable(fn):
            object.__setattr__(model, name, as_partial(fn))
        else:
            raise TypeError(
                f"{name} of a {type(model).__name__} must be a function, got {type(fn).__name__}; bind data "
                f"to it with jax.tree_util.Partial(fn, data)"
            )


def as_batched(model: Any) -> BatchedFeynmanKac:
    """Return the batched form of either form.

    Raises:
        TypeError: it is neither a ``FeynmanKac`` nor a ``BatchedFeynmanKac``.
    """
    if isinstance(model, BatchedFeynmanKac):
        return model
    if isinstance(model, FeynmanKac):
        return lift(model)
    raise TypeError(
        f"expected a smc.FeynmanKac or a smc.BatchedFeynmanKac, got {type(model).__name__}; write the model as "
        f"smc.FeynmanKac(init_sample, propagate, log_potential)"
    )


def lift(fk: FeynmanKac) -> BatchedFeynmanKac:
    """Return the batched form of a one-particle model, by ``vmap`` over particles.

    Each particle has its own key. ``log_suffix`` is defined if ``log_transition`` is.

    Args:
        fk: the model of one particle.
    """
    bind = jax.tree_util.Partial
    log_suffix = None if fk.log_transition is None else bind(_lifted_log_suffix, fk)
    return BatchedFeynmanKac(bind(_lifted_init, fk), bind(_lifted_extend, fk), log_suffix=log_suffix)


def _lifted_init(fk: FeynmanKac, key: PRNGKey, num_particles: int, reference: ArrayTree = None) -> tuple:
    particles = jax.vmap(fk.init_sample)(jax.random.split(key, num_particles))
    particles = insert_reference(particles, reference)
    log_potential = jax.vmap(fk.log_potential, (0, 0, None))
    return particles, log_potential(particles, particles, jnp.int32(0))


def _lifted_extend(
    fk: FeynmanKac, key: PRNGKey, particles: ArrayTree, t: Array, reference: ArrayTree = None
) -> tuple:
    keys = jax.random.split(key, jax.tree.leaves(particles)[0].shape[0])
    propagated = jax.vmap(fk.propagate, (0, 0, None))(keys, particles, t)
    propagated = insert_reference(propagated, reference)
    return propagated, jax.vmap(fk.log_potential, (0, 0, None))(particles, propagated, t)


def _lifted_log_suffix(
    fk: FeynmanKac, particles: ArrayTree, records: ArrayTree, t: Int[Array, ""]
) -> Float[Array, " n"]:
    """Return log M_t + log G_t: in a Markov chain no later step depends on the particle."""
    record = jax.tree.map(lambda leaf: leaf[t], records)
    log_transition = jax.vmap(fk.log_transition, (0, None, None))(particles, record, t)
    return log_transition + jax.vmap(fk.log_potential, (0, None, None))(particles, record, t)


def insert_reference(particles: ArrayTree, reference: ArrayTree) -> ArrayTree:
    """Put the reference into slot 0; return the particles as they are if it is None."""
    if reference is None:
        return particles
    return jax.tree.map(lambda leaf, row: leaf.at[0].set(row), particles, reference)
