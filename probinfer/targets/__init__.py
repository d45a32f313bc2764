"""Targets: a log density on unconstrained space with its bijectors, starting points and names.

A ``Target`` is what every engine takes. Where the model says so, it also carries a normalized prior and the log
likelihood apart, which tempering needs. All its functions are pytrees that hold their data as leaves: a target is an
*argument* of jitted code, and a target of the same model with new data of the same shape traces nothing.
"""

from probinfer.core.binding import LogDensity, StochasticLogDensity
from probinfer.targets.base import Prior, Target
from probinfer.targets.constructors import from_logdensity, from_numpyro, from_prior
from probinfer.targets.minibatches import minibatch

__all__ = [
    "LogDensity",
    "Prior",
    "StochasticLogDensity",
    "Target",
    "from_logdensity",
    "from_numpyro",
    "from_prior",
    "minibatch",
]
