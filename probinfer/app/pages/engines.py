"""The one table of the library's engines: reports, commands and benchmarks read it, a new engine is one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from probinfer import coin, gp, mcmc, smc, vi
from probinfer.app.suite.known_targets import CORRELATED, NOT_NORMAL
from probinfer.plots.style import LIGHT

__all__ = [
    "ENGINES",
    "PLANE_ENGINES",
    "STATE_SPACE_ENGINES",
    "Entry",
    "engine_names",
    "find_engine",
    "gradients_spent",
    "target_engines",
]


class Entry(NamedTuple):
    """An engine, as reports and the command line know it.

    Attributes:
        name: what a user types.
        label: what a table says.
        make: (draws of a chain) -> engine. One that has not four chains draws four times as many in all.
        about: what it does, in one clause.
        any_target: takes any target; else it learns the hyperparameters of a Gaussian process only.
        is_point: its posterior is one draw, without a spread.
        in_demo: the demo shows it beside the others.
        gives_evidence: its log evidence is an estimate, with independent ones of its islands in ``info.log_evidences``.
        cannot: what its posterior cannot be, by the names in ``checks.known``: there it should fail its checks.
        because: why, where it is not that it fits a normal.
        fits_normal: its draws are those of a normal, widened and weighted where that helps: their density is known.
        keeps_apart: its particles repel each other: better spread than independent draws, so ranks do not judge them.
    """

    name: str
    label: str
    make: Callable[[int], Any]
    about: str
    any_target: bool = True
    is_point: bool = False
    in_demo: bool = True
    gives_evidence: bool = False
    cannot: tuple[str, ...] = ()
    because: str = ""
    fits_normal: bool = False
    keeps_apart: bool = False

    @property
    def style(self) -> int:
        """Its place in the palette of the plots."""
        return engine_names().index(self.name) % len(LIGHT.series)


_PARTICLES = 200  # of coin samplers, whose draws are spread better than independent ones


def _tempered(draws: int) -> smc.Tempered:
    """As many particles in all as four chains have draws, rounded up to what its settings allow."""
    islands = smc.Tempered().num_islands
    return smc.Tempered(num_particles=max(32, -(-4 * draws // (8 * islands)) * 8))


# The first is the reference of comparisons.
ENGINES = (
    Entry(
        "nuts",
        "NUTS",
        lambda draws: mcmc.NUTS(num_draws=draws),
        "samples every plausible setting (the reference)",
    ),
    Entry(
        "full-rank",
        "full-rank VI",
        lambda draws: vi.FullRank(num_draws=4 * draws),
        "fits one correlated normal to them, and weighs its draws",
        fits_normal=True,
    ),
    Entry(
        "mean-field",
        "mean-field VI",
        lambda draws: vi.MeanField(num_draws=4 * draws),
        "fits one normal without correlations, and weighs its draws",
        cannot=(CORRELATED,),
        fits_normal=True,
    ),
    Entry("map", "MAP", lambda draws: vi.MAP(), "takes the single most probable setting", is_point=True),
    Entry(
        "ml2",
        "ML-II",
        lambda draws: gp.ML2(),
        "takes the setting that explains the training data best, no prior",
        any_target=False,
        is_point=True,
    ),
    Entry(
        "hmc",
        "HMC",
        lambda draws: mcmc.HMC(num_draws=draws),
        "samples every plausible setting, by trajectories of jittered length",
        in_demo=False,
    ),
    Entry(
        "tempered",
        "tempered SMC",
        _tempered,
        "moves particles from the prior to the posterior, and estimates the evidence",
        in_demo=False,
        gives_evidence=True,
    ),
    Entry(
        "coin",
        "coin SVGD",
        lambda draws: coin.SVGD(num_particles=min(_PARTICLES, 4 * draws)),
        "carries particles that push one another apart, without a learning rate",
        in_demo=False,
        keeps_apart=True,
    ),
    Entry(
        "ksd-descent",
        "KSD descent",
        lambda draws: coin.KSDDescent(num_particles=min(_PARTICLES, 4 * draws)),
        "carries particles down their kernel Stein discrepancy",
        in_demo=False,
        cannot=(NOT_NORMAL,),
        because="can rest far from the posterior, where the discrepancy is level",
        keeps_apart=True,
    ),
)

# Engines for one or two dimensions: `probinfer check` judges them on a target of their own.
PLANE_ENGINES = (
    Entry(
        "lawgd",
        "LAWGD",
        lambda draws: coin.LAWGD(num_particles=min(100, 4 * draws)),
        "carries particles by the slow functions of the density, found on a grid",
        any_target=False,
    ),
)

# Engines for ``smc.Parameters``: `probinfer check` judges them on a model of their own.
STATE_SPACE_ENGINES = (
    Entry(
        "pmmh",
        "PMMH",
        lambda draws: smc.PMMH(num_draws=draws),
        "walks through the parameters, their likelihood estimated by a particle filter",
        any_target=False,
    ),
    Entry(
        "smc2",
        "SMC^2",
        lambda draws: smc.SMC2(num_parameters=max(64, draws // 8)),
        "moves weighted parameters through the data, a particle filter each",
        any_target=False,
        gives_evidence=True,
    ),
    Entry(
        "particle-gibbs",
        "particle Gibbs",
        lambda draws: smc.ParticleGibbs(num_draws=max(64, draws // 4)),
        "draws path and parameters in turn",
        any_target=False,
    ),
)


def engine_names() -> tuple[str, ...]:
    """The names that a user can type."""
    return tuple(entry.name for entry in ENGINES)


def target_engines() -> tuple[Entry, ...]:
    """The engines that take any target."""
    return tuple(entry for entry in ENGINES if entry.any_target)


def find_engine(name: str) -> Entry:
    """The entry of a name.

    Raises:
        ValueError: there is no such engine.
    """
    for entry in ENGINES:
        if entry.name == name:
            return entry
    raise ValueError(f"no engine is called {name!r}; choose one of {', '.join(engine_names())}")


def gradients_spent(info: Any) -> int | None:
    """Gradients of the log density that a posterior took, warm-up and all chains or restarts included.

    Args:
        info: of the posterior. A new engine reports ``num_gradients``; Markov chains have ``num_leapfrogs`` and
            ``num_warmup_gradients``, mode searches ``num_evaluations``.

    Returns:
        The count, None if the engine does not say.
    """
    for names in (("num_gradients",), ("num_warmup_gradients", "num_leapfrogs"), ("num_evaluations",)):
        found = [getattr(info, name, None) for name in names]
        if all(count is not None for count in found):
            return sum(int(np.sum(np.asarray(count))) for count in found)
    return None
