"""Tempered sequential Monte Carlo as an engine: posterior draws and an unbiased evidence with its error."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.errors import shortened
from probinfer.core.status import Status
from probinfer.core.types import PRNGKey, field, pytree
from probinfer.inference import engine, findings
from probinfer.inference.findings import Finding
from probinfer.inference.posterior import Posterior
from probinfer.mcmc import report
from probinfer.running import interrupts
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.smc import islands
from probinfer.smc.tempered.bridge import unflatten
from probinfer.smc.tempered.initial_distribution import STARTS, Start, find_start
from probinfer.smc.tempered.levels import CHAIN_LENGTH, TemperedState
from probinfer.smc.tempered.moves.choice import MOVES
from probinfer.smc.tempered.populations import Population, child, learn_schedule
from probinfer.smc.tempered.schedule import Schedule
from probinfer.targets import Target

__all__ = ["Tempered", "TemperedInfo", "sample_from"]

_LEAST_CHAINS = 4
_COMPARED = 32  # particles of a population whose densities are compared with the best seen
_LOST = 10.0  # nats
_NO_SCALE = (
    "the prior is not normalised (improper, masked or scaled), so that the log evidence holds its arbitrary constant: "
    "compare it with no other model; the draws are as they should be"
)


class TemperedInfo(NamedTuple):
    """Report of a tempered run of R islands and L levels.

    ``temperatures`` (L,) at the end of each level, ``step_sizes`` (L,) and ``tries`` (L,), proposals in an independent
    move (0: the level moved by trajectories, else its step size was not used), as the pilot chose them. By island:
    ``acceptance`` (R, L), ``particle_ess`` (R, L), the effective sample size of the factors of each level, and
    ``log_evidences`` (R,); NaN in levels after all particles of an island died. ``log_evidence_error`` is the standard
    error of the log evidence. ``started_from`` is an index into ``smc.STARTS`` (``.start`` is its name).
    ``num_undefined`` counts the draws of the base law, of all islands and the pilot, where the log ratio is NaN: they
    have weight zero. ``num_gradients`` counts evaluations of the density with its gradient, ``num_densities`` those
    without, the pilots included. ``rhat``, ``ess`` and
    ``ess_tail`` are trees shaped like one unconstrained position; each island is a chain, in the order of the moves.
    ``status`` is ``OK``; ``CHAINS_DISAGREE``: R-hat, ESS or evidences of the islands; ``POOR_APPROXIMATION``: on the
    way a particle had a log density more than 10 + d / 2 above all at the end; ``DEGENERATE_WEIGHTS``: all particles of
    an island died; ``NON_FINITE``: one draw of the base law in a hundred is undefined.
    """

    temperatures: Any
    step_sizes: Any
    tries: Any
    acceptance: Any
    particle_ess: Any
    log_evidences: Any
    log_evidence_error: Any
    started_from: Any
    num_undefined: Any
    num_gradients: Any
    num_densities: Any
    rhat: Any
    ess: Any
    ess_tail: Any
    status: Any

    @property
    def start(self) -> str:
        """The base law: "prior" or "student-t"."""
        return STARTS[int(self.started_from)]

    @property
    def evidence_reason(self) -> str:
        """What the log evidence is of: one sentence."""
        if self.start == "prior":
            return "the log marginal likelihood of the data: the prior is normalised"
        return (
            "the log of the integral of the density as it was given: a marginal likelihood only if that contains a "
            "normalised prior"
        )

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Between which the log evidence lies with this probability: the hull of two readings (t, lognormal).

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

    The base law q is the target's prior; where it is not known, a Student-t fitted to a short run of NUTS. Modes
    that no particle drawn from q finds are missed.

    Args:
        num_particles: N, a multiple of 8 where ``waste_free``; the budget.
        num_islands: R, 2 or more.
        ess_fraction: effective sample size of a level's factors, as a fraction of N; nearer to 1: more levels.
        moves: "hmc", "nuts", "independent" (proposals from a Student-t fitted to the pilot's cloud of the level: needs
            no gradient where the target has a prior), or "auto": Hamiltonian or independent, level by level, whichever
            mixes better in the pilot for the number of evaluations, see ``smc.choice``.
        waste_free: keep all states of the moves; False: the last of three moves of each, at about three times the cost.
        mode: particles one after another ("map"), side by side ("vmap"), or as device and density ask ("auto").

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
            TypeError: a count is not an integer, or the fraction no number.
            ValueError: a count, fraction, mode or kind of moves out of range, or particles that chains of 8 do not
                divide.
        """
        engine.check_counts(self, ("num_particles", "num_islands"))
        if self.num_islands < 2:
            raise ValueError(f"num_islands must be 2 or more, to be compared, got {self.num_islands}")
        least = CHAIN_LENGTH * _LEAST_CHAINS
        if self.num_particles < least:
            raise ValueError(f"num_particles must be {least} or more, got {self.num_particles}")
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
        """Draw from the target and estimate its normaliser.

        Args:
            key: random key.
            target: an exact target.
            progress: a bar; ``None`` means on a terminal.
            checkpoint: where to keep checkpoints; the same call continues from there to the same draws.

        Returns:
            A posterior with leading axes (island, particle), weights and ``log_evidence``: with a prior the log
            marginal likelihood, else the log of the integral of the density. Its ``info`` is a ``TemperedInfo``.

        Raises:
            TypeError: not a key, not a target, or a minibatch target.
            NumericalError: the log ratio is plus infinity somewhere, all particles of the pilot have likelihood zero,
                the pilot does not reach the target, or no base law could be fitted to a target without a prior, for
                example because its density is improper.

        Warns:
            ConvergenceWarning: the islands disagree, one of them died, a narrow mode was lost on the way, or the log
                likelihood is undefined at one draw of the base law in a hundred; or Ctrl-C left some of the islands.
            UserWarning: the prior is not normalised, so the evidence has an arbitrary factor.
        """
        name = type(self).__name__
        engine.check(key, target, name)
        Checkpoint.check(checkpoint)
        key_start, key_pilot, key_islands = jax.random.split(key, 3)
        with bars.task(name, None, bars.label(progress, name)):
            found = find_start(key_start, target, progress, child(checkpoint, "start"))
            return sample_from(self, found, (key_pilot, key_islands), target, progress, checkpoint)


