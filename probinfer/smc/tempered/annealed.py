r"""Annealed importance sampling: independent runs through the densities of a path, weighed and never resampled.

Forward, :math:`u_0 \sim q`, each step k moves by a kernel reversible for :math:`\pi_{t_k}` and

.. math:: \log w = \sum_k (t_k - t_{k-1})\,\Delta(u_{k-1}), \qquad E\,w = Z.

In reverse, from an exact draw :math:`u_K` of the target, the same moves in the opposite order give the same sum with
:math:`E\,1/w = 1/Z`. Temperatures, moves, metrics and step sizes are those of a tempered pilot, frozen before the runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import PRNGKey
from probinfer.inference import engine
from probinfer.inference.findings import Finding, combined, undefined
from probinfer.inference.posterior import Posterior
from probinfer.numerics import importance
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.driver import record_nothing, run_until
from probinfer.smc.tempered.annealed_runs import Annealing, Runs, arrived, forward_steps, started
from probinfer.smc.tempered.bridge import unflatten
from probinfer.smc.tempered.engine import Tempered
from probinfer.smc.tempered.initial_distribution import STARTS, find_start
from probinfer.smc.tempered.populations import MAX_LEVELS, learn_schedule
from probinfer.targets import Target

__all__ = ["AnnealedInfo", "Annealing", "anneal", "annealing"]


class AnnealedInfo(NamedTuple):
    """Report of annealed importance sampling.

    ``log_evidence_error`` is the standard error of the log evidence, ``ess`` the effective sample size of the weights,
    ``khat`` their Pareto shape; ``started_from`` as in ``TemperedInfo``; ``num_undefined`` counts the draws of the
    base law with a log ratio of NaN (weight zero); ``num_gradients`` and ``num_densities`` are evaluations with and
    without gradient, of the runs and of the pilot. ``status`` is ``OK``, ``POOR_APPROXIMATION`` (``khat`` too large for
    the weights to be trusted), ``DEGENERATE_WEIGHTS``, or ``NON_FINITE`` if one draw in a hundred is undefined.
    """

    log_evidence_error: Any
    ess: Any
    khat: Any
    started_from: Any
    num_undefined: Any
    num_gradients: Any
    num_densities: Any
    status: Any

    @property
    def start(self) -> str:
        """The base law: "prior" or "student-t"."""
        return STARTS[int(self.started_from)]


def annealing(
    key: PRNGKey,
    target: Target,
    *,
    num_particles: int = 512,
    refine: int = 8,
    moves: str = "auto",
    mode: str = "auto",
    progress: bool | str | None = None,
    checkpoint: Checkpoint | None = None,
) -> Annealing:
    """Learn temperatures, moves, metrics and step sizes from a tempered pilot, and freeze them.

    Args:
        key: random key.
        target: an exact target.
        num_particles: of the pilot.
        refine: steps into which each level of the pilot is cut: weights of independent runs, which nothing resamples,
            spread less along more steps. Cost and variance of the log weights are as ``refine`` and its inverse.
        moves: as in ``Tempered``.
        mode: runs one after another ("map"), side by side ("vmap"), or as device and density ask ("auto").
        progress: a bar; ``None`` means on a terminal.
        checkpoint: where to keep checkpoints of the pilot.

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
    config = Tempered(num_particles=num_particles, moves=moves, mode=mode)
    engine.check(key, target, "annealing")
    Checkpoint.check(checkpoint)
    key_start, key_pilot = jax.random.split(key)
    with bars.task("annealing", None, bars.label(progress, "annealing")):
        found = find_start(
            key_start, target, progress, None if checkpoint is None else checkpoint.child("start")
        )
        pilot = learn_schedule(config, found, key_pilot, progress, checkpoint)
    gradients = found.num_gradients + int(pilot.num_gradients)
    return Annealing(
        found.path,
        pilot.schedule,
        jnp.int32(found.kind),
        jnp.int32(gradients),
        pilot.num_densities,
        int(refine),
        moves,
        mode,
    )


def anneal(
    key: PRNGKey,
    target: Target,
    *,
    num_particles: int = 512,
    refine: int = 8,
    moves: str = "auto",
    mode: str = "auto",
    progress: bool | str | None = None,
    checkpoint: Checkpoint | None = None,
) -> Posterior:
    """Sample a target by annealed importance sampling.

    Args:
        key: random key.
        target: an exact target.
        num_particles: independent runs, and particles of the pilot.
        refine: see ``annealing``.
        moves: see ``annealing``.
        mode: see ``annealing``.
        progress: a bar; ``None`` means on a terminal.
        checkpoint: where to keep checkpoints; the same call continues from there to the same draws.

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
    key_pilot, key_draw, key_moves = jax.random.split(key, 3)
    with bars.task("anneal", None, bars.label(progress, "anneal")):
        frozen = annealing(
            key_pilot,
            target,
            num_particles=num_particles,
            refine=refine,
            moves=moves,
            mode=mode,
            progress=progress,
            checkpoint=checkpoint,
        )
        runs = started(frozen, key_draw, num=num_particles)
        steps = int(frozen.schedule.num_levels) * int(refine)
        runs, history = run_until(
            key_moves,
            forward_steps(frozen),
            runs,
            jax.tree_util.Partial(arrived, jnp.int32(steps)),
            MAX_LEVELS * int(refine),
            progress=bars.label(progress, "runs"),
            collect=record_nothing,
            checkpoint=None if checkpoint is None else checkpoint.child("runs"),
        )
    history.check()
    return _posterior(target, frozen, runs)


def _posterior(target: Target, frozen: Annealing, runs: Runs) -> Posterior:
    found, num = importance.evidence(runs.log_weights), runs.log_weights.shape[0]
    if int(found.status) == Status.NON_FINITE:
        raise NumericalError(
            f"the log ratio of target and base law is plus infinity somewhere; {advice(Status.NON_FINITE)}",
            Status.NON_FINITE,
        )
    poor = float(found.khat) > importance.khat_threshold(num) and float(found.ess) < num / 2
    status = Status(max(int(found.status), int(Status.POOR_APPROXIMATION) if poor else 0))
    carried = None
    if status != Status.OK:
        advised = "raise refine, or num_particles" if status == Status.POOR_APPROXIMATION else ""
        carried = Finding(status, f"{float(found.ess):.0f} of {num} runs carry the weight", advised)
    draws = f"draws of the {STARTS[int(frozen.started_from)]}"
    verdict = combined([carried, undefined(runs.num_undefined, num, draws)])
    engine.warn(verdict.status, verdict.details, "anneal", verdict.advised)
    info = AnnealedInfo(
        log_evidence_error=found.standard_error,
        ess=found.ess,
        khat=found.khat,
        started_from=frozen.started_from,
        num_undefined=runs.num_undefined,
        num_gradients=frozen.num_gradients + runs.num_gradients,
        num_densities=frozen.num_densities + runs.num_densities,
        status=verdict.status,
    )
    return engine.finish(
        target,
        unflatten(frozen.path.like, runs.positions[None]),
        frozen.path.like,
        info,
        log_weights=runs.log_weights[None],
        log_evidence=found.log_evidence,
    )
