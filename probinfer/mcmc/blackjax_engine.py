"""Any blackjax sampling algorithm as an engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from probinfer.core.algorithms import algorithm as make_algorithm
from probinfer.core.binding import Held, hold
from probinfer.core.status import Status
from probinfer.core.trees import map_or_vmap
from probinfer.core.types import PRNGKey, field, pytree
from probinfer.inference import engine, tails
from probinfer.inference.posterior import Posterior
from probinfer.mcmc import report
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.driver import run as run_loop
from probinfer.targets import Target

__all__ = ["Blackjax"]


@pytree
class Blackjax:
    """Run a blackjax ``SamplingAlgorithm`` on a target.

    Args:
        algorithm: ``fn(logdensity_fn) -> SamplingAlgorithm``, for example ``lambda f: blackjax.rmh(f, proposal)``, or
            a ``SamplingAlgorithm`` on the target's unconstrained log density. Its states have a ``position``. A
            function defined once is traced once.
        num_discard: number of first draws of every chain that are discarded; the algorithm does not learn from them.
        num_draws: draws per chain that are returned.
        num_chains: number of chains.
        mode: chains one after another (``"map"``), vectorized (``"vmap"``), or as suits the device (``"auto"``).
    """

    algorithm: Any = field(static=True)
    num_discard: int = field(static=True, default=0)
    num_draws: int = field(static=True, default=1000)
    num_chains: int = field(static=True, default=4)
    mode: str = field(static=True, default="auto")

    def sample(
        self,
        key: PRNGKey,
        target: Target,
        *,
        progress: bool | str | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Draw from an exact target.

        Returns:
            The posterior; its ``info`` is a :class:`~probinfer.mcmc.BlackjaxInfo`.

        Raises:
            TypeError: a minibatch target, or states without a ``position``.
            NumericalError: no finite starting point, or a chain became non-finite.

        Warns:
            ConvergenceWarning: the chains disagree or have too few effective draws, or the density is improper; or
                Ctrl-C ended the run early.
        """
        engine.check_target(key, target, "Blackjax")
        # Start
        key_target, key_init, key_run = jax.random.split(key, 3)
        initial_positions = target.init(key_target, self.num_chains)
        logdensity_fn = engine.exact_logdensity(target, initial_positions)
        chains = _BlackjaxChains(hold(self.algorithm), self.mode)
        algorithm = make_algorithm(_init, _step, chains, logdensity_fn)
        state = _start(algorithm, key_init, engine.to_default_dtype(initial_positions))
        if not hasattr(state, "position"):
            raise TypeError(
                f"the states of a blackjax algorithm for this engine need a .position, got {type(state).__name__}"
            )
        # Draw
        _, history = run_loop(
            key_run,
            algorithm,
            state,
            self.num_discard + self.num_draws,
            progress=bars.label(progress, "Blackjax"),
            collect=_record,
            checkpoint=checkpoint,
        )
        num_draws = int(history.num_records) - self.num_discard
        unfinished = num_draws > 0 and engine.was_interrupted(history)
        if not unfinished:
            history.check()
        positions, scalars = jax.tree.map(
            lambda x: jnp.swapaxes(x[self.num_discard :], 0, 1), history.filled()
        )
        # Judge
        verdict = report.convergence(positions)
        last = jax.tree.map(lambda leaf: leaf[:, -1], positions)
        status, details = tails.doubted(verdict.status, logdensity_fn, last, prior=target.prior)
        if status == Status.CHAINS_DISAGREE:
            details = report.explain(verdict, self.num_chains, num_draws)
        if unfinished:
            progress_text = f"{num_draws} of {self.num_draws} draws per chain were made"
            status, details = engine.interrupted_part(progress_text, status, details)
        verdict = verdict._replace(status=status)
        engine.warn(status, details, "Blackjax")
        info = report.BlackjaxInfo(sampler=scalars, **verdict._asdict())
        return engine.finish(target, positions, initial_positions, info)


@pytree
class _BlackjaxChains:
    algorithm: Held  # its arrays are data
    mode: str = field(static=True)


def _sampling_algorithm(chains: _BlackjaxChains, logdensity_fn: Callable) -> Any:
    algorithm = chains.algorithm.value
    is_algorithm = hasattr(algorithm, "init") and hasattr(algorithm, "step")
    return algorithm if is_algorithm else algorithm(logdensity_fn)


@jax.jit
def _start(algorithm, key, positions):
    return algorithm.init(key, positions)


def _init(chains: _BlackjaxChains, logdensity_fn: Callable, key: PRNGKey, positions: Any) -> Any:
    init = _sampling_algorithm(chains, logdensity_fn).init
    takes_key = len(inspect.signature(init).parameters) > 1
    keys = jax.random.split(key, jax.tree.leaves(positions)[0].shape[0])
    return map_or_vmap(lambda k, p: init(p, k) if takes_key else init(p), chains.mode, keys, positions)


def _step(chains: _BlackjaxChains, logdensity_fn: Callable, key: PRNGKey, state: Any) -> tuple[Any, Any]:
    step = _sampling_algorithm(chains, logdensity_fn).step
    keys = jax.random.split(key, jax.tree.leaves(state)[0].shape[0])
    new_state, info = map_or_vmap(step, chains.mode, keys, state)
    # Some blackjax algorithms promote float32: the loop needs the same dtypes in and out
    return jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state), info


def _record(state: Any, info: Any) -> tuple[Any, dict[str, Any]]:
    """Record the positions, and the info fields that are one number per chain."""
    fields = info._asdict() if hasattr(info, "_asdict") else {}
    return state.position, {
        name: value for name, value in fields.items() if isinstance(value, jax.Array) and value.ndim == 1
    }
