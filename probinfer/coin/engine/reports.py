"""The report of a particle engine: its numbers, its status, and the text of its warning."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.coin.cloud.particles import particle_template, unravel_particles
from probinfer.coin.engine import diagnostics, trajectories
from probinfer.coin.engine.diagnostics import CloudDiagnostics, predicted_sd
from probinfer.coin.engine.stopping import MonitoredCloud
from probinfer.coin.engine.trajectories import TrajectoryReport
from probinfer.core.errors import NumericalError, advice
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Float, Int
from probinfer.inference.engine import coordinate_names
from probinfer.running.history import History

__all__ = ["FinalCloud", "ParticlesInfo", "build_info", "describe_status", "raise_if_failed"]

_MAX_KHAT = 0.7
_NETWORK_ADVICE = (
    "; with more parameters than particles on minibatches, as in neural networks, Adam with a tuned rate is far better "
    "(benchmarks/coin_minibatch.py): compare with it before using these particles"
)


class ParticlesInfo(NamedTuple):
    r"""Report of a run of particles.

    The first four fields are those of the cloud before it was polished; for a minibatch target those of the mean score
    of 16 batches, with ``location`` shrunk by four of its standard errors. ``shift`` to ``mode_masses`` describe 16
    short trajectories from the final particles (``coin.engine.trajectories``); they are NaN and 0 for minibatch targets
    and weights. A mode that no particle ever visited is not detected.

    ``status`` is ``POOR_APPROXIMATION`` if the cloud is misplaced, too narrow or too wide, trajectories move it
    significantly, particles are lost, a mode is forsaken, the shares of two modes are wrong by more than a factor of
    1.5, or the weights are not reliable; ``MAX_ITERATIONS`` if the cloud had not settled and trajectories did not
    confirm it (no shift above 0.3, no growth above 1.3); ``NON_FINITE`` if some particles have no finite log density;
    ``IMPROPER_DENSITY`` if the density of a target without a prior decays too slowly to be integrable.

    Attributes:
        virial: mean of :math:`(x - \bar x) s` over the particles, a tree like one unconstrained position; -1 if the
            cloud is right, nearer to 0 if it is too narrow.
        location: mean score times standard deviation, a tree likewise; 0 if the cloud is right.
        ksd: kernel Stein discrepancy in the coordinates of the cloud.
        predicted_sd: share of a standard deviation that this number of particles keeps in this dimension.
        direction_norms: root mean square length of the direction, step by step; it should be level at the end.
        virials: mean virial, step by step; it should be level at the end.
        num_particles: N.
        num_steps: number of steps.
        num_gradients: number of gradients of the (minibatch) log density.
        num_nonfinite: number of particles without a finite log density at the end; they have weight zero.
        acceptance: acceptance rate of the polish, else NaN.
        khat: Pareto shape of the weights, else NaN.
        shift: how far trajectories moved the mean, in standard deviations, a tree likewise; 0 if the cloud is right.
        growth: the factor by which the mean distance from the mean grew, a tree likewise; 1 if the cloud is right.
        num_lost: number of particles where the density is negligible compared with the others.
        num_forsaken: number of particles of the start and of step 32 in a mode that has no particle now.
        mode_shares: (4,) shares of the particles in modes with a drop of 1.5 nats between them, highest first.
        mode_masses: (4,) the shares that their densities imply if each mode is normal (``coin.engine.modes``); 0 if
            there are fewer modes, or too few particles in the mode.
        status: ``Status`` of the run.
    """

    virial: ArrayTree
    location: ArrayTree
    ksd: Float[Array, ""]
    predicted_sd: Float[Array, ""]
    direction_norms: Float[Array, " num_steps"]
    virials: Float[Array, " num_steps"]
    num_particles: Int[Array, ""]
    num_steps: Int[Array, ""]
    num_gradients: int
    num_nonfinite: Int[Array, ""]
    acceptance: Float[Array, ""]
    khat: Float[Array, ""]
    shift: ArrayTree
    growth: ArrayTree
    num_lost: Int[Array, ""]
    num_forsaken: Int[Array, ""]
    mode_shares: Float[Array, " K"]
    mode_masses: Float[Array, " K"]
    status: Int[Array, ""] | Status


class FinalCloud(NamedTuple):
    """The polished cloud with its diagnostics.

    Attributes:
        diagnostics: of the cloud before it was polished.
        trajectories: what trajectories did to the polished cloud.
        positions: leaves (N, ...).
        log_weights: minus infinity for particles without a finite log density.
        acceptance: acceptance rate of the polish, else NaN.
        khat: Pareto shape of the weights, else NaN.
        num_nonfinite: number of particles without a finite log density.
        num_gradients: number of gradients since the last step.
    """

    diagnostics: CloudDiagnostics
    trajectories: TrajectoryReport
    positions: ArrayTree
    log_weights: Float[Array, " N"]
    acceptance: Float[Array, ""]
    khat: Float[Array, ""]
    num_nonfinite: Int[Array, ""]
    num_gradients: Int[Array, ""] | int


def build_info(state: MonitoredCloud, history: History, final: FinalCloud, config: Any) -> ParticlesInfo:
    """Return the report of a run.

    Args:
        state: the last state.
        history: of direction norms, mean virials and statuses.
        final: the cloud at the end.
        config: the engine.
    """
    num_steps = int(history.num_steps)
    norms, virials, statuses = (np.asarray(a)[:num_steps] for a in history.records)
    template = particle_template(state.cloud.positions)
    num_particles, num_dims = state.cloud.z.shape
    info = ParticlesInfo(
        virial=unravel_particles(template, final.diagnostics.virial),
        location=unravel_particles(template, final.diagnostics.location),
        ksd=final.diagnostics.ksd,
        predicted_sd=jnp.asarray(predicted_sd(num_particles, num_dims), state.cloud.z.dtype),
        direction_norms=jnp.asarray(norms),
        virials=jnp.asarray(virials),
        num_particles=jnp.int32(num_particles),
        num_steps=jnp.int32(num_steps),
        num_gradients=num_steps * num_particles + int(final.num_gradients),
        num_nonfinite=final.num_nonfinite.astype(jnp.int32),
        acceptance=final.acceptance,
        khat=final.khat,
        shift=unravel_particles(template, final.trajectories.shift),
        growth=unravel_particles(template, final.trajectories.growth),
        num_lost=final.trajectories.num_lost,
        num_forsaken=final.trajectories.num_forsaken,
        mode_shares=final.trajectories.shares.particles,
        mode_masses=final.trajectories.shares.mass,
        status=jnp.int32(0),
    )
    stopped = bool(num_steps and statuses[-1] != Status.OK)
    return info._replace(status=jnp.int32(int(_status(info, final.trajectories, history, config, stopped))))


def _status(
    info: ParticlesInfo, report: TrajectoryReport, history: History, config: Any, stopped: bool
) -> Status:
    if stopped or int(info.num_nonfinite) or int(history.status) == Status.NON_FINITE:
        return Status.NON_FINITE
    if int(history.status) == Status.INTERRUPTED:
        return Status.INTERRUPTED
    if config.polish == "weights":
        return Status.OK if float(info.khat) <= _MAX_KHAT else Status.POOR_APPROXIMATION
    if config.polish is None and _describe_cloud(info):
        return Status.POOR_APPROXIMATION
    if trajectories.describe_misfit(report, _names(info)):
        return Status.POOR_APPROXIMATION
    return Status.OK if trajectories.confirms_cloud(report) else Status(int(history.status))


def _names(info: ParticlesInfo) -> list[str]:
    return coordinate_names(info.shift)


def _describe_cloud(info: ParticlesInfo, *, exact: bool = True) -> str:
    virial, location = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (info.virial, info.location)
    )
    return diagnostics.describe_misfit(virial, int(info.num_particles), location, exact=exact)


def describe_status(info: ParticlesInfo, report: TrajectoryReport, target: Any) -> str:
    """Return the reason of a status as a clause of a warning, with advice that fits the target.

    Args:
        info: of the run.
        report: of trajectories from the particles.
        target: whether its density is stochastic.
    """
    advice_for_networks = target.stochastic and len(_names(info)) >= int(info.num_particles)
    return _describe_status(info, report, target) + (_NETWORK_ADVICE if advice_for_networks else "")


def _describe_status(info: ParticlesInfo, report: TrajectoryReport, target: Any) -> str:
    status = int(info.status)
    if status == Status.NON_FINITE:
        return f"{int(info.num_nonfinite)} particles have no finite log density; they have weight zero"
    if status == Status.INTERRUPTED:
        return f"{int(info.num_steps)} steps were taken, and direction and virial had not settled"
    if status == Status.MAX_ITERATIONS:
        drift = trajectories.describe_drift(report)
        return f"direction and virial had not settled after {int(info.num_steps)} steps" + drift
    if np.isfinite(info.khat):
        return f"Pareto k-hat of the weights is {float(info.khat):.2f}, above {_MAX_KHAT}"
    return _describe_cloud(info, exact=not target.stochastic) or trajectories.describe_misfit(
        report, _names(info)
    )


def raise_if_failed(name: str, info: ParticlesInfo) -> None:
    """Raise if the run has no usable particles.

    Raises:
        NumericalError: No particle has a finite log density, or the cloud grew without limit.
    """
    num_nonfinite = int(info.num_nonfinite)
    if int(info.status) != Status.NON_FINITE or 0 < num_nonfinite < int(info.num_particles):
        return
    reason = (
        "no particle has a finite log density and gradient"
        if num_nonfinite
        else "the cloud grew by nine orders of magnitude: the density is flat or improper, or its scales differ so "
        "much that the particles overshot it (standardize the data, start nearer, or use mcmc.NUTS())"
    )
    raise NumericalError(f"{name}: {reason}; {advice(Status.NON_FINITE)}", Status.NON_FINITE)
