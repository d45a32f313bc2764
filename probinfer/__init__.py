"""Bayesian inference in JAX that tunes itself and checks itself."""

__version__ = "0.1.0"
