"""Likelihoods p(y | f), factorising over the data.

A likelihood is a registered class whose leaves are its parameters. What inference asks of it is in ``moments``; how to
write one is in ``base``.
"""

from probinfer.gp.likelihoods import base, moments
from probinfer.gp.likelihoods.base import FromLogDensity, Likelihood
from probinfer.gp.likelihoods.bernoulli import Bernoulli
from probinfer.gp.likelihoods.counts import NegativeBinomial, Poisson
from probinfer.gp.likelihoods.gaussian import Gaussian, KnownNoise, gaussian_log_prob
from probinfer.gp.likelihoods.student_t import StudentT

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
