"""The one table of the library's engines for learning hyperparameters: a new engine is one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from probinfer import gp, mcmc, vi

__all__ = ["ENGINES", "Entry", "engine_names", "find_engine"]


class Entry(NamedTuple):
    """An engine, as reports and the command line know it.

    Attributes:
        name: what a user types.
        label: what a table says.
        make: (draws of a chain) -> engine.
        about: what it does, in one clause.
    """

    name: str
    label: str
    make: Callable[[int], Any]
    about: str

    @property
    def style(self) -> int:
        """Its place in the palette of the plots."""
        return engine_names().index(self.name)


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
        "fits one correlated normal to them",
    ),
    Entry(
        "mean-field",
        "mean-field VI",
        lambda draws: vi.MeanField(num_draws=4 * draws),
        "fits one normal without correlations",
    ),
    Entry("map", "MAP", lambda draws: gp.MAP(), "takes the single most probable setting"),
    Entry(
        "ml2",
        "ML-II",
        lambda draws: gp.ML2(),
        "takes the setting that explains the training data best, no prior",
    ),
)


def engine_names() -> tuple[str, ...]:
    """The names that a user can type."""
    return tuple(entry.name for entry in ENGINES)


def find_engine(name: str) -> Entry:
    """The entry of a name.

    Raises:
        ValueError: there is no such engine.
    """
    for entry in ENGINES:
        if entry.name == name:
            return entry
    raise ValueError(f"no engine is called {name!r}; choose one of {', '.join(engine_names())}")
