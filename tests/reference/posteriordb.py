"""Slow log densities of the ported posteriordb models: NumPy loops, scipy's laws, unconstraining maps by hand.

Each takes an unconstrained position (a dict) and the contents of a data file; it returns the constrained values and the
log density of the position: prior and likelihood of the values plus the log Jacobian of the map.
"""

from itertools import pairwise

import numpy as np
from scipy import stats
from scipy.special import expit, logsumexp


def positive(z):
    return np.exp(z), float(np.sum(z))


def unit(z):
    value = expit(z)
    return value, float(np.log(value) + np.log(1 - value))


def simplex2(z):
    """(1,) -> a point of the simplex of two; Lebesgue measure on its first coordinate."""
    value, log_jacobian = unit(z[0])
    return np.array([value, 1 - value]), log_jacobian


def ordered2(z):
    return np.array([z[0], z[0] + np.exp(z[1])]), float(z[1])


def positive_ordered2(z):
    """Exponentials of an ordered vector."""
    logs, log_jacobian = ordered2(z)
    return np.exp(logs), float(np.sum(logs)) + log_jacobian


def normal(x, loc, scale):
    return float(np.sum(stats.norm.logpdf(x, loc, scale)))


def ark(z, data):
    sigma, jacobian = positive(z["sigma"])
    y, alpha, beta = data["y"], z["alpha"], z["beta"]
    log_p = normal(alpha, 0, 10) + normal(beta, 0, 10) + stats.halfcauchy.logpdf(sigma, scale=2.5)
    for t in range(data["K"], data["T"]):
        mean = alpha
        for k in range(data["K"]):
            mean = mean + beta[k] * y[t - k - 1]
        log_p += normal(y[t], mean, sigma)
    return {**z, "sigma": sigma}, log_p + jacobian


def arma11(z, data):
    sigma, jacobian = positive(z["sigma"])
    y, mu, phi, theta = data["y"], z["mu"], z["phi"], z["theta"]
    log_p = normal(mu, 0, 10) + normal(phi, 0, 2) + normal(theta, 0, 2)
    log_p += stats.halfcauchy.logpdf(sigma, scale=2.5)
    nu = mu + phi * mu
    error = y[0] - nu
    log_p += normal(error, 0, sigma)
    for t in range(1, data["T"]):
        nu = mu + phi * y[t - 1] + theta * error
        error = y[t] - nu
        log_p += normal(error, 0, sigma)
    return {**z, "sigma": sigma}, log_p + jacobian


def eight_schools(z, data):
    tau, jacobian = positive(z["tau"])
    log_p = normal(z["z"], 0, 1) + normal(z["mu"], 0, 5) + stats.halfcauchy.logpdf(tau, scale=5)
    theta = z["mu"] + tau * z["z"]
    return {**z, "tau": tau, "theta": theta}, log_p + normal(data["y"], theta, data["sigma"]) + jacobian


def gp_regr(z, data, noise_power=1):
    (rho, j1), (alpha, j2), (sigma, j3) = (positive(z[name]) for name in ("rho", "alpha", "sigma"))
    log_p = stats.gamma.logpdf(rho, 25, scale=1 / 4)
    log_p += stats.halfnorm.logpdf(alpha, scale=2) + stats.halfnorm.logpdf(sigma, scale=1)
    x, size = data["x"], data["N"]
    covariance = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            covariance[i, j] = alpha**2 * np.exp(-((x[i] - x[j]) ** 2) / (2 * rho**2))
        covariance[i, i] += sigma**noise_power
    log_p += stats.multivariate_normal.logpdf(data["y"], np.zeros(size), covariance)
    return {"rho": rho, "alpha": alpha, "sigma": sigma}, log_p + j1 + j2 + j3


def hmm_example(z, data):
    """Sums over all paths of hidden states, one by one."""
    (theta1, j1), (theta2, j2) = simplex2(z["theta1"]), simplex2(z["theta2"])
    mu, j3 = positive_ordered2(z["mu"])
    transition, y = np.log(np.stack([theta1, theta2])), data["y"]
    paths = []
    for path in np.ndindex(*(2,) * data["N"]):
        moves = sum(transition[a, b] for a, b in pairwise(path))
        paths.append(moves + normal(y, mu[list(path)], 1))
    log_p = normal(mu[0], 3, 1) + normal(mu[1], 10, 1) + logsumexp(paths)
    return {"theta1": theta1, "theta2": theta2, "mu": mu}, log_p + j1 + j2 + j3


def kidscore(z, data):
    sigma, jacobian = positive(z["sigma"])
    log_p = stats.halfcauchy.logpdf(sigma, scale=2.5)
    for score, hs, iq in zip(data["kid_score"], data["mom_hs"], data["mom_iq"], strict=True):
        log_p += normal(score, z["beta"] @ np.array([1, hs, iq]), sigma)
    return {**z, "sigma": sigma}, log_p + jacobian


