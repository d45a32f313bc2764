"""Gaussian processes: hyperparameters learned, not chosen.

``fit`` does the whole job; ``condition`` and ``log_evidence`` are its pure, differentiable pieces.
"""

from probinfer import kernels
from probinfer.gp import calibration, leaves, likelihoods, means
from probinfer.gp.condition import condition, log_evidence
from probinfer.gp.conditioned import Conditioned
from probinfer.gp.conjugate import Exact
from probinfer.gp.fit import fit
from probinfer.gp.fitted import Fit
from probinfer.gp.hyper_posterior import hyper_posterior
from probinfer.gp.iterative import EP, VI, Hybrid
from probinfer.gp.joint import joint_posterior, joint_predictive, latent_values
from probinfer.gp.laplace import Laplace
from probinfer.gp.learn import MAP, ML2
from probinfer.gp.leaves import leaf_names, replace
from probinfer.gp.model import Model
from probinfer.gp.priors import default_prior, fixed, tie
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
