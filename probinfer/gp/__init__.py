"""Gaussian processes whose hyperparameters are learned from data.

Start with ``hyperparameters.fitting`` (``fit``), which learns and returns a ``Fit`` that predicts. Its pure,
differentiable parts are ``condition`` and ``log_evidence`` in ``approximation``.
"""

from probinfer import kernels
from probinfer.gp.approximation.conditioned import Conditioned
from probinfer.gp.approximation.conditioning import condition, log_evidence
from probinfer.gp.approximation.conjugate import Exact
from probinfer.gp.approximation.iterative import EP, VI, Hybrid
from probinfer.gp.approximation.laplace import Laplace
from probinfer.gp.fitted import Fit
from probinfer.gp.hyperparameters.fitting import fit
from probinfer.gp.hyperparameters.joint import joint_posterior, joint_predictive, latent_values
from probinfer.gp.hyperparameters.point_estimates import MAP, ML2
from probinfer.gp.hyperparameters.posterior import hyper_posterior
from probinfer.gp.model import leaves, likelihoods, means
from probinfer.gp.model.leaves import leaf_names, replace
from probinfer.gp.model.model import Model
from probinfer.gp.model.priors import default_prior, fixed, tie
from probinfer.gp.prediction import calibration
from probinfer.gp.storage import load

__all__ = [
    "EP",
    "MAP",
    "ML2",
    "VI",
    "Conditioned",
    "Exact",
    "Fit",
    "Hybrid",
    "Laplace",
    "Model",
    "calibration",
    "condition",
    "default_prior",
    "fit",
    "fixed",
    "hyper_posterior",
    "joint_posterior",
    "joint_predictive",
    "kernels",
    "latent_values",
    "leaf_names",
    "leaves",
    "likelihoods",
    "load",
    "log_evidence",
    "means",
    "replace",
    "tie",
]
