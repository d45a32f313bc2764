"""Powers and products of normal mixtures in the plane, on a grid: densities, integrals and masses of cells."""

from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp


class Mixture(NamedTuple):
    weights: np.ndarray  # (k,)
    locs: np.ndarray  # (k, 2)
    covariances: np.ndarray  # (k, 2, 2)


def mixture(weights, locs, covariances) -> Mixture:
    return Mixture(*(np.asarray(value, float) for value in (weights, locs, covariances)))


def log_density(one: Mixture, points, noise=0.0):
    """Log density (...,) at points (..., 2) of a mixture with normal noise of this standard deviation added."""
    terms = []
    for weight, loc, covariance in zip(*one, strict=True):
        spread = covariance + noise**2 * np.eye(2)
        centered = points - loc
        quadratic = np.sum(centered * np.linalg.solve(spread, centered[..., None])[..., 0], axis=-1)
        terms.append(np.log(weight) - 0.5 * quadratic - 0.5 * np.linalg.slogdet(2 * np.pi * spread)[1])
    return logsumexp(terms, axis=0)


def log_product(mixtures, exponents, points, noise=0.0):
    """Sum of log densities times exponents."""
    return sum(a * log_density(one, points, noise) for a, one in zip(exponents, mixtures, strict=True))


class Law(NamedTuple):
    log_integral: float
    mean: np.ndarray  # (2,)
    covariance: np.ndarray  # (2, 2)
    masses: np.ndarray  # (cells, cells)


def law(mixtures, exponents, edges, noise=0.0, reach=9.0, num=901) -> Law:
    """By the trapezoidal rule on [-reach, reach]^2, exact to rounding for smooth laws; cells between edges."""
    axis = np.linspace(-reach, reach, num)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    logs = log_product(mixtures, exponents, points, noise) + 2 * np.log(axis[1] - axis[0])
    log_integral = logsumexp(logs)
    mass = np.exp(logs - log_integral)
    mean = np.einsum("ab,abi->i", mass, points)
    covariance = np.einsum("ab,abi,abj->ij", mass, points - mean, points - mean)
    return Law(log_integral, mean, covariance, cells(points.reshape(-1, 2), mass.ravel(), edges))


def cells(points, mass, edges):
    """Mass (e + 1, e + 1) of the cells of the plane that lines x = edge and y = edge cut out."""
    rows, columns = (np.searchsorted(edges, points[:, i]) for i in (0, 1))
    found = np.zeros((len(edges) + 1, len(edges) + 1))
    np.add.at(found, (rows, columns), mass)
    return found


def fokker_planck_residual(mixtures, exponents, point, noise, drift_fn, rate, step=1e-3):
    r"""Residual of d_u rho = -div(S rho) + Delta rho / 2 + h rho at rho = prod p_i^a_i, over rho; du = -d(noise^2).

    By central differences of fourth order; ``drift_fn(point) -> (2,)``, ``rate`` the number h.
    """

    def density(points, variance=noise**2):
        return np.exp(log_product(mixtures, exponents, points, np.sqrt(variance)) - height)

    def derivative(fn):
        return (8 * (fn(step) - fn(-step)) - fn(2 * step) + fn(-2 * step)) / (12 * step)

    height = log_product(mixtures, exponents, point, noise)
    transport = diffusion = 0.0
    for axis in np.eye(2):
        transport += derivative(
            lambda h, axis=axis: density(point + h * axis) * (drift_fn(point + h * axis) @ axis)
        )
        ends = [density(point + h * axis) for h in step * np.array([-2, -1, 0, 1, 2])]
        diffusion += 0.5 * np.dot([-1, 16, -30, 16, -1], ends) / (12 * step**2)
    change = -derivative(lambda h: density(point, noise**2 + h))
    return change + transport - diffusion - rate