def kilpisjarvi(z, data):
    sigma, jacobian = positive(z["sigma"])
    log_p = normal(z["alpha"], data["pmualpha"], data["psalpha"])
    log_p += normal(z["beta"], data["pmubeta"], data["psbeta"])
    mean = z["alpha"] + z["beta"] * np.asarray(data["x"])
    return {**z, "sigma": sigma}, log_p + normal(data["y"], mean, sigma) + jacobian


def gauss_mix(z, data):
    (mu, j1), (sigma, j2), (theta, j3) = ordered2(z["mu"]), positive(z["sigma"]), unit(z["theta"])
    log_p = normal(mu, 0, 2) + np.sum(stats.halfnorm.logpdf(sigma, scale=2)) + stats.beta.logpdf(theta, 5, 5)
    for y in data["y"]:
        parts = theta * stats.norm.pdf(y, mu[0], sigma[0]) + (1 - theta) * stats.norm.pdf(y, mu[1], sigma[1])
        log_p += np.log(parts)
    return {"mu": mu, "sigma": sigma, "theta": theta}, log_p + j1 + j2 + j3


def nes(z, data):
    sigma, jacobian = positive(z["sigma"])
    log_p = 0.0
    for i in range(data["N"]):
        age = data["age_discrete"][i]
        row = [1, data["real_ideo"][i], data["race_adj"][i], age == 2, age == 3, age == 4]
        row += [data["educ1"][i], data["gender"][i], data["income"][i]]
        log_p += normal(data["partyid7"][i], z["beta"] @ np.array(row, float), sigma)
    return {**z, "sigma": sigma}, log_p + jacobian


def blr(z, data):
    sigma, jacobian = positive(z["sigma"])
    log_p = normal(z["beta"], 0, 10) + stats.halfnorm.logpdf(sigma, scale=10)
    for row, y in zip(np.asarray(data["X"]), data["y"], strict=True):
        log_p += normal(y, row @ z["beta"], sigma)
    return {**z, "sigma": sigma}, log_p + jacobian


ORACLES = {
    "arK-arK": ark,
    "arma-arma11": arma11,
    "eight_schools-eight_schools_noncentered": eight_schools,
    "gp_pois_regr-gp_regr": gp_regr,
    "hmm_example-hmm_example": hmm_example,
    "kidiq-kidscore_momhsiq": kidscore,
    "kilpisjarvi_mod-kilpisjarvi": kilpisjarvi,
    "low_dim_gauss_mix-low_dim_gauss_mix": gauss_mix,
    "nes2000-nes": nes,
    "sblrc-blr": blr,
    "sblri-blr": blr,
}


def made_up_data(rng):
    """Contents of data files of the right names and kinds, small."""
    draw = rng.normal
    years = 3952 + np.arange(9)
    inputs = {"N": 7, "D": 5, "X": draw(size=(7, 5)).tolist(), "y": draw(size=7).tolist()}
    survey = {
        "real_ideo": rng.integers(1, 8, 40).tolist(),
        "race_adj": rng.integers(1, 3, 40).astype(float).tolist(),
        "age_discrete": rng.integers(1, 5, 40).tolist(),
        "educ1": rng.integers(1, 5, 40).tolist(),
        "gender": rng.integers(1, 3, 40).tolist(),
        "income": rng.integers(1, 6, 40).tolist(),
        "partyid7": rng.integers(1, 8, 40).tolist(),
    }
    return {
        "arK": {"K": 3, "T": 12, "y": draw(size=12).tolist()},
        "arma": {"T": 10, "y": draw(size=10).tolist()},
        "eight_schools": {
            "J": 8,
            "y": [28, 8, -3, 7, -1, 1, 18, 12],
            "sigma": [15, 10, 16, 11, 9, 11, 10, 18],
        },
        "gp_pois_regr": {"N": 5, "x": [-10, -6, -1, 2, 8], "y": draw(size=5).tolist(), "k": [1, 2, 3, 4, 5]},
        "hmm_example": {"N": 6, "K": 2, "y": (5 + 3 * draw(size=6)).tolist()},
        "kidiq": {
            "N": 6,
            "kid_score": rng.integers(50, 120, 6).tolist(),
            "mom_hs": [0, 1, 1, 0, 1, 1],
            "mom_iq": (100 + 15 * draw(size=6)).tolist(),
        },
        "kilpisjarvi_mod": {
            "N": 9,
            "x": years.tolist(),
            "y": (9 + draw(size=9)).tolist(),
            "pmualpha": 9.3,
            "psalpha": 100,
            "pmubeta": 0,
            "psbeta": 0.0333,
        },
        "low_dim_gauss_mix": {"N": 8, "y": (2 * draw(size=8)).tolist()},
        "nes2000": {"N": 40, **survey},
        "sblrc": inputs,
        "sblri": inputs,
    }
