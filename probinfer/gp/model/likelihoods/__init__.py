"""Likelihoods p(y | f), factorizing over the data.

A likelihood is a registered class whose leaves are its parameters. ``base`` explains how to write one; ``moments``
computes the expectations that inference needs.
"""

from probinfer.gp.model.likelihoods import base, moments
from probinfer.gp.model.likelihoods.base import FromLogDensity, Likelihood
from probinfer.gp.model.likelihoods.bernoulli import Bernoulli
from probinfer.gp.model.likelihoods.counts import NegativeBinomial, Poisson
from probinfer.gp.model.likelihoods.gaussian import Gaussian, KnownNoise, gaussian_log_prob
from probinfer.gp.model.likelihoods.student_t import StudentT

__all__ = [
    "Bernoulli",
    "FromLogDensity",
    "Gaussian",
    "KnownNoise",
    "Likelihood",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
    "base",
    "gaussian_log_prob",
    "moments",
]
