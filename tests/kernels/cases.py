"""One table of kernels, and the slow pairwise formulas they must equal."""

import jax
import jax.numpy as jnp
import numpy as np

from probinfer import kernels as k


def warp(parameters, X):
    weights, scale = (parameters[name].astype(X.dtype) for name in ("weights", "scale"))
    return scale * jnp.tanh(X @ weights)


def make(dtype):
    """Name -> kernel on three columns, all parameters away from their defaults."""
    scales = jnp.asarray([0.7, 1.3, 2.0], dtype)

    def number(value):
        return jnp.asarray(value, dtype)

    parameters = {"weights": jnp.asarray([[0.5, -0.3], [0.2, 0.9], [-0.4, 0.1]], dtype), "scale": number(1.6)}
    rbf, matern = k.RBF(number(1.7), scales), k.Matern32(number(0.6), number(0.9))
    return {
        "rbf": rbf,
        "rbf_isotropic": k.RBF(number(1.7), number(0.8)),
        "matern12": k.Matern12(number(0.9), scales),
        "matern32": k.Matern32(number(1.1), scales),
        "matern52": k.Matern52(number(1.3), scales),
        "rational_quadratic": k.RationalQuadratic(number(1.2), scales, number(0.7)),
        "inverse_multiquadric": k.InverseMultiquadric(number(1.4), scales, number(0.6)),
        "periodic": k.Periodic(number(0.8), scales, jnp.asarray([1.5, 2.5, 3.0], dtype)),
        "linear": k.Linear(scales),
        "polynomial": k.Polynomial(number(0.4), number(1.5), degree=3),
        "constant": k.Constant(number(2.0)),
        "white": k.White(number(0.3)),
        "sum": rbf + matern + k.Linear(number(0.5)),
        "product": rbf * k.Periodic(number(1.1), number(2.0), number(1.3)),
        "scaled": number(2.5) * matern,
        "active": k.RBF(number(1.4), jnp.asarray([0.7, 1.9], dtype)).on((2, 0)),
        "warped": k.Warped(
            k.Matern52(number(1.2), jnp.asarray([0.5, 0.8], dtype)), jax.tree_util.Partial(warp, parameters)
        ),
    }


NAMES = tuple(make(jnp.float32))
SIMPLE = NAMES[: NAMES.index("sum")]  # composed kernels inherit what holds for these


def inputs(dtype, n=7, seed=0):
    X = np.random.default_rng(seed).normal(size=(n, 3))
    X[4] = X[1]  # a duplicate: zero distance off the diagonal
    return jnp.asarray(X, dtype)


def oracle(kernel, x, z, same):
    """k(x, z) from the textbook formula in NumPy; ``same`` says that it is one observation, not two at one place."""
    name = type(kernel).__name__
    if name in ("Sum", "Product"):
        parts = [oracle(part, x, z, same) for part in (kernel.terms if name == "Sum" else kernel.factors)]
        return np.sum(parts) if name == "Sum" else np.prod(parts)
    if name == "Scaled":
        return float(kernel.variance) * oracle(kernel.kernel, x, z, same)
    if name == "ActiveDims":
        return oracle(kernel.kernel, x[list(kernel.dims)], z[list(kernel.dims)], same)
    if name == "Warped":
        return oracle(kernel.kernel, *(np.asarray(kernel.fn(jnp.asarray(p[None]))[0]) for p in (x, z)), same)
    variance = np.asarray(kernel.variance, np.float64)
    if name == "Linear":
        return np.sum(variance * x * z)
    if name == "Polynomial":
        return (variance * x @ z + float(kernel.offset)) ** kernel.degree
    if name == "Constant":
        return variance
    if name == "White":
        return variance * same
    if name == "Periodic":
        waves = np.sin(np.pi * (x - z) / np.asarray(kernel.period)) / np.asarray(kernel.lengthscale)
        return variance * np.exp(-2 * np.sum(waves**2))
    r = np.sqrt(np.sum(((x - z) / np.asarray(kernel.lengthscale)) ** 2))
    if name == "RationalQuadratic":
        return variance * (1 + r**2 / (2 * float(kernel.alpha))) ** -float(kernel.alpha)
    if name == "InverseMultiquadric":
        return variance * (1 + r**2) ** -float(kernel.exponent)
    profile = {
        "RBF": lambda: np.exp(-(r**2) / 2),
        "Matern12": lambda: np.exp(-r),
        "Matern32": lambda: (1 + np.sqrt(3) * r) * np.exp(-np.sqrt(3) * r),
        "Matern52": lambda: (1 + np.sqrt(5) * r + 5 * r**2 / 3) * np.exp(-np.sqrt(5) * r),
    }
    return variance * profile[name]()
