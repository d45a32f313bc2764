"""The table of the library's engines, used by reports, commands and benchmarks: a new engine needs one entry here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from probinfer import coin, gp, mcmc, smc, vi
from probinfer.app.suite.known_targets import CORRELATED, NOT_NORMAL
from probinfer.plots.style import LIGHT

__all__ = [
    "ENGINES",
    "LOW_DIMENSIONAL_ENGINES",
    "STATE_SPACE_ENGINES",
    "EngineEntry",
    "count_gradients",
    "engine_names",
    "find_engine",
    "target_engines",
]


class EngineEntry(NamedTuple):
    """An engine, as reports and the command line present it.

    Attributes:
        name: name on the command line.
        label: name in tables.
        make: number of draws per chain -> engine. Engines without four chains draw four times as many in total.
        about: one clause on what it does.
        any_target: whether it takes any target; else only hyperparameters of a Gaussian process, or models of its own.
        is_point: whether its posterior is a single point.
        in_demo: whether the demo shows it.
        estimates_evidence: whether it estimates the log evidence, with independent estimates of its islands in
            ``info.log_evidences``.
        limitations: features of targets (``CORRELATED``, ``NOT_NORMAL``) that its posterior cannot represent; it must
            fail the checks on such targets.
        limitation_reason: the reason, if it is not that the engine fits a normal.
        fits_normal: whether its draws come from a (possibly widened) normal, so that their density is known.
        repels: whether its particles repel each other: they are more even than independent draws, so that rank
            statistics do not apply to them.
    """

    name: str
    label: str
    make: Callable[[int], Any]
    about: str
    any_target: bool = True
    is_point: bool = False
    in_demo: bool = True
    estimates_evidence: bool = False
    limitations: tuple[str, ...] = ()
    limitation_reason: str = ""
    fits_normal: bool = False
    repels: bool = False

    @property
    def style(self) -> int:
        """Index of its color in the palette of the plots."""
        return engine_names().index(self.name) % len(LIGHT.series)


_MAX_PARTICLES = 200  # of coin samplers, whose particles are more even than independent draws


def _tempered(draws: int) -> smc.Tempered:
    """Return tempered SMC with as many particles in total as four chains have draws, rounded up to a multiple of 8."""
    islands = smc.Tempered().num_islands
    return smc.Tempered(num_particles=max(32, -(-4 * draws // (8 * islands)) * 8))


# The first engine is the reference of comparisons.
ENGINES = (
    EngineEntry(
        name="nuts",
        label="NUTS",
        make=lambda draws: mcmc.NUTS(num_draws=draws),
        about="samples the posterior of the hyperparameters (the reference)",
    ),
    EngineEntry(
        name="full-rank",
        label="full-rank VI",
        make=lambda draws: vi.FullRank(num_draws=4 * draws),
        about="fits a normal with full covariance, and weights its draws",
        fits_normal=True,
    ),
    EngineEntry(
        name="mean-field",
        label="mean-field VI",
        make=lambda draws: vi.MeanField(num_draws=4 * draws),
        about="fits a normal with diagonal covariance, and weights its draws",
        limitations=(CORRELATED,),
        fits_normal=True,
    ),
    EngineEntry(
        name="map", label="MAP", make=lambda draws: vi.MAP(), about="finds the posterior mode", is_point=True
    ),
    EngineEntry(
        name="ml2",
        label="ML-II",
        make=lambda draws: gp.ML2(),
        about="maximizes the evidence over the hyperparameters, without a prior",
        any_target=False,
        is_point=True,
    ),
    EngineEntry(
        name="hmc",
        label="HMC",
        make=lambda draws: mcmc.HMC(num_draws=draws),
        about="samples the posterior by Hamiltonian trajectories of jittered length",
        in_demo=False,
    ),
    EngineEntry(
        name="tempered",
        label="tempered SMC",
        make=_tempered,
        about="moves particles from the prior to the posterior, and estimates the evidence",
        in_demo=False,
        estimates_evidence=True,
    ),
    EngineEntry(
        name="coin",
        label="coin SVGD",
        make=lambda draws: coin.SVGD(num_particles=min(_MAX_PARTICLES, 4 * draws)),
        about="transports particles that repel each other, without a learning rate",
        in_demo=False,
        repels=True,
    ),
    EngineEntry(
        name="ksd-descent",
        label="KSD descent",
        make=lambda draws: coin.KSDDescent(num_particles=min(_MAX_PARTICLES, 4 * draws)),
        about="transports particles by descent of their kernel Stein discrepancy",
        in_demo=False,
        limitations=(NOT_NORMAL,),
        limitation_reason="can stop far from the posterior, where the discrepancy is flat",
        repels=True,
    ),
)

# Engines for one or two dimensions: `probinfer check` tests them on a separate target.
LOW_DIMENSIONAL_ENGINES = (
    EngineEntry(
        name="lawgd",
        label="LAWGD",
        make=lambda draws: coin.LAWGD(num_particles=min(100, 4 * draws)),
        about="transports particles by eigenfunctions of the Langevin generator, computed on a grid",
        any_target=False,
    ),
)

# Engines for ``smc.Parameters``: `probinfer check` tests them on a state-space model.
STATE_SPACE_ENGINES = (
    EngineEntry(
        name="pmmh",
        label="PMMH",
        make=lambda draws: smc.PMMH(num_draws=draws),
        about="samples parameters by a random walk, with likelihoods estimated by a particle filter",
        any_target=False,
    ),
    EngineEntry(
        name="smc2",
        label="SMC^2",
        make=lambda draws: smc.SMC2(num_parameters=max(64, draws // 8)),
        about="moves weighted parameters through the data, each with a particle filter",
        any_target=False,
        estimates_evidence=True,
    ),
    EngineEntry(
        name="particle-gibbs",
        label="particle Gibbs",
        make=lambda draws: smc.ParticleGibbs(num_draws=max(64, draws // 4)),
        about="samples the path and the parameters in turn",
        any_target=False,
    ),
)


def engine_names() -> tuple[str, ...]:
    """Return the names of the engines on the command line."""
    return tuple(entry.name for entry in ENGINES)


def target_engines() -> tuple[EngineEntry, ...]:
    """Return the engines that take any target."""
    return tuple(entry for entry in ENGINES if entry.any_target)


def find_engine(name: str) -> EngineEntry:
    """Return the entry of this name.

    Raises:
        ValueError: no engine has this name.
    """
    for entry in ENGINES:
        if entry.name == name:
            return entry
    raise ValueError(f"no engine is called {name!r}; choose one of {', '.join(engine_names())}")


def count_gradients(info: Any) -> int | None:
    """Count the gradient evaluations of a fit, including warm-up and all chains or restarts.

    Args:
        info: ``info`` of the posterior, with ``num_gradients``; or ``num_leapfrogs`` and ``num_warmup_gradients``
            (Markov chains); or ``num_evaluations`` (mode searches).

    Returns:
        The count; None if ``info`` does not report it.
    """
    for names in (("num_gradients",), ("num_warmup_gradients", "num_leapfrogs"), ("num_evaluations",)):
        counts = [getattr(info, name, None) for name in names]
        if all(count is not None for count in counts):
            return sum(int(np.sum(np.asarray(count))) for count in counts)
    return None
