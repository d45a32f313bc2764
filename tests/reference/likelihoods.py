"""Likelihoods written out with scipy, their integrals by adaptive quadrature, and the probit in extended precision."""

import itertools

import numpy as np
from scipy import integrate, special

LOG_DENSITIES = {
    "probit": lambda y, f: special.log_ndtr((2 * y - 1) * f),
    "logit": lambda y, f: -np.logaddexp(0.0, -(2 * y - 1) * f),
    "poisson": lambda y, f: y * f - np.exp(f) - special.gammaln(y + 1),
    "negative binomial": lambda y, f, a: (
        special.gammaln(y + 1 / a)
        - special.gammaln(1 / a)
        - special.gammaln(y + 1)
        + y * f
        + y * np.log(a)
        - (y + 1 / a) * np.log1p(a * np.exp(f))
    ),
    "student": lambda y, f, scale, df: (
        special.gammaln((df + 1) / 2)
        - special.gammaln(df / 2)
        - 0.5 * np.log(df * np.pi)
        - np.log(scale)
        - (df + 1) / 2 * np.log1p(((y - f) / scale) ** 2 / df)
    ),
    "gaussian": lambda y, f, variance: -0.5 * np.log(2 * np.pi * variance) - 0.5 * (y - f) ** 2 / variance,
}


def integrals(log_weight, m, v, functions=()):
    """Log ∫ exp(log_weight(f)) N(f; m, v) df, and the normalized expectations of ``functions``."""
    sd = np.sqrt(v)
    z = np.linspace(-40, 40, 16001)
    log_terms = log_weight(m + sd * z) - 0.5 * z**2
    top, peak = log_terms.max(), z[log_terms.argmax()]
    inside = z[log_terms > top - 45]
    low, high = inside[0] - 0.01, inside[-1] + 0.01

    def moment(function):
        def integrand(z):
            return np.exp(log_weight(m + sd * z) - 0.5 * z**2 - top) * function(m + sd * z)

        knots = [
            low,
            *(peak + np.array([-1.0, -0.1, 0.0, 0.1, 1.0]) * min(1.0, peak - low, high - peak)),
            high,
        ]
        return sum(
            integrate.quad(integrand, a, b, epsabs=1e-15, epsrel=1e-12, limit=200)[0]
            for a, b in itertools.pairwise(knots)
        )

    total = moment(lambda f: 1.0)
    log_total = np.log(total) + top - 0.5 * np.log(2 * np.pi)
    return log_total, *(moment(function) / total for function in functions)


def log_ndtr_derivatives(z):
    """First three derivatives of log Φ in extended precision, by continued fraction, power or asymptotic series."""
    z = np.longdouble(z)
    hazard = _hazard(z)
    kappa = _kappa(-z) if z < -1.5 else z + hazard
    first, second = hazard, -hazard * kappa
    if z > -60:
        third = hazard * (kappa * (hazard + kappa) - 1)
    else:
        # log Φ(−t) = −t²/2 − log t − ½ log 2π − 1/t² + 5/(2 t⁴) − 37/(3 t⁶) + 353/(4 t⁸) − ...
        coefficients = {1: -1.0, 2: 5 / 2, 3: -37 / 3, 4: 353 / 4}
        t = -z
        third = 2 / t**3 + sum(
            c * 2 * k * (2 * k + 1) * (2 * k + 2) / t ** (2 * k + 3) for k, c in coefficients.items()
        )
    return float(first), float(second), float(third)


def _hazard(z):
    if z < -1.5:
        return -z + _kappa(-z)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.longdouble("3.14159265358979323846264"))
    # Φ(z) = ½ + φ(z) (z + z³/3 + z⁵/15 + ...)
    term, total, k = z, z, 1
    while abs(term) > 1e-22 * abs(total) and k < 2000:
        term = term * z**2 / (2 * k + 1)
        total, k = total + term, k + 1
    return density / (np.longdouble(0.5) + density * total)


def _kappa(t):
    value = np.longdouble(0)
    for n in range(6000, 0, -1):
        value = n / (t + value)
    return value
