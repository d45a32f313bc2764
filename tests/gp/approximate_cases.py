"""Five points under every method: one jitted evaluation per pair of method and likelihood, shared by all tests.

Compilation is the cost, so hyperparameters, data and first sites are arguments, and every model has the same structure.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from probinfer import gp
from probinfer.gp.approximation.sites import Sites
from tests.reference.likelihoods import LOG_DENSITIES

X = np.array([-1.5, -0.4, 0.3, 1.1, 2.0])[:, None]
SETTING_A, SETTING_B = (1.7, 0.9), (40.0, 1.0)  # variance, lengthscale
OUTPUTS = {
    "probit": np.array([0.0, 0, 1, 0, 1]),
    "logit": np.array([0.0, 0, 1, 0, 1]),
    "poisson": np.array([0.0, 2, 1, 4, 3]),
    "student": np.array([-1.2, 0.4, 0.5, 3.0, 0.9]),
    "gaussian": np.array([-1.2, 0.4, 0.5, 1.3, 0.9]),
}
LIKELIHOODS = {
    "probit": gp.likelihoods.Bernoulli(),
    "logit": gp.likelihoods.Bernoulli("logit"),
    "poisson": gp.likelihoods.Poisson(),
    "student": gp.likelihoods.StudentT(0.5, 4.0),
    "gaussian": gp.likelihoods.Gaussian(0.3),
}
PARAMETERS = {"probit": (), "logit": (), "poisson": (), "student": (0.5, 4.0), "gaussian": (0.3,)}
NODES = 256
METHODS = {
    "Laplace": gp.Laplace(num_nodes=NODES),
    "EP": gp.EP(num_nodes=NODES, tolerance=1e-12),
    "PEP .5": gp.EP(0.5, num_nodes=NODES, tolerance=1e-12),
    "VI": gp.VI(num_nodes=NODES, tolerance=1e-12),
    "partial": gp.Hybrid("partial", num_nodes=NODES, tolerance=1e-12),
    "total": gp.Hybrid(num_nodes=NODES, tolerance=1e-12),
}
UNUSED = 1e-30  # the variance of a kernel that is present for the structure only

# Unoptimized code computes the same and compiles in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def model(likelihood, setting=SETTING_A, matern=False, mean=0.0):
    """A squared exponential or a Matern-5/2 kernel, in one structure."""
    variance, lengthscale = setting
    first, second = (UNUSED, variance) if matern else (variance, UNUSED)
    kernel = gp.kernels.RBF(first, lengthscale) + gp.kernels.Matern52(second, lengthscale)
    return gp.Model(kernel, likelihood, gp.means.Constant(mean))


@jit
def _evaluate(inference, model, X, y, sites):
    def value(model, X):
        conditioned = gp.condition(model, X, y, inference, sites=sites)
        return conditioned.log_evidence, (conditioned, conditioned.predict(jnp.full((1, 1), 0.5, X.dtype)))

    (_, auxiliary), gradients = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(model, X)
    return *auxiliary, *gradients


def evaluate(inference, model, y, X=X, sites=None, dtype=None):
    """(conditioned, prediction at 0.5, gradient in the model, gradient in X)."""
    dtype = dtype or jnp.result_type(float)
    X, y = jnp.asarray(X, dtype), jnp.asarray(y, dtype)
    if sites is None:
        sites = Sites(jnp.zeros_like(y), jnp.zeros_like(y))
    return _evaluate(inference, jax.tree.map(lambda leaf: leaf.astype(dtype), model), X, y, sites)


@functools.cache
def case(method, name, setting=SETTING_A):
    """``evaluate`` of a method on a likelihood's outputs."""
    return evaluate(METHODS[method], model(LIKELIHOODS[name], setting), OUTPUTS[name])


def log_gradient(gradient, model):
    """(d/dlog lengthscale, d/dlog variance) of a sum of two kernels that share both."""
    pairs = list(zip(gradient.kernel.terms, model.kernel.terms))
    lengthscale = sum(float(g.lengthscale * k.lengthscale) for g, k in pairs)
    variance = sum(float(g.variance * k.variance) for g, k in pairs)
    return np.array([lengthscale, variance])


def problem(name, setting=SETTING_A, X=X, y=None, mean=0.0, parameters=None):
    """The same problem for the oracle: covariance, prior mean and log densities."""
    variance, lengthscale = setting
    y = OUTPUTS[name] if y is None else y
    parameters = PARAMETERS[name] if parameters is None else parameters
    K = variance * np.exp(-0.5 * ((X - X.T) / lengthscale) ** 2)
    densities = [lambda f, yi=yi: LOG_DENSITIES[name](yi, f, *parameters) for yi in y]
    return K, np.full(len(X), mean), densities
