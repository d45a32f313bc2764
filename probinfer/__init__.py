"""Bayesian inference in JAX that tunes itself and checks itself."""

from probinfer.posterior import Posterior

__all__ = ["Posterior"]

__version__ = "0.1.0"