def sample_from(
    config: Tempered,
    found: Start,
    keys: tuple[PRNGKey, PRNGKey],
    target: Target,
    progress: bool | str | None = None,
    checkpoint: Checkpoint | None = None,
) -> Posterior:
    """Run pilot and islands along a path that is given.

    Args:
        config: of the engine.
        found: the path.
        keys: of the pilot and of the islands.
        target: constrains the draws.
        progress: as in ``Tempered.sample``, like ``checkpoint``, what it raises and warns of.
        checkpoint: where to keep checkpoints.
    """
    pilot = learn_schedule(config, found, keys[0], progress, checkpoint)
    population = Population(config, found.path, progress, checkpoint)
    numbered = enumerate(jax.random.split(keys[1], config.num_islands), 1)
    runs = interrupts.each(
        lambda one, _: population.run(one[1], pilot.schedule, f"island {one[0]}"), numbered
    )
    return _posterior(config, target, found, pilot, runs)


def _posterior(config: Tempered, target: Target, found: Start, pilot: TemperedState, runs: list) -> Posterior:
    states, levels = zip(*runs)
    dtype = pilot.positions.dtype
    logs = np.asarray([state.log_evidence for state in states])
    positions = unflatten(found.path.like, jnp.stack([state.positions for state in states]))
    judged = report.convergence(engine.to_default_dtype(positions), populations=True)
    verdict = _verdict(config, found, judged, (pilot, *states), logs)
    if len(runs) < config.num_islands:  # Ctrl-C
        said = f"{len(runs)} of {config.num_islands} islands were finished"
        verdict = Finding(*engine.part(said, verdict.status, verdict.details))
    count = int(pilot.schedule.num_levels)
    # device_put: how many levels there are depends on the data, and asarray compiles a program for every new shape
    schedule = jax.tree.map(lambda x: jax.device_put(np.asarray(x)[:count]), pilot.schedule[:-1])
    schedule = Schedule(*schedule, num_levels=count)
    info = TemperedInfo(
        temperatures=schedule.temperatures,
        step_sizes=schedule.step_sizes,
        tries=schedule.tries,
        acceptance=_padded([level.acceptance for level in levels], count, dtype),
        particle_ess=_padded([level.ess for level in levels], count, dtype),
        log_evidences=jnp.asarray(logs, dtype),
        log_evidence_error=jnp.asarray(islands.log_mean_error(logs), dtype),
        started_from=jnp.int32(found.kind),
        num_undefined=jnp.int32(sum(int(state.num_undefined) for state in (pilot, *states))),
        num_gradients=found.num_gradients + sum(int(state.num_gradients) for state in (pilot, *states)),
        num_densities=sum(int(state.num_densities) for state in (pilot, *states)),
        rhat=judged.rhat,
        ess=judged.ess,
        ess_tail=judged.ess_tail,
        status=verdict.status,
    )
    engine.warn(verdict.status, verdict.details, "Tempered", verdict.advised)
    if target.prior is None and target.log_likelihood_fn is not None:
        engine.notice(_NO_SCALE, "Tempered")
    return engine.finish(
        target,
        positions,
        found.path.like,
        info,
        log_weights=jnp.broadcast_to(jnp.asarray(logs, dtype)[:, None], (len(logs), config.num_particles)),
        log_evidence=jnp.asarray(islands.log_mean(logs), dtype),
    )


