"""Sizes and seeds of every fault and every check: fixed here, the same for all of them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CLOUDS", "CLOUDS_SMALL", "COINS", "COINS_SMALL", "FULL", "SMALL", "MutationSettings"]


class MutationSettings(NamedTuple):
    """The settings of one table."""

    level: float = 0.05
    """Probability of a false alarm that every check is asked for."""
    simulations: int = 300
    """Simulated data sets of a rank check, and lanes of a joint test."""
    draws: int = 63
    """Posterior draws for each data set."""
    num_states: int = 15
    """States of a chain in a joint test, beside its start."""
    sample: int = 200
    """Independent posterior draws at one data set for a discrepancy, and as many reference draws."""
    runs: int = 1000
    """Estimates of an evidence from either side, each at a data set of its own."""
    repetitions: int = 60
    """Of every fault: each time new data sets and new draws."""
    slow_repetitions: int = 40
    """Of every fault for the classifier."""
    null_repetitions: int = 2000
    """Without a fault, for the rank checks of the first model; half as many for the joint tests."""
    slow_null_repetitions: int = 300
    """Without a fault, for the checks of draws at one data set."""
    other_null_repetitions: int = 150
    """Without a fault, for the other models and kernels."""
    seed: int = 20261121
    """Of everything."""


FULL = MutationSettings()
# That everything runs.
SMALL = FULL._replace(
    repetitions=3, slow_repetitions=1, null_repetitions=6, slow_null_repetitions=3, other_null_repetitions=3
)

# Of the table of particle methods, most of whose time is compilation.
CLOUDS = FULL._replace(draws=31, repetitions=40, null_repetitions=100, other_null_repetitions=60)
CLOUDS_SMALL = CLOUDS._replace(repetitions=2, null_repetitions=3, other_null_repetitions=2)

# Of the table of coin samplers, which are run for every data set.
COINS = FULL._replace(simulations=100, repetitions=36, null_repetitions=60)
COINS_SMALL = COINS._replace(repetitions=2, null_repetitions=2)
