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
            a ready ``SamplingAlgorithm`` on the target's unconstrained log density. Its states have a ``position``.
            A function defined once is traced once.
        num_discard: first draws of every chain that are thrown away; the algorithm does not learn from them.
        num_draws: draws of a chain that are kept.
        num_chains: chains.
        mode: chains one after another (``"map"``), vectorised (``"vmap"``), or as the device asks (``"auto"``).
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
        """Draw from the target.

        Args:
            key: random key.
            target: an exact target.
            progress: a bar; ``None`` means on a terminal.
            checkpoint: where to keep checkpoints; the same call continues from there to the same draws.

        Returns:
            The posterior; its ``info`` is a :class:`~probinfer.mcmc.BlackjaxInfo`.

        Raises:
            TypeError: not a key, not a target, a minibatch target, or states without a position.
            NumericalError: no finite starting point, or a chain became non-finite.

        Warns:
            ConvergenceWarning: the chains disagree or have too few effective draws, or the density is improper; or
                Ctrl-C left a part of the draws.
        """
        engine.check(key, target, "Blackjax")
        key_target, key_init, key_run = jax.random.split(key, 3)
        like = target.init(key_target, self.num_chains)
        logdensity_fn = engine.exact_logdensity(target, like)
        algorithm = make_algorithm(_init, _step, _Chains(hold(self.algorithm), self.mode), logdensity_fn)
        state = _start(algorithm, key_init, engine.to_default_dtype(like))
        if not hasattr(state, "position"):
            raise TypeError(
                f"the states of a blackjax algorithm for this engine need a .position, got {type(state).__name__}"
            )
        _, history = run_loop(
            key_run,
            algorithm,
            state,
            self.num_discard + self.num_draws,
            progress=bars.label(progress, "Blackjax"),
            collect=_record,
            checkpoint=checkpoint,
        )
        count = int(history.num_records) - self.num_discard
        unfinished = count > 0 and engine.is_part(history)
        if not unfinished:
            history.check()
        positions, scalars = jax.tree.map(
            lambda x: jnp.swapaxes(x[self.num_discard :], 0, 1), history.filled()
        )
        found = report.convergence(positions)
        last = jax.tree.map(lambda leaf: leaf[:, -1], positions)
        status, details = tails.doubted(found.status, logdensity_fn, last, prior=target.prior)
        if status == Status.CHAINS_DISAGREE:
            details = report.explain(found, self.num_chains, count)
        if unfinished:
            said = f"{count} of {self.num_draws} draws of a chain were made"
            status, details = engine.part(said, status, details)
        found = found._replace(status=status)
        engine.warn(found.status, details, "Blackjax")
        return engine.finish(target, positions, like, report.BlackjaxInfo(scalars, *found))


@pytree
class _Chains:
    algorithm: Held  # its arrays are data
    mode: str = field(static=True)


def _built(chains: _Chains, logdensity_fn: Callable) -> Any:
    algorithm = chains.algorithm.value
    ready = hasattr(algorithm, "init") and hasattr(algorithm, "step")
    return algorithm if ready else algorithm(logdensity_fn)


@jax.jit
def _start(algorithm, key, positions):
    return algorithm.init(key, positions)


def _init(chains: _Chains, logdensity_fn: Callable, key: PRNGKey, positions: Any) -> Any:
    init = _built(chains, logdensity_fn).init
    takes_key = len(inspect.signature(init).parameters) > 1
    keys = jax.random.split(key, jax.tree.leaves(positions)[0].shape[0])
    return engine.over(lambda k, p: init(p, k) if takes_key else init(p), chains.mode, keys, positions)


def _step(chains: _Chains, logdensity_fn: Callable, key: PRNGKey, state: Any) -> tuple[Any, Any]:
    step = _built(chains, logdensity_fn).step
    keys = jax.random.split(key, jax.tree.leaves(state)[0].shape[0])
    moved, info = engine.over(step, chains.mode, keys, state)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state), info


def _record(state: Any, info: Any) -> tuple[Any, dict[str, Any]]:
    """The positions, and the info fields that are one number a chain."""
    fields = info._asdict() if hasattr(info, "_asdict") else {}
    return state.position, {
        name: value for name, value in fields.items() if isinstance(value, jax.Array) and value.ndim == 1
    }