def _padded(rows: list, count: int, dtype: Any) -> Any:
    full = np.full((len(rows), count), np.nan, dtype)
    for row, values in zip(full, rows):
        row[: len(values)] = values
    return jax.device_put(full)


def _verdict(
    config: Tempered, found: Start, judged: report.Convergence, states: tuple, logs: np.ndarray
) -> Finding:
    """The worst status, in words what it is about, and what to do; the first state is that of the pilot."""
    more = f"raise num_particles (it is {config.num_particles})"
    num_islands = len(logs)
    total = config.num_particles * len(states)
    count = sum(int(state.num_undefined) for state in states)
    undefined = findings.undefined(count, total, f"draws of the {STARTS[found.kind]}")
    dead = sum(int(state.status) != Status.OK for state in states[1:])
    if dead:
        words = f"all particles of {dead} of {num_islands} islands died"
        gone = Finding(Status.DEGENERATE_WEIGHTS, words)
        return findings.combined([gone, undefined])._replace(status=gone.status)
    disagree = None
    if islands.shares(logs) < num_islands / 2:
        words = (
            f"the evidences of the islands differ too much (logs {np.min(logs):.1f} to {np.max(logs):.1f})"
        )
        disagree = Finding(Status.CHAINS_DISAGREE, words, more)
    elif int(judged.status) != Status.OK:
        words = report.explain(judged, num_islands, config.num_particles, plural="islands")
        disagree = Finding(Status(int(judged.status)), words, more)
    return findings.combined([undefined, disagree, _lost_mode(found.path, states, more)])


def _lost_mode(path: Any, states: tuple, advised: str) -> Finding | None:
    """Whether a particle, at some level, had a far higher density than any at the end."""
    tops = [state.positions[np.argmax(state.log_ratios)] for state in states]
    every = [state.positions[:: max(len(state.positions) // _COMPARED, 1)] for state in states]
    kept = _log_joints(path, jnp.concatenate([jnp.stack(tops), *every]))
    seen = _log_joints(path, jnp.stack([state.best_position for state in states]))
    above = float(np.max(seen) - np.max(kept))
    if not above > _LOST + tops[0].shape[0] / 2:
        return None
    return Finding(
        Status.POOR_APPROXIMATION,
        f"on the way a particle had a log density {above:.3g} nats above all at the end: a narrow mode was lost",
        advised,
    )


@jax.jit
def _log_joints(path: Any, positions: Any) -> Any:
    return jax.lax.map(lambda position: sum(path.terms(position)), positions)
