"""Predictive distributions: pointwise mixtures over hyperparameter draws.

Each draw of the hyperparameters gives a Gaussian for the latent function at each new point, which the likelihood turns
into a distribution of the output; the posterior predictive is the mixture over draws. Its log density is the log of the
mean over draws, not the mean of the logs, and its quantiles invert the distribution function of the mixture.
"""

from probinfer.gp.prediction.classes import BernoulliMixture
from probinfer.gp.prediction.function import LatentMoments
from probinfer.gp.prediction.latent import CountMixture, LatentMixture
from probinfer.gp.prediction.normal import NormalMixture

__all__ = ["BernoulliMixture", "CountMixture", "LatentMixture", "LatentMoments", "NormalMixture"]
