"""What an engine of particles says of its run: numbers, a status, and words."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.coin.cloud import table
from probinfer.coin.engine import trajectories
from probinfer.coin.engine.diagnostics import Judgement, complaint, predicted_sd
from probinfer.coin.engine.stopping import Watched
from probinfer.coin.engine.trajectories import Trial
from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree
from probinfer.inference.engine import coordinate_names
from probinfer.running.history import History

__all__ = ["Finished", "ParticlesInfo", "details", "info", "refuse"]

_KHAT = 0.7
_NETWORK = (
    "; with more parameters than particles on minibatches, as in neural networks, Adam with a tuned rate is ahead by "
    "far (benchmarks/coin_minibatch.py): compare with it before these particles are used"
)


class ParticlesInfo(NamedTuple):
    r"""Report of a run.

    ``virial`` is a tree shaped like one unconstrained position: the mean of :math:`(x - \bar x) s` over the particles,
    -1 where the cloud is right, nearer to 0 where it is too narrow; ``location`` likewise the mean score times the
    standard deviation, 0 where it is right. ``ksd`` is the kernel Stein discrepancy in the coordinates of the cloud,
    ``predicted_sd`` the part of a standard deviation that so many particles keep in so many dimensions. All four are
    of the cloud before it was polished; of a minibatch target by the mean score of 16 batches, ``location`` less
    four of its standard errors. ``direction_norms`` and ``virials`` (num_steps,) are the length of the
    direction (root mean square) and the mean virial, step by step: curves that should be level at the end.
    ``num_nonfinite`` counts particles without a finite log density at the end: they have weight zero. ``num_gradients``
    counts gradients of the (minibatch) log density. ``acceptance`` and ``khat`` belong to the polish, else NaN.

    ``shift``, ``growth``, ``num_lost`` and ``num_forsaken`` say what 16 short trajectories from the final particles
    did (``coin.trajectories``; NaN and 0 for minibatch targets and weights): trees of what they moved the mean by in
    standard deviations (0 is right) and of the factor by which the mean distance from the mean grew (1 is right); how
    many particles rest where the density is hopelessly low; how many of the first and of step 32 stood in a mode that
    has no particle now. ``mode_shares`` (4,) are the parts of the particles in modes that a gorge of 1.5 nats
    separates, the highest first, ``mode_masses`` (4,) what their densities ask for, were each normal (``coin.modes``;
    0: fewer modes, or too few particles to tell). A mode that no particle ever visited is not seen.

    ``status`` is ``POOR_APPROXIMATION`` where the cloud is out of place, too narrow or too wide, where trajectories
    move it beyond noise, where particles are lost or a mode is forsaken, where the shares of two modes are wrong by
    more than a factor of 1.5, or the weights cannot be trusted;
    ``MAX_ITERATIONS`` where it had not settled and trajectories did not find it right (no shift above 0.3, no growth
    above 1.3); ``NON_FINITE`` where some particles have no finite log density; ``IMPROPER_DENSITY`` where the density
    of a target without a prior falls too slowly to be integrated.
    """

    virial: Any
    location: Any
    ksd: Any
    predicted_sd: Any
    direction_norms: Any
    virials: Any
    num_particles: Any
    num_steps: Any
    num_gradients: Any
    num_nonfinite: Any
    acceptance: Any
    khat: Any
    shift: Any
    growth: Any
    num_lost: Any
    num_forsaken: Any
    mode_shares: Any
    mode_masses: Any
    status: Any


class Finished(NamedTuple):
    """The verdict on a cloud, its final positions and weights, and what its polish reports."""

    judged: Judgement
    trial: Trial
    positions: ArrayTree
    log_weights: Array
    acceptance: Array
    khat: Array
    num_nonfinite: Array
    num_gradients: Any


def info(target: Any, state: Watched, history: History, found: Finished, config: Any) -> ParticlesInfo:
    """Return the report of a run.

    Args:
        target: whether its density is stochastic.
        state: the last one.
        history: of direction norms, mean virials and statuses.
        found: at the end.
        config: the engine.
    """
    steps = int(history.num_steps)
    norms, virials, statuses = (np.asarray(a)[:steps] for a in history.records)
    like = table.like_one(state.cloud.positions)
    size, dims = state.cloud.z.shape
    made = ParticlesInfo(
        virial=table.unravel(like, found.judged.virial),
        location=table.unravel(like, found.judged.location),
        ksd=found.judged.ksd,
        predicted_sd=jnp.asarray(predicted_sd(size, dims), state.cloud.z.dtype),
        direction_norms=jnp.asarray(norms),
        virials=jnp.asarray(virials),
        num_particles=jnp.int32(size),
        num_steps=jnp.int32(steps),
        num_gradients=steps * size + int(found.num_gradients),
        num_nonfinite=found.num_nonfinite.astype(jnp.int32),
        acceptance=found.acceptance,
        khat=found.khat,
        shift=table.unravel(like, found.trial.shift),
        growth=table.unravel(like, found.trial.growth),
        num_lost=found.trial.num_lost,
        num_forsaken=found.trial.num_forsaken,
        mode_shares=found.trial.shares.found,
        mode_masses=found.trial.shares.asked,
        status=jnp.int32(0),
    )
    stopped = bool(steps and statuses[-1] != Status.OK)
    return made._replace(status=jnp.int32(int(_status(made, found.trial, history, config, stopped))))


def _status(made: ParticlesInfo, trial: Trial, history: History, config: Any, stopped: bool) -> Status:
    if stopped or int(made.num_nonfinite) or int(history.status) == Status.NON_FINITE:
        return Status.NON_FINITE
    if int(history.status) == Status.INTERRUPTED:
        return Status.INTERRUPTED
    if config.polish == "weights":
        return Status.OK if float(made.khat) <= _KHAT else Status.POOR_APPROXIMATION
    if config.polish is None and _width(made):
        return Status.POOR_APPROXIMATION
    if trajectories.complaint(trial, _names(made)):
        return Status.POOR_APPROXIMATION
    return Status.OK if trajectories.vouches(trial) else Status(int(history.status))


def _names(made: ParticlesInfo) -> list[str]:
    return coordinate_names(made.shift)


def _width(made: ParticlesInfo, *, exact: bool = True) -> str:
    virial, location = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (made.virial, made.location)
    )
    return complaint(virial, int(made.num_particles), location, exact=exact)


def details(made: ParticlesInfo, trial: Trial, target: Any) -> str:
    """Say in a clause what a warning is about; a target of minibatches gets advice that it can follow.

    Args:
        made: the report.
        trial: what trajectories from the particles did.
        target: whether its density is stochastic.
    """
    said = _details(made, trial, target)
    many = len(_names(made)) >= int(made.num_particles)
    return said + (_NETWORK if target.stochastic and many else "")


def _details(made: ParticlesInfo, trial: Trial, target: Any) -> str:
    status = int(made.status)
    if status == Status.NON_FINITE:
        return f"{int(made.num_nonfinite)} particles have no finite log density; they have weight zero"
    if status == Status.INTERRUPTED:
        return f"{int(made.num_steps)} steps were taken, and direction and virial had not settled"
    if status == Status.MAX_ITERATIONS:
        found = trajectories.findings(trial)
        return f"direction and virial had not settled after {int(made.num_steps)} steps" + found
    if np.isfinite(made.khat):
        return f"Pareto k-hat of the weights is {float(made.khat):.2f}, above {_KHAT}"
    moved = trajectories.complaint(trial, _names(made))
    return _width(made, exact=not target.stochastic) or moved


def refuse(name: str, made: ParticlesInfo) -> None:
    """Raise where nothing came out.

    Raises:
        NumericalError: no particle has a finite log density, or the cloud grew without limit.
    """
    lost = int(made.num_nonfinite)
    if int(made.status) != Status.NON_FINITE or 0 < lost < int(made.num_particles):
        return
    what = (
        "no particle has a finite log density and gradient"
        if lost
        else "the cloud grew nine orders of magnitude: the density is flat or improper, or its scales are so unlike "
        "that the particles overshot it (standardise the data, start nearer, or use mcmc.NUTS())"
    )
    raise NumericalError(f"{name}: {what}; {advice(Status.NON_FINITE)}", Status.NON_FINITE)
