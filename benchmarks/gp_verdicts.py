"""Is each learned evidence correct or rejected? Difficult data, every approximation, default initial values.

Question: of Gaussian processes with likelihoods that are far from Gaussian, learned by ``gp.fit`` with every setting at
its default, how many results are right, how many are refused, and is any wrong one called ``OK``?

Data, 20 random sets of 24 points each: counts with rates up to 1e4; counts under exposures from 1 to 1000 that the
model does not know, and that it does know (``FromLogDensity``, concave and discrete); a smooth function with Student-t
noise and three outliers at about 1000 noise scales; two classes with a sharp border and one label beyond it; negative
binomial counts.

A result is refused where ``fit`` raises ``NumericalError`` or its status is not ``OK``. Two statuses are no refusal but
a verdict on the data, ``AT_LIMIT`` and ``NOTHING_LEARNED`` (counts under exposures that the model does not know look
like noise): they are counted by themselves, and the numbers are judged all the same. A result is right where, with the
slow reference (NumPy, solves instead of inverses, integrals by sums over 2401 points) at the learned hyperparameters:
the site equations hold to 1e-5; the energy is that of ``fit`` to 1e-6 of its size (or of 1); the evidence of a mass is
at most 0; and no other restart that converged is better. The rest are wrong. Allowed are no wrong result, and 1 of 20
refused for each pair, 5 for Student-t noise and classes.

Beside NUTS: for the first sets of a pair the latent function is sampled at the learned hyperparameters; the figure is
the largest difference of its posterior means, in posterior standard deviations, and the Monte Carlo error.

Every cell is written when it is done, and what is there is not run again: delete the results to start anew.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln

from probinfer import gp, infer, mcmc, targets
from probinfer.core.binding import LogDensity
from probinfer.core.errors import NumericalError
from probinfer.core.status import Status

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.reference import gp_sites as oracle
from tests.reference.likelihoods import LOG_DENSITIES

NAME, NUM, SETS = "gp_verdicts", 24, 20
X = np.linspace(0, 10, NUM)[:, None]
INFERENCE = {"Laplace": gp.Laplace(), "EP": gp.EP(), "VI": gp.VI(), "Hybrid": gp.Hybrid()}
POWERS = {"EP": 1.0, "VI": 0.0, "Hybrid": 1.0}
ALLOWED = {"Student-t, outliers": 5, "classes, nearly separable": 5}
SITES_TO, ENERGY_TO = 1e-5, 1e-6
_OF_DATA = (Status.AT_LIMIT, Status.NOTHING_LEARNED)


def smooth(rng) -> np.ndarray:
    """A random function of unit standard deviation and lengthscale 1 to 3."""
    K = np.exp(-0.5 * ((X - X.T) / rng.uniform(1, 3)) ** 2)
    return np.linalg.cholesky(K + 1e-8 * np.eye(NUM)) @ rng.normal(size=NUM)


def known_exposure(y, f, log_exposure):
    return y * (f + log_exposure) - jnp.exp(f + log_exposure) - gammaln(y + 1)


def make(name: str, seed: int) -> tuple[gp.Model, Any, np.ndarray]:
    """A model with default values, its prior (None: the default) and outputs."""
    rng = np.random.default_rng([seed, list(DATA).index(name)])
    likelihood, y, prior = DATA[name](rng)
    model = gp.Model(gp.kernels.RBF(), likelihood)
    if prior is not None:
        prior = gp.replace(gp.default_prior(model, X), prior)
    return model, prior, np.asarray(y, float)


def counts(rng):
    level = rng.uniform(0, np.log(1e4))
    f = np.minimum(level + 1.5 * smooth(rng), np.log(1e4))
    return gp.likelihoods.Poisson(), rng.poisson(np.exp(f)), None


def exposures(rng):
    exposure = 10 ** rng.uniform(0, 3, NUM)
    return gp.likelihoods.Poisson(), rng.poisson(exposure * np.exp(smooth(rng))), None


def exposures_known(rng):
    exposure = 10 ** rng.uniform(0, 3, NUM)
    likelihood = gp.likelihoods.FromLogDensity(
        known_exposure, {"log_exposure": np.log(exposure)}, concave=True, discrete=True
    )
    y = rng.poisson(exposure * np.exp(smooth(rng)))
    return likelihood, y, {"likelihood.params.log_exposure": gp.fixed}


def outliers(rng):
    scale = 0.1
    y = smooth(rng) + scale * rng.standard_t(4, NUM)
    where = rng.choice(NUM, 3, replace=False)
    y[where] += rng.choice([-1, 1], 3) * 1e3 * scale * rng.uniform(0.5, 2, 3)
    return gp.likelihoods.StudentT(), y, None


def classes(rng):
    border = rng.uniform(3, 7)
    y = (X[:, 0] > border).astype(float)
    near = np.argsort(np.abs(X[:, 0] - border))[rng.integers(2, 5)]
    y[near] = 1 - y[near]
    return gp.likelihoods.Bernoulli(), y, None


def negative_binomial(rng):
    rate, dispersion = np.exp(rng.uniform(0, 7) + smooth(rng)), rng.uniform(0.05, 1)
    gamma = rng.gamma(1 / dispersion, dispersion * rate)
    return gp.likelihoods.NegativeBinomial(), rng.poisson(gamma), None


DATA = {
    "counts": counts,
    "counts, exposures unknown": exposures,
    "counts, exposures known": exposures_known,
    "Student-t, outliers": outliers,
    "classes, nearly separable": classes,
    "negative binomial": negative_binomial,
}


def log_densities(likelihood, y) -> list:
    """Return the log densities of each output by the slow reference."""
    kind = type(likelihood).__name__
    if kind == "FromLogDensity":
        log_exposure = np.asarray(likelihood.params["log_exposure"])
        poisson = LOG_DENSITIES["poisson"]
        return [lambda f, y=y, e=e: poisson(y, f + e) for y, e in zip(y, log_exposure, strict=True)]
    names = {"Poisson": "poisson", "Bernoulli": "probit", "StudentT": "student"}
    parameters = {
        "StudentT": lambda: (float(likelihood.scale), float(likelihood.df)),
        "NegativeBinomial": lambda: (float(likelihood.dispersion),),
    }.get(kind, tuple)()
    log_density = LOG_DENSITIES[names.get(kind, "negative binomial")]
    return [lambda f, y=y: log_density(y, f, *parameters) for y in y]


def problem(fit) -> tuple:
    """Return the learned model for the slow reference, in the units of the model."""
    kernel, x = fit.model.kernel, np.asarray(fit.X)
    squared = ((x[:, None] - x[None]) / np.asarray(kernel.lengthscale)) ** 2
    K = float(kernel.variance) * np.exp(-0.5 * squared.sum(-1))
    return K, np.zeros(len(x)), log_densities(fit.model.likelihood, np.asarray(fit.y))


def laplace_reference(slow, mean, unit) -> tuple[float, float]:
    """Evidence of Laplace's approximation at a mode, and how far the mode is from where its equation leads.

    Derivatives are differences, whose steps must be short beside ``unit``, on which the log densities bend.
    """
    K, prior_mean, fns = slow
    steps = [
        min(1e-3 / (1 + np.sqrt(abs(oracle.slope_and_curvature(fn, x, 2e-3 * unit)[1]))), 2e-3 * unit)
        for fn, x in zip(fns, mean, strict=True)
    ]
    derivatives = [
        oracle.slope_and_curvature(fn, x, step) for fn, x, step in zip(fns, mean, steps, strict=True)
    ]
    slope, curvature = np.array(derivatives).T
    scaled = np.eye(len(K)) - K * curvature
    stddev = np.sqrt(np.diag(np.linalg.solve(scaled, K)))
    move = np.linalg.solve(scaled, K @ slope - (mean - prior_mean))
    energy = sum(fn(x) for fn, x in zip(fns, mean, strict=True)) - 0.5 * (mean - prior_mean) @ slope
    return energy - 0.5 * np.linalg.slogdet(scaled)[1], np.max(np.abs(move) / stddev)


def judge(fit, method: str) -> dict:
    """Compare a fit with the slow reference."""
    slow, sites = problem(fit), fit.sites
    lam1, lam2 = np.asarray(sites.lam1[0]), np.asarray(sites.lam2[0])
    mean = oracle.condition_without_inverse(*slow[:2], lam1, lam2)[0]
    if method == "Laplace":
        unit = min(float(getattr(fit.model.likelihood, "scale", 1.0)), 1.0)
        energy, residual = laplace_reference(slow, mean, unit)
    else:
        power = POWERS[method]
        energy = oracle.energy(slow, lam1, lam2, power, oracle.condition_without_inverse)
        site = oracle.ep_site(1.0) if method == "EP" else oracle.vi_site
        residual = oracle.site_residual(slow, site, lam1, lam2)
    scale = float(getattr(fit.scaling, "y_scale", 1.0))
    evidence = float(fit.log_evidence) + NUM * np.log(scale)
    converged = np.asarray(fit.info.statuses) == Status.OK
    best = float(np.max(np.asarray(fit.info.values)[converged], initial=-np.inf))
    chosen = float(fit.info.log_density)
    record = {
        "evidence": evidence,
        "site equations": float(residual),
        "energy beside the reference": float(abs(evidence - energy) / max(1.0, abs(energy))),
        "better restart": max(0.0, best - chosen),
        "lengthscale": float(np.ravel(fit.model.kernel.lengthscale)[0]),
        "variance": float(fit.model.kernel.variance),
    }
    right = residual < SITES_TO and record["energy beside the reference"] < ENERGY_TO
    right &= record["better restart"] < 1e-5 * (1 + abs(chosen))
    if fit.model.likelihood.discrete:
        right &= evidence <= 0
    return record | {"verdict": "right" if right else "wrong"}


def log_latent(whitened, arrays):
    """The latent posterior in coordinates f = m + R ν where its Gaussian approximation is standard."""
    mean, root, prior_root, likelihood, y = arrays
    f = mean + root @ whitened
    prior = jax.scipy.linalg.solve_triangular(prior_root, f, lower=True)
    return jnp.sum(likelihood.log_density(y, f)) - 0.5 * prior @ prior


def latent_density(arrays, whitened):
    return log_latent(whitened, arrays)


def beside_nuts(fit) -> dict:
    """Posterior means of the latent function beside those of NUTS, in posterior standard deviations."""
    K = problem(fit)[0]
    K = K + 1e-9 * np.trace(K) / NUM * np.eye(NUM)
    lam1, lam2 = (np.asarray(leaf[0]) for leaf in (fit.sites.lam1, fit.sites.lam2))
    mean, covariance, _ = oracle.condition_without_inverse(K, np.zeros(NUM), lam1, lam2)
    root = np.linalg.cholesky((covariance + covariance.T) / 2 + 1e-12 * np.trace(covariance) * np.eye(NUM))
    arrays = mean, root, np.linalg.cholesky(K), fit.model.likelihood, fit.y
    arrays = jax.tree.map(jnp.asarray, arrays)
    target = targets.from_logdensity(LogDensity(latent_density, arrays), jnp.zeros(NUM))
    engine = mcmc.NUTS(num_warmup=200, num_draws=500, num_chains=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = infer(jax.random.key(0), target, engine, progress=False)
    draws = np.asarray(posterior.draws)
    f = mean + draws @ root.T
    stddev = f.std((0, 1))
    error = np.sqrt(np.max(1 / np.asarray(jax.tree.leaves(posterior.info.ess)[0])))
    gap = np.abs(f.mean((0, 1)) - mean) / stddev
    return {"gap": float(gap.max()), "Monte Carlo error": float(error)}


def run(name: str, method: str, seed: int, nuts: bool) -> dict:
    """Return one fit and its verdict."""
    model, prior, y = make(name, seed)
    start = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit = gp.fit(
                jax.random.key(seed),
                model,
                X,
                y,
                inference=INFERENCE[method],
                prior=prior,
                standardize=None,
                progress=False,
            )
        except NumericalError as error:
            return {"verdict": "refused", "cause": f"NumericalError {Status(int(error.status)).name}"}
    seconds = time.process_time() - start
    status = Status(int(fit.info.status))
    messages = [
        str(w.message)[:90]
        for w in caught
        if "did not converge" in str(w.message) or "classes" in str(w.message)
    ]
    record = judge(fit, method) | {"CPU seconds": seconds, "status": status.name}
    converged = not any("did not converge" in text for text in messages)
    if status in _OF_DATA and record["verdict"] == "right" and converged:
        record["said"] = status.name
    elif status != Status.OK:
        record |= {
            "at refusal": record["verdict"],
            "verdict": "refused",
            "cause": f"{status.name} {'; '.join(messages)}",
        }
    elif not converged:
        record["verdict"] = "wrong"  # a warning beside OK
    elif nuts:
        record["NUTS"] = beside_nuts(fit)
    return record


def table(cells: dict) -> list[list[str]]:
    rows = []
    for name in DATA:
        for method in INFERENCE:
            done = [cells[key] for key in cells if key.startswith(f"{name}/{method}/")]
            if not done:
                continue
            count = {
                verdict: sum(cell["verdict"] == verdict for cell in done)
                for verdict in ("right", "refused", "wrong")
            }
            right = [cell for cell in done if cell["verdict"] == "right"]
            max_energy = max((cell["energy beside the reference"] for cell in right), default=np.nan)
            gaps = [cell["NUTS"] for cell in done if "NUTS" in cell]
            causes = sorted({cell["cause"][:60] for cell in done if "cause" in cell})
            limit = ALLOWED.get(name, 1)
            of_data = sum("said" in cell for cell in right)
            rows.append(
                [
                    name,
                    method,
                    *(str(count[verdict]) for verdict in ("right", "refused", "wrong")),
                    str(of_data),
                    "yes" if count["wrong"] == 0 and count["refused"] <= limit else "NO",
                    f"{max_energy:.0e}",
                    ", ".join(f"{gap['gap']:.2f} ± {gap['Monte Carlo error']:.2f}" for gap in gaps),
                    "; ".join(causes),
                ]
            )
    return rows


def main() -> None:
    """Compute the missing cells, then print the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--sets", type=int, default=SETS, help="data sets of each pair")
    parser.add_argument("--nuts", type=int, default=1, help="of which so many beside NUTS")
    parser.add_argument("--only", default="", help="pairs whose name contains this text")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    cells = {} if arguments.small else common.read_results(NAME).get("cells", {})
    for name in DATA:
        for method in INFERENCE:
            if arguments.only not in f"{name}/{method}":
                continue
            for seed in range(1 if arguments.small else arguments.sets):
                key = f"{name}/{method}/{seed}"
                if key in cells:
                    continue
                cells[key] = run(name, method, seed, seed < arguments.nuts and not arguments.small)
                print(key, cells[key], flush=True)
                if not arguments.small:
                    common.write_results(NAME, {"cells": cells})
    header = [
        "data",
        "method",
        "right",
        "refused",
        "wrong",
        "verdict on the data",
        "allowed",
        "energy off by",
        "beside NUTS, sd",
        "causes",
    ]
    common.print_table(f"{SETS} sets of {NUM} points", header, table(cells))


if __name__ == "__main__":
    main()
