"""Potentials computed by Python on the host: a simulator, a verifier, a program of another language."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.binding import frozen
from probinfer.core.errors import ConvergenceWarning
from probinfer.core.types import Array, ArrayTree, field, pytree

__all__ = ["HostPotential", "host_potential"]


@pytree
class HostPotential:
    """A log potential of one particle that calls Python once per step, for all particles together.

    Attributes:
        fn: function of NumPy arrays; static, compared by what it depends on when the potential is made.
        timeout: seconds that a call may take, None: no limit; static.
    """

    fn: Callable = field(static=True)
    timeout: float | None = field(static=True, default=None)

    def __call__(self, x_previous: ArrayTree, x: ArrayTree, t: Any) -> Array:
        """Return the log potential of step t, a scalar; under ``vmap`` one call serves all particles."""
        result = jax.ShapeDtypeStruct((), jnp.result_type(float))
        return jax.pure_callback(self._evaluate, result, x_previous, x, t, vmap_method="broadcast_all")

    def _evaluate(self, x_previous: ArrayTree, x: ArrayTree, t: Any) -> np.ndarray:
        """Call ``fn`` with all batch axes flattened into one of particles."""
        steps = np.asarray(t)
        num_particles = steps.size

        def to_rows(leaf: Any) -> np.ndarray:
            leaf = np.asarray(leaf)
            return leaf.reshape(num_particles, *leaf.shape[steps.ndim :])

        step = int(steps.reshape(-1)[0])
        log_potentials = self._call_with_timeout(
            jax.tree.map(to_rows, x_previous), jax.tree.map(to_rows, x), step, num_particles
        )
        if log_potentials.shape != (num_particles,):
            raise ValueError(
                f"the host potential must return one number per particle, of shape ({num_particles},), got "
                f"{log_potentials.shape} at step {step}; it is called with all particles at once"
            )
        return log_potentials.astype(jnp.result_type(float)).reshape(steps.shape)

    def _call_with_timeout(
        self, x_previous: ArrayTree, x: ArrayTree, t: int, num_particles: int
    ) -> np.ndarray:
        """Call ``fn`` in a thread; return NaN for all particles if it does not return in time."""
        if self.timeout is None:
            return np.asarray(self.fn(x_previous, x, t))
        outcome: list = []
        thread = threading.Thread(target=_call, args=(outcome, self.fn, x_previous, x, t), daemon=True)
        thread.start()
        thread.join(self.timeout)
        if not outcome:
            warnings.warn(
                f"the host potential took longer than {self.timeout:g} s at step {t}: its {num_particles} log weights "
                f"are NaN, so that the run stops there with NON_FINITE and keeps the state before; allow more time, or "
                f"let the function stop by itself and return minus infinity for particles that it could not weigh",
                ConvergenceWarning,
                stacklevel=2,
            )
            return np.full(num_particles, np.nan)
        value, error = outcome[0]
        if error is not None:
            raise error
        return np.asarray(value)


def _call(outcome: list, fn: Callable, *args: Any) -> None:
    try:
        outcome.append((fn(*args), None))
    except BaseException as error:
        outcome.append((None, error))


def host_potential(fn: Any, *, timeout: Any = None) -> HostPotential:
    """Return a log potential for ``FeynmanKac`` that calls a Python function.

    The function is called once per step, with NumPy arrays of all particles. It must be a function of its arguments
    alone (it may be called again for the same step) and must not call JAX, which may be waiting for this call. An
    exception in it ends the run and is shown. A call that takes too long gives NaN weights: the run stops with the
    status ``NON_FINITE`` at that step and returns the state before it. Python cannot end a thread: a late call
    continues in the background and its result is dropped.

    Args:
        fn: ``fn(x_previous, x, t) -> (N,)`` log potentials; leaves (N, ...), t an int.
        timeout: seconds that one call may take; None: no limit.

    Returns:
        ``log_potential`` of a ``FeynmanKac``.

    Raises:
        TypeError: ``fn`` is not a function.
        ValueError: the timeout is not positive.
    """
    if not callable(fn):
        raise TypeError(f"a host potential is a function (x_previous, x, t) -> (N,), got {type(fn).__name__}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds or None, got {timeout!r}")
    return HostPotential(frozen(fn, on_host=True), timeout)
