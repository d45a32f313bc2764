r"""Annealed importance sampling: independent runs through the densities of a path, weighed and never resampled.

Forward, :math:`u_0 \sim q`, each step k moves by a kernel reversible for :math:`\pi_{t_k}` and

.. math:: \log w = \sum_k (t_k - t_{k-1})\,\Delta(u_{k-1}), \qquad E\,w = Z.

In reverse, from an exact draw :math:`u_K` of the target, the same moves in the opposite order give the same sum with
:math:`E\,1/w = 1/Z`. Temperatures, metrics and step sizes are those of a tempered pilot, frozen before the runs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from probinfer import engine, importance
from probinfer import progress as bars
from probinfer.base import Status
from probinfer.errors import NumericalError, advice
from probinfer.posterior import Posterior
from probinfer.smc.base_law import STARTS, find_start
from probinfer.smc.moves import hmc_moves
from probinfer.smc.path import flatten_one, unflatten
from probinfer.smc.tempered import Tempered, learn_schedule
from probinfer.smc.tempering import Schedule, evaluate, resolved
from probinfer.targets import Target
from probinfer.types import Array, ArrayTree, Float, PRNGKey, Scalar, field, pytree

__all__ = ["AnnealedInfo", "Annealing", "anneal", "annealing"]


class AnnealedInfo(NamedTuple):
    """Report of annealed importance sampling.

    ``log_evidence_error`` is the standard error of the log evidence, ``ess`` the effective sample size of the weights,
    ``khat`` their Pareto shape; ``started_from`` as in ``TemperedInfo``; ``num_undefined`` counts the draws of the
    base law with a log ratio of NaN (weight zero); ``num_gradients`` those of the runs and of the pilot. ``status`` is
    ``OK``, ``POOR_APPROXIMATION`` (``khat`` too large for the weights to be trusted) or ``DEGENERATE_WEIGHTS``.
    """

    log_evidence_error: Any
    ess: Any
    khat: Any
    started_from: Any
    num_undefined: Any
    num_gradients: Any
    status: Any

    @property
    def start(self) -> str:
        """The base law: "prior" or "student-t"."""
        return STARTS[int(self.started_from)]


class Run(NamedTuple):
    """Ends of annealed runs: ``positions`` (N, d), ``log_weights`` (N,), counts of the whole."""

    positions: Any
    log_weights: Any
    num_undefined: Any
    num_gradients: Any


@pytree
class Annealing:
    """A frozen annealing: a path with temperatures, metrics and step sizes.

    Attributes:
        path: from base to target.
        schedule: of the tempered pilot.
        started_from: index of the base law in ``smc.base_law.STARTS``.
        num_gradients: that finding all this took.
        refine: steps into which each of its levels is cut.
        mode: "map", "vmap" or "auto" over the runs.
    """

    path: Any
    schedule: Schedule
    started_from: Any
    num_gradients: Any
    refine: int = field(static=True)
    mode: str = field(static=True)

    def forward(self, key: PRNGKey) -> Scalar:
        """Return the log weight of one run from the base law: log Z in expectation from below.

        Args:
            key: random key.
        """
        return _forward(self, key, 1).log_weights[0]

    def reverse(self, draws: ArrayTree) -> jax.tree_util.Partial:
        """Return ``key -> log weight`` of one run back from a random one of the draws: log Z from above.

        Args:
            draws: exact and independent draws of the target, unconstrained positions with a leading axis. On simulated
                data the parameters that made them are one.
        """
        flat = jax.vmap(flatten_one)(draws)
        return jax.tree_util.Partial(_one_back, self, flat)

    def reverse_all(self, key: PRNGKey, draws: ArrayTree) -> Float[Array, " n"]:
        """Return the log weights of runs back from each of the draws, in one program.

        Args:
            key: random key.
            draws: as in ``reverse``.
        """
        return _backward(self, key, jax.vmap(flatten_one)(draws)).log_weights

    def forward_all(self, key: PRNGKey, num: int) -> Float[Array, " n"]:
        """Return the log weights of independent runs from the base law, in one program.

        Args:
            key: random key.
            num: how many.
        """
        return _forward(self, key, num).log_weights


def annealing(
    key: PRNGKey,
    target: Target,
    *,
    num_particles: int = 512,
    refine: int = 8,
    mode: str = "auto",
    progress: bool | str | None = None,
) -> Annealing:
    """Learn temperatures, metrics and step sizes from a tempered pilot, and freeze them.

    Args:
        key: random key.
        target: an exact target.
        num_particles: of the pilot.
        refine: steps into which each level of the pilot is cut: weights of independent runs, which nothing resamples,
            spread less along more steps. Cost and variance of the log weights are as ``refine`` and its inverse.
        mode: runs one after another ("map"), side by side ("vmap"), or as device and density ask ("auto").
        progress: a bar; ``None`` means on a terminal.

    Returns:
        The annealing; ``forward`` and ``reverse`` are what ``checks.evidence_sandwich`` takes.

    Raises:
        TypeError: not a key, not a target, a minibatch target, or ``refine`` is not an integer.
        ValueError: settings out of range, as in ``Tempered``; ``refine`` below 1.
        NumericalError: as in ``Tempered.sample``.
    """
    if isinstance(refine, bool) or not isinstance(refine, (int, np.integer)):
        raise TypeError(f"refine must be an integer, got {refine!r}")
    if refine < 1:
        raise ValueError(f"refine must be 1 or more, got {refine}")
    config = Tempered(num_particles=num_particles, mode=mode)
    engine.check(key, target, "annealing")
    key_start, key_pilot = jax.random.split(key)
    with bars.task("annealing", None, bars.label(progress, "annealing")):
        found = find_start(key_start, target, progress, None)
        pilot = learn_schedule(config, found, key_pilot, progress)
    spent = found.num_gradients + int(pilot.num_gradients)
    return Annealing(found.path, pilot.schedule, jnp.int32(found.kind), jnp.int32(spent), int(refine), mode)


def anneal(
    key: PRNGKey,
    target: Target,
    *,
    num_particles: int = 512,
    refine: int = 8,
    mode: str = "auto",
    progress: bool | str | None = None,
) -> Posterior:
    """Sample a target by annealed importance sampling.

    Args:
        key: random key.
        target: an exact target.
        num_particles: independent runs, and particles of the pilot.
        refine: see ``annealing``.
        mode: see ``annealing``.
        progress: a bar; ``None`` means on a terminal.

    Returns:
        A posterior of one chain with log weights; the mean weight is an unbiased evidence. ``info`` is an
        ``AnnealedInfo``.

    Raises:
        TypeError: as in ``annealing``.
        ValueError: as in ``annealing``.
        NumericalError: as in ``annealing``; a log ratio of plus infinity.

    Warns:
        ConvergenceWarning: the weights are too unequal to be trusted, or all zero.

    References:
        Neal (2001), "Annealed importance sampling".
    """
    key_pilot, key_runs = jax.random.split(key)
    frozen = annealing(
        key_pilot, target, num_particles=num_particles, refine=refine, mode=mode, progress=progress
    )
    run = _forward(frozen, key_runs, num_particles)
    found = importance.evidence(run.log_weights)
    if int(found.status) == Status.NON_FINITE:
        raise NumericalError(
            f"the log ratio of target and base law is plus infinity somewhere; {advice(Status.NON_FINITE)}",
            Status.NON_FINITE,
        )
    poor = (
        float(found.khat) > importance.khat_threshold(num_particles) and float(found.ess) < num_particles / 2
    )
    status = Status(max(int(found.status), int(Status.POOR_APPROXIMATION) if poor else 0))
    engine.warn(
        status, f"{float(found.ess):.0f} of {num_particles} runs carry the weight; raise refine", "anneal"
    )
    info = AnnealedInfo(
        log_evidence_error=found.standard_error,
        ess=found.ess,
        khat=found.khat,
        started_from=frozen.started_from,
        num_undefined=run.num_undefined,
        num_gradients=frozen.num_gradients + run.num_gradients,
        status=jnp.int32(int(status)),
    )
    positions = unflatten(frozen.path.like, run.positions[None])
    return engine.finish(
        target,
        positions,
        frozen.path.like,
        info,
        log_weights=run.log_weights[None],
        log_evidence=found.log_evidence,
    )


@partial(jax.jit, static_argnames="num")
def _forward(frozen: Annealing, key: PRNGKey, num: int) -> Run:
    key_draw, key_moves = jax.random.split(key)
    positions = engine.over(frozen.path.sample, "auto", jax.random.split(key_draw, num))
    mode = resolved(frozen.mode, frozen.path, positions[0])
    raw = engine.over(lambda position: frozen.path.terms(position)[1], mode, positions)
    start = jnp.where(jnp.isnan(raw), -jnp.inf, raw)
    run = _levels(frozen, key_moves, positions, start, back=False)
    return run._replace(
        num_undefined=jnp.sum(jnp.isnan(raw), dtype=jnp.int32), num_gradients=run.num_gradients + num
    )


@jax.jit
def _backward(frozen: Annealing, key: PRNGKey, positions: Float[Array, "n d"]) -> Run:
    return _levels(frozen, key, positions, jnp.zeros(positions.shape[0], positions.dtype), back=True)


def _one_back(frozen: Annealing, draws: Float[Array, "s d"], key: PRNGKey) -> Scalar:
    key_choice, key_moves = jax.random.split(key)
    chosen = jax.random.randint(key_choice, (1,), 0, draws.shape[0])
    return _backward(frozen, key_moves, draws[chosen]).log_weights[0]


def _levels(frozen: Annealing, key: PRNGKey, positions: Array, log_ratios: Array, *, back: bool) -> Run:
    """Move through all temperatures and collect the weights: before each move, or (back) after it."""
    schedule, refine = frozen.schedule, frozen.refine
    mode = resolved(frozen.mode, frozen.path, positions[0])
    steps = schedule.num_levels * refine

    def step(i, run_and_ratios):
        run, log_ratios = run_and_ratios
        index = steps - 1 - i if back else i
        level = index // refine
        low = jnp.where(level == 0, 0, schedule.temperatures[level - 1])
        rise = (schedule.temperatures[level] - low) / refine
        temperature = low + rise * (index % refine + 1).astype(rise.dtype)
        moved = hmc_moves(
            jax.random.fold_in(key, i),
            partial(evaluate, frozen.path, temperature),
            run.positions,
            schedule.roots[level],
            schedule.step_sizes[level],
            jnp.zeros_like(rise),
            num_moves=1,
            mode=mode,
        )
        factors = moved.log_ratios[-1] if back else log_ratios
        # where the first ratio is minus infinity the weight stays zero, wherever the moves lead
        log_weights = jnp.where(run.log_weights == -jnp.inf, -jnp.inf, run.log_weights + rise * factors)
        cost = run.num_gradients + moved.num_gradients
        return Run(moved.positions[-1], log_weights, run.num_undefined, cost), moved.log_ratios[-1]

    zero = jnp.zeros((), jnp.int32)
    first = Run(positions, jnp.zeros_like(log_ratios), zero, zero)
    return lax.fori_loop(0, steps, step, (first, log_ratios))[0]
