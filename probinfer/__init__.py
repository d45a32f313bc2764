"""Bayesian inference in JAX that tunes itself and checks itself."""

from probinfer import targets
from probinfer.posterior import Posterior

__all__ = ["Posterior", "targets"]

__version__ = "0.1.0"
