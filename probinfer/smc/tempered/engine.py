"""Tempered sequential Monte Carlo as an engine: posterior draws and an unbiased evidence with its error."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.arguments import check_counts
from probinfer.core.errors import shortened
from probinfer.core.status import Status
from probinfer.core.types import Array, Float, Int, PRNGKey, PyTree, field, pytree
from probinfer.inference import engine, findings
from probinfer.inference.findings import Finding
from probinfer.inference.posterior import Posterior
from probinfer.mcmc import report
from probinfer.running import interrupts
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.smc import islands
from probinfer.smc.tempered.bridge import unflatten
from probinfer.smc.tempered.initial_distribution import (
    INITIAL_DISTRIBUTIONS,
    InitialDistribution,
    find_initial_distribution,
)
from probinfer.smc.tempered.levels import CHAIN_LENGTH, TemperedState
from probinfer.smc.tempered.moves.choice import MOVES
from probinfer.smc.tempered.populations import PopulationRunner, child_checkpoint, learn_schedule
from probinfer.smc.tempered.schedule import Schedule
from probinfer.targets import Target

__all__ = ["Tempered", "TemperedInfo", "sample_from"]

_MIN_CHAINS = 4
_NUM_COMPARED = 32  # particles of a population whose densities are compared with the best one of the run
_LOST_MODE_MARGIN = 10.0  # nats
_UNNORMALIZED_PRIOR = (
    "the prior is not normalized (improper, masked or scaled), so the log evidence contains its arbitrary constant: do "
    "not compare it with other models; the draws are not affected"
)


class TemperedInfo(NamedTuple):
    """Report of a tempered run of R islands and L levels.

    Attributes:
        temperatures: at the end of each level, as the pilot chose them.
        step_sizes: of the leapfrogs at each level, as the pilot chose them.
        tries: proposals in an independent move, as the pilot chose them; 0: the level moved by trajectories, else it
            did not use its step size.
        acceptance: of the moves; NaN in levels after all particles of an island died.
        particle_ess: effective sample size of the incremental weights; NaN as above.
        log_evidences: of the islands.
        log_evidence_error: standard error of the log evidence.
        started_from: index of the initial distribution, ``start`` is its name.
        num_undefined: draws of the initial distribution, of all islands and the pilot, with a log ratio of NaN: they
            have weight zero.
        num_gradients: evaluations of the density with its gradient, those of the pilots included.
        num_densities: evaluations of the density alone, those of the pilot included.
        rhat, ess, ess_tail: trees shaped like one unconstrained position; each island is a chain, in the order of the
            moves.
        status: ``OK``; ``CHAINS_DISAGREE``: R-hat, ESS or evidences of the islands; ``POOR_APPROXIMATION``: during the
            run a particle had a log density more than 10 + d / 2 above all at the end; ``DEGENERATE_WEIGHTS``: all
            particles of an island died; ``NON_FINITE``: one draw of the initial distribution in a hundred is undefined.
    """

    temperatures: Float[Array, " L"]
    step_sizes: Float[Array, " L"]
    tries: Int[Array, " L"]
    acceptance: Float[Array, "R L"]
    particle_ess: Float[Array, "R L"]
    log_evidences: Float[Array, " R"]
    log_evidence_error: Float[Array, ""]
    started_from: Int[Array, ""]
    num_undefined: Int[Array, ""]
    num_gradients: int
    num_densities: int
    rhat: PyTree
    ess: PyTree
    ess_tail: PyTree
    status: Status

    @property
    def start(self) -> str:
        """The initial distribution: "prior" or "student-t"."""
        return INITIAL_DISTRIBUTIONS[int(self.started_from)]

    @property
    def evidence_reason(self) -> str:
        """What the log evidence means, in one sentence."""
        if self.start == "prior":
            return "the log marginal likelihood of the data: the prior is normalized"
        return (
            "the log of the integral of the density as it was given: a marginal likelihood only if that contains a "
            "normalized prior"
        )

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return an interval that contains the log evidence with this probability, see ``islands.interval``.

        Args:
            level: of the interval.
        """
        return islands.interval(np.asarray(self.log_evidences, float), level)


