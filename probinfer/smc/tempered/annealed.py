r"""Annealed importance sampling: independent runs through the densities of a bridge, weighed and never resampled.

Forward, :math:`u_0 \sim q`, each step k moves by a transition reversible for :math:`\pi_{t_k}` and

.. math:: \log w = \sum_k (t_k - t_{k-1})\,\Delta(u_{k-1}), \qquad E\,w = Z.

In reverse, from an exact draw :math:`u_K` of the target, the same moves in the opposite order give the same sum with
:math:`E\,1/w = 1/Z`. Temperatures, moves, metrics and step sizes are those of a tempered pilot, frozen before the runs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import Array, Float, Int, PRNGKey
from probinfer.inference import engine
from probinfer.inference.findings import Finding, combined, undefined
from probinfer.inference.posterior import Posterior
from probinfer.numerics import importance
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.driver import record_nothing, run_until
from probinfer.smc.tempered.annealed_runs import Annealing, RunsState, forward_steps, has_taken, init_runs
from probinfer.smc.tempered.bridge import unflatten
from probinfer.smc.tempered.engine import Tempered
from probinfer.smc.tempered.initial_distribution import INITIAL_DISTRIBUTIONS, find_initial_distribution
from probinfer.smc.tempered.populations import MAX_LEVELS, child_checkpoint, learn_schedule
from probinfer.targets import Target

__all__ = ["AnnealedInfo", "Annealing", "anneal", "annealing"]


class AnnealedInfo(NamedTuple):
    """Report of annealed importance sampling.

    Attributes:
        log_evidence_error: standard error of the log evidence.
        ess: effective sample size of the weights.
        khat: Pareto shape of the weights.
        started_from: as in ``TemperedInfo``.
        num_undefined: draws of the initial distribution with a log ratio of NaN (weight zero).
        num_gradients: evaluations of the density with its gradient, of the runs and of the pilot.
        num_densities: evaluations of the density alone, of the runs and of the pilot.
        status: ``OK``, ``POOR_APPROXIMATION`` (``khat`` is too large for the weights to be trusted),
            ``DEGENERATE_WEIGHTS``, or ``NON_FINITE`` if one draw in a hundred is undefined.
    """

    log_evidence_error: Float[Array, ""]
    ess: Float[Array, ""]
    khat: Float[Array, ""]
    started_from: Int[Array, ""]
    num_undefined: Int[Array, ""]
    num_gradients: Int[Array, ""]
    num_densities: Int[Array, ""]
    status: Status

    @property
    def start(self) -> str:
        """The initial distribution: "prior" or "student-t"."""
        return INITIAL_DISTRIBUTIONS[int(self.started_from)]


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
    """Learn temperatures, moves, metrics and step sizes by a tempered pilot, and freeze them.

    Args:
        key: random key.
        target: an exact target.
        num_particles: of the pilot.
        refine: steps into which each level of the pilot is divided. The runs are not resampled, and their weights vary
            less along more steps: the cost is proportional to ``refine``, the variance of the log weights to its
            inverse.
        moves: as in ``Tempered``.
        mode: runs one after another ("map"), side by side ("vmap"), or whichever suits device and density ("auto").
        progress: a bar; ``None`` means on a terminal.
        checkpoint: where to keep checkpoints of the pilot.

    Returns:
        The annealing; pass its ``forward`` and ``reverse`` to ``checks.evidence_sandwich``.

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
    engine.check_target(key, target, "annealing")
    Checkpoint.check(checkpoint)
    key_initial, key_pilot = jax.random.split(key)
    with bars.task("annealing", None, bars.label(progress, "annealing")):
        initial = find_initial_distribution(
            key_initial, target, progress, child_checkpoint(checkpoint, "start")
        )
        pilot = learn_schedule(config, initial, key_pilot, progress, checkpoint)
    return Annealing(
        bridge=initial.bridge,
        schedule=pilot.schedule,
        started_from=jnp.int32(initial.kind),
        num_gradients=jnp.int32(initial.num_gradients + int(pilot.num_gradients)),
        num_densities=pilot.num_densities,
        refine=int(refine),
        moves=moves,
        mode=mode,
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
        A posterior of one chain with log weights; their mean weight is an unbiased estimate of the evidence. ``info``
        is an ``AnnealedInfo``.

    Raises:
        TypeError: as in ``annealing``.
        ValueError: as in ``annealing``.
        NumericalError: as in ``annealing``; a log ratio of plus infinity.

    Warns:
        ConvergenceWarning: the weights are too unequal to be trusted, or all zero.

    References:
        Neal (2001), "Annealed importance sampling".
    """
    key_pilot, key_init, key_moves = jax.random.split(key, 3)
    with bars.task("anneal", None, bars.label(progress, "anneal")):
        # Learn the settings
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
        # Run and weigh. The step limit does not depend on the data, so that new data compile nothing.
        runs = init_runs(frozen, key_init, num_runs=num_particles)
        num_steps = int(frozen.schedule.num_levels) * int(refine)
        runs, history = run_until(
            key_moves,
            forward_steps(frozen),
            runs,
            jax.tree_util.Partial(has_taken, jnp.int32(num_steps)),
            MAX_LEVELS * int(refine),
            progress=bars.label(progress, "runs"),
            collect=record_nothing,
            checkpoint=child_checkpoint(checkpoint, "runs"),
        )
    history.check()
    return _posterior(target, frozen, runs)


def _posterior(target: Target, frozen: Annealing, runs: RunsState) -> Posterior:
    evidence, num_runs = importance.evidence(runs.log_weights), runs.log_weights.shape[0]
    if int(evidence.status) == Status.NON_FINITE:
        raise NumericalError(
            "the log ratio of target and initial distribution is plus infinity somewhere; "
            f"{advice(Status.NON_FINITE)}",
            Status.NON_FINITE,
        )
    # Judge the weights
    is_poor = (
        float(evidence.khat) > importance.khat_threshold(num_runs) and float(evidence.ess) < num_runs / 2
    )
    status = Status(max(int(evidence.status), int(Status.POOR_APPROXIMATION) if is_poor else 0))
    degenerate = None
    if status != Status.OK:
        advised = "raise refine, or num_particles" if status == Status.POOR_APPROXIMATION else ""
        degenerate = Finding(
            status, f"{float(evidence.ess):.0f} of {num_runs} runs carry the weight", advised
        )
    draws = f"draws of the {INITIAL_DISTRIBUTIONS[int(frozen.started_from)]}"
    verdict = combined([degenerate, undefined(runs.num_undefined, num_runs, draws)])
    engine.warn(verdict.status, verdict.details, "anneal", verdict.advised)
    info = AnnealedInfo(
        log_evidence_error=evidence.standard_error,
        ess=evidence.ess,
        khat=evidence.khat,
        started_from=frozen.started_from,
        num_undefined=runs.num_undefined,
        num_gradients=frozen.num_gradients + runs.num_gradients,
        num_densities=frozen.num_densities + runs.num_densities,
        status=verdict.status,
    )
    return engine.finish(
        target,
        unflatten(frozen.bridge.template, runs.positions[None]),
        frozen.bridge.template,
        info,
        log_weights=runs.log_weights[None],
        log_evidence=evidence.log_evidence,
    )
