"""Predictive distributions: pointwise mixtures over hyperparameter draws.

A draw of the hyperparameters gives a Gaussian for the latent function at each new point, and the likelihood turns it
into a distribution of the output; the posterior predictive is the mixture over draws. Its log density is the log of the
mean over draws, never the mean of the logs, and its quantiles are found by inverting the mixture's distribution
function.
"""

from probinfer.gp.prediction.classes import BernoulliMixture
from probinfer.gp.prediction.function import LatentMoments
from probinfer.gp.prediction.latent import CountMixture, LatentMixture
from probinfer.gp.prediction.normal import NormalMixture

__all__ = ["BernoulliMixture", "CountMixture", "LatentMixture", "LatentMoments", "NormalMixture"]