@pytree
class Tempered:
    r"""Particles moved from the prior to the posterior through :math:`q^{1-t}\gamma^t`, t from 0 to 1.

    A pilot population chooses temperatures, moves, metrics and step sizes. They are then frozen, and R islands of N
    particles run with them from the start, one after another: their evidences are independent and unbiased, so the log
    of their mean comes with a standard error. Draws are weighted by the evidence of their island.

    The initial distribution q is the target's prior, or, if that is unknown, a Student-t fitted to a short run of NUTS.
    Modes that no particle drawn from q reaches are missed.

    Args:
        num_particles: N, a multiple of 8 if ``waste_free``; the budget.
        num_islands: R, 2 or more.
        ess_fraction: effective sample size of a level's incremental weights, as a fraction of N; nearer to 1: more
            levels.
        moves: "hmc", "nuts", "independent" (proposals from a Student-t fitted to the pilot's particles at the level:
            needs no gradient if the target has a prior), or "auto": Hamiltonian or independent, level by level,
            whichever mixes better in the pilot for the number of evaluations, see ``smc.tempered.moves.choice``.
        waste_free: keep all states of the moves; False: only the last of three moves, at about three times the cost.
        mode: particles one after another ("map"), side by side ("vmap"), or whichever suits device and density
            ("auto").

    References:
        Del Moral, Doucet and Jasra (2006); Dau and Chopin (2022), "Waste-free sequential Monte Carlo"; South, Pettitt
        and Drovandi (2019), independent proposals.
    """

    num_particles: int = field(static=True, default=512)
    num_islands: int = field(static=True, default=8)
    ess_fraction: float = field(static=True, default=0.5)
    moves: str = field(static=True, default="auto")
    waste_free: bool = field(static=True, default=True)
    mode: str = field(static=True, default="auto")

    def __post_init__(self):
        """Check the settings.

        Raises:
            TypeError: a count is not an integer, or the fraction is not a number.
            ValueError: a count, fraction, mode or kind of moves is out of range, or the number of particles is not a
                multiple of 8.
        """
        check_counts(self, ("num_particles", "num_islands"))
        if self.num_islands < 2:
            raise ValueError(f"num_islands must be 2 or more, to be compared, got {self.num_islands}")
        min_particles = CHAIN_LENGTH * _MIN_CHAINS
        if self.num_particles < min_particles:
            raise ValueError(f"num_particles must be {min_particles} or more, got {self.num_particles}")
        if self.waste_free and self.num_particles % CHAIN_LENGTH:
            raise ValueError(
                f"with waste_free, num_particles must be a multiple of {CHAIN_LENGTH} (states kept of each moved "
                f"particle), got {self.num_particles}; take {-(-self.num_particles // CHAIN_LENGTH) * CHAIN_LENGTH}"
            )
        if isinstance(self.ess_fraction, bool) or not isinstance(self.ess_fraction, (int, float, np.number)):
            raise TypeError(f"ess_fraction must be a number, got {self.ess_fraction!r}")
        if not 0 < self.ess_fraction < 1:
            raise ValueError(f"ess_fraction must lie between 0 and 1, got {self.ess_fraction}")
        if self.moves not in MOVES:
            raise ValueError(f"moves must be one of {', '.join(MOVES)}, got {shortened(self.moves)}")
        if self.mode not in ("auto", "map", "vmap"):
            raise ValueError(f"mode must be 'auto', 'map' or 'vmap', got {self.mode!r}")

    def sample(
        self,
        key: PRNGKey,
        target: Target,
        *,
        progress: bool | str | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Draw from an exact target and estimate its integral.

        Returns:
            A posterior with leading axes (island, particle), weights and ``log_evidence``: with a prior the log
            marginal likelihood, else the log of the integral of the density. Its ``info`` is a ``TemperedInfo``.

        Raises:
            TypeError: a minibatch target.
            NumericalError: the log ratio is plus infinity somewhere, all particles of the pilot have likelihood zero,
                the pilot does not reach the target, or no Student-t could be fitted to a target without a prior, for
                example because its density is improper.

        Warns:
            ConvergenceWarning: the islands disagree, one of them died, a narrow mode was lost, the log likelihood is
                undefined at one draw of the initial distribution in a hundred, or Ctrl-C ended the run after some of
                the islands.
            UserWarning: the prior is not normalized, so the evidence has an arbitrary factor.
        """
        name = type(self).__name__
        engine.check_target(key, target, name)
        Checkpoint.check(checkpoint)
        key_initial, key_pilot, key_islands = jax.random.split(key, 3)
        with bars.task(name, None, bars.label(progress, name)):
            initial = find_initial_distribution(
                key_initial, target, progress, child_checkpoint(checkpoint, "start")
            )
            return sample_from(self, initial, (key_pilot, key_islands), target, progress, checkpoint)


def sample_from(
    config: Tempered,
    initial: InitialDistribution,
    keys: tuple[PRNGKey, PRNGKey],
    target: Target,
    progress: bool | str | None = None,
    checkpoint: Checkpoint | None = None,
) -> Posterior:
    """Run pilot and islands from a given initial distribution.

    Args:
        config: of the engine.
        initial: distribution, with its bridge to the target.
        keys: of the pilot and of the islands.
        target: constrains the draws.
        progress: as in ``Tempered.sample``, which also describes the errors and warnings.
        checkpoint: where to keep checkpoints.
    """
    pilot = learn_schedule(config, initial, keys[0], progress, checkpoint)
    runner = PopulationRunner(config, initial.bridge, progress, checkpoint)
    numbered_keys = enumerate(jax.random.split(keys[1], config.num_islands), 1)
    runs = interrupts.each(
        lambda item, _: runner.run(item[1], pilot.schedule, f"island {item[0]}"), numbered_keys
    )
    return _posterior(config, target, initial, pilot, runs)


def _posterior(
    config: Tempered, target: Target, initial: InitialDistribution, pilot: TemperedState, runs: list
) -> Posterior:
    states, levels = zip(*runs)
    dtype = pilot.positions.dtype
    log_evidences = np.asarray([state.log_evidence for state in states])
    positions = unflatten(initial.bridge.template, jnp.stack([state.positions for state in states]))
    # Judge the islands
    convergence = report.convergence(engine.to_default_dtype(positions), populations=True)
    verdict = _verdict(config, initial, convergence, (pilot, *states), log_evidences)
    if len(runs) < config.num_islands:  # Ctrl-C
        finished = f"{len(runs)} of {config.num_islands} islands were finished"
        verdict = Finding(*engine.interrupted_part(finished, verdict.status, verdict.details))
    # Cut the schedule to its levels. Their number depends on the data, and asarray compiles a program for every new
    # shape: device_put does not.
    num_levels = int(pilot.schedule.num_levels)
    columns = jax.tree.map(lambda x: jax.device_put(np.asarray(x)[:num_levels]), pilot.schedule[:-1])
    schedule = Schedule(*columns, num_levels=num_levels)
    # Report
    info = TemperedInfo(
        temperatures=schedule.temperatures,
        step_sizes=schedule.step_sizes,
        tries=schedule.tries,
        acceptance=islands.stack_padded([info.acceptance for info in levels], (num_levels,), dtype),
        particle_ess=islands.stack_padded([info.ess for info in levels], (num_levels,), dtype),
        log_evidences=jnp.asarray(log_evidences, dtype),
        log_evidence_error=jnp.asarray(islands.log_mean_error(log_evidences), dtype),
        started_from=jnp.int32(initial.kind),
        num_undefined=jnp.int32(sum(int(state.num_undefined) for state in (pilot, *states))),
        num_gradients=initial.num_gradients + sum(int(state.num_gradients) for state in (pilot, *states)),
        num_densities=sum(int(state.num_densities) for state in (pilot, *states)),
        rhat=convergence.rhat,
        ess=convergence.ess,
        ess_tail=convergence.ess_tail,
        status=verdict.status,
    )
    engine.warn(verdict.status, verdict.details, "Tempered", verdict.advised)
    if target.prior is None and target.log_likelihood_fn is not None:
        engine.notice(_UNNORMALIZED_PRIOR, "Tempered")
    return engine.finish(
        target,
        positions,
        initial.bridge.template,
        info,
        log_weights=islands.broadcast_log_weights(log_evidences, config.num_particles, dtype),
        log_evidence=jnp.asarray(islands.log_mean(log_evidences), dtype),
    )


def _verdict(
    config: Tempered,
    initial: InitialDistribution,
    convergence: report.Convergence,
    states: tuple,
    log_evidences: np.ndarray,
) -> Finding:
    """Return the worst status with its reasons and advice; the first state is that of the pilot."""
    advised = f"raise num_particles (it is {config.num_particles})"
    num_draws = config.num_particles * len(states)
    num_undefined = sum(int(state.num_undefined) for state in states)
    undefined = findings.undefined(num_undefined, num_draws, f"draws of the {initial.name}")
    num_dead = sum(int(state.status) != Status.OK for state in states[1:])
    if num_dead:
        details = f"all particles of {num_dead} of {len(log_evidences)} islands died"
        died = Finding(Status.DEGENERATE_WEIGHTS, details)
        return findings.combined([died, undefined])._replace(status=died.status)
    disagree = islands.disagreement(log_evidences, convergence, config.num_particles, advised)
    return findings.combined([undefined, disagree, _lost_mode(initial.bridge, states, advised)])


def _lost_mode(bridge: Any, states: tuple, advised: str) -> Finding | None:
    """Return a finding if a particle, at some level, had a far higher density than any at the end."""
    best_final = [state.positions[np.argmax(state.log_ratios)] for state in states]
    final = [state.positions[:: max(len(state.positions) // _NUM_COMPARED, 1)] for state in states]
    final_log_joints = _log_joints(bridge, jnp.concatenate([jnp.stack(best_final), *final]))
    best_log_joints = _log_joints(bridge, jnp.stack([state.best_position for state in states]))
    excess = float(np.max(best_log_joints) - np.max(final_log_joints))
    # The log density of a draw varies by about d / 2.
    if not excess > _LOST_MODE_MARGIN + best_final[0].shape[0] / 2:
        return None
    return Finding(
        Status.POOR_APPROXIMATION,
        f"during the run a particle had a log density {excess:.3g} nats above all at the end: a narrow mode was lost",
        advised,
    )


@jax.jit
def _log_joints(bridge: Any, positions: Any) -> Any:
    return jax.lax.map(lambda position: sum(bridge.terms(position)), positions)
