"""Likelihoods p(y | f), factorising over the data.

A likelihood is a registered class whose leaves are its parameters. What inference asks of it is in ``moments``; how to
write one is in ``base``.
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
