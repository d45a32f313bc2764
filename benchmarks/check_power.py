"""Does each check have the power that it claims?

Every report says how small a bias and how wrong a width it could have found with probability 0.9. Here correct draws
make the report, the errors that it names are planted into new draws, and the share of repetitions in which the check
says that something is wrong is compared with 0.9; required is 0.8 or more (a claim is a lower bound of the power).
Without an error the share is the size; no check makes a claim about a missing correlation, so its share is only shown.

Posteriors are normal, in d = 1, 2, 5 and 20 dimensions. Ranks: theta ~ N(0, I), x = theta + noise of sd 1/2, draws
N(0.8 x, 0.2 I); the bias is in one coordinate, widths are wrong in all, "correlation" gives all coordinates 0.5.
Draws at one data set: a density of correlation 0.5; "correlation" draws independently, as wide as its conditionals
(mean field). An evidence: importance weights of a normal 1.3 times too wide, one estimator wrong by what the report
claims.

``--keep FILE`` keeps finished cells, with which a killed run continues.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from probinfer import checks
from probinfer.checks import Detectable
from probinfer.core.binding import LogDensity
from probinfer.inference import diagnostics
from probinfer.numerics import importance

LEVEL, CORRELATION = 0.05, 0.5
SIMULATIONS, DRAWS, PLACES, SAMPLE, RUNS = 200, 39, 15, 200, 100
DIMENSIONS = (1, 2, 5, 20)
ERRORS = ("none", "bias", "too_narrow", "too_wide", "correlation")
ASKED = 0.8


def covariance(dims: int) -> np.ndarray:
    return CORRELATION * np.ones((dims, dims)) + (1 - CORRELATION) * np.eye(dims)


def roots(dims: int, error: str, *, is_own: bool) -> np.ndarray:
    """Return a root of the covariance of draws with the given error; ``is_own`` selects the one of the posterior."""
    if is_own == (error != "correlation"):
        return np.linalg.cholesky(covariance(dims))
    return np.diag(1 / np.sqrt(np.diag(np.linalg.inv(covariance(dims))))) if is_own else np.eye(dims)


def wrong(error: str, size: float) -> tuple[float, float]:
    """Bias of the first coordinate and factor on all widths."""
    return (size if error == "bias" else 0.0), (size if error.startswith("too") else 1.0)


# Ranks


def simulated(rng, dims: int, error: str, size: float, *, shared: bool = False):
    """Draws (S, L, d), true values, data; ``shared``: the true values come from an engine with the same error."""
    bias, scale = wrong(error, size)
    root = roots(dims, error, is_own=False)
    if shared:  # posterior SBC: one observation, as many new data as old
        sd, both = np.sqrt(0.5), np.sqrt(1 / 3)
        theta = sd * (rng.normal(size=(SIMULATIONS, dims)) + bias * np.eye(1, dims))
        x = theta + rng.normal(size=theta.shape)
        mean, sd = x / 3, both
    else:
        theta = rng.normal(size=(SIMULATIONS, dims))
        x = theta + 0.5 * rng.normal(size=theta.shape)
        mean, sd = 0.8 * x, np.sqrt(0.2)
    noise = scale * rng.normal(size=(SIMULATIONS, DRAWS, dims)) @ root.T
    noise[:, :, 0] += bias
    return mean[:, None] + sd * noise, theta, x


def log_prior(theta):
    return -0.5 * jnp.sum(theta**2)


def log_likelihood(theta, x):
    return -2.0 * jnp.sum((x - theta) ** 2)


def by_ranks(rng, key, dims, error, size):
    draws, theta, x = simulated(rng, dims, error, size)
    table = checks.rank_table(
        key, draws, theta, x, log_prior_fn=log_prior, log_likelihood_fn=log_likelihood, thin=1
    )
    return checks.uniformity(table, level=LEVEL)


def by_shared(rng, key, dims, error, size):
    """Posterior SBC detects only 1 - ratio of the widths of a bias that its starting posterior shares."""
    shared = error == "bias"
    draws, theta, _ = simulated(
        rng, dims, error, size / (1 - np.sqrt(2 / 3)) if shared else size, shared=True
    )
    return checks.uniformity(checks.rank_table(key, draws, theta, thin=1), level=LEVEL)


def by_tarp(rng, key, dims, error, size):
    return checks.tarp(key, *simulated(rng, dims, error, size), level=LEVEL)


def by_vsbc(rng, key, dims, error, size):
    draws, theta, _ = simulated(rng, dims, error, size)
    return checks.vsbc(key, draws, theta, level=LEVEL)


def prior_sample(zeros, key):
    return zeros + jax.random.normal(key, zeros.shape)


def simulate(key, theta):
    return theta + 0.5 * jax.random.normal(key, theta.shape)


def forgetful(bias, scale, is_joint, root, key, theta, x):
    """A transition that draws from N(.8 x, .2 I) with an error, independently of its state."""
    noise = scale * root @ jax.random.normal(key, theta.shape)
    return (is_joint * (0.8 * x + np.sqrt(0.2) * noise)).at[0].add(bias)


def by_joint(rng, key, dims, error, size, *, chain=True):
    bias, scale = wrong(error, size)
    # Of the chain the errors are in sd of the posterior, √.2; of the end in sd of the prior, 1.
    sizes = (np.sqrt(0.2) * bias, scale, 1.0) if chain else (bias, 1.0, scale)
    arguments = [jnp.asarray(value) for value in (*sizes, roots(dims, error, is_own=False))]
    return checks.joint_test(
        key,
        jax.tree_util.Partial(prior_sample, jnp.zeros(dims)),
        simulate,
        jax.tree_util.Partial(forgetful, *arguments),
        reverse="same" if chain else None,
        num_simulations=SIMULATIONS,
        num_draws=PLACES,
        level=LEVEL,
        mode="vmap",
        progress=False,
    )


def by_end(rng, key, dims, error, size):
    return by_joint(rng, key, dims, error, size, chain=False)


# Draws at one data set


def quadratic(precision, x):
    return -0.5 * x @ precision @ x


def sample(rng, dims, error, size, num=SAMPLE):
    bias, scale = wrong(error, size)
    draws = scale * rng.normal(size=(num, dims)) @ roots(dims, error, is_own=True).T
    draws[:, 0] += bias
    return jnp.asarray(draws)


def target(dims):
    return LogDensity(quadratic, jnp.asarray(np.linalg.inv(covariance(dims))))


def by_ksd(rng, key, dims, error, size):
    return checks.ksd(sample(rng, dims, error, size), target(dims), key=key, num_bootstrap=199, level=LEVEL)


def by_stein(rng, key, dims, error, size):
    return checks.stein_identity(sample(rng, dims, error, size), target(dims), level=LEVEL)


def between(distance, **options):
    def one(rng, key, dims, error, size):
        a, b = sample(rng, dims, error, size), sample(rng, dims, "none", 0.0)
        return distance(a, b, key=key, level=LEVEL, **options)

    return one


def by_classifier(rng, key, dims, error, size):
    return checks.c2st(key, sample(rng, dims, error, size), sample(rng, dims, "none", 0.0), level=LEVEL)


# Evidence


def by_evidence(rng, key, dims, error, size):
    scale = 1.3
    forward, reverse = scale * rng.normal(size=(RUNS, dims)), rng.normal(size=(RUNS, dims))
    ratios = [
        np.sum(-0.5 * u**2 * (1 - scale**-2), axis=1) + dims * np.log(scale) for u in (forward, reverse)
    ]
    return checks.evidence_sandwich(ratios[0] + (size if error == "bias" else 0.0), ratios[1], level=LEVEL)


CHECKS = {
    "sbc": by_ranks,
    "posterior_sbc": by_shared,
    "tarp": by_tarp,
    "vsbc": by_vsbc,
    "joint_test": by_joint,
    "joint_test, reverse=None": by_end,
    "ksd": by_ksd,
    "stein_identity": by_stein,
    "mmd": between(checks.mmd, num_permutations=199),
    "energy_distance": between(checks.energy_distance, num_permutations=199),
    "sliced_wasserstein": between(checks.sliced_wasserstein, num_permutations=199, num_directions=32),
    "evidence_sandwich": by_evidence,
    "c2st": by_classifier,
}
SLOW = {"c2st": 4}  # by how much fewer repetitions


def claim(report) -> Detectable:
    """Return the errors that a report claims to detect."""
    if isinstance(report, checks.VSBCReport):
        return Detectable(report.bias, 0.0, np.inf, 0.9, LEVEL)
    if isinstance(report, checks.EvidenceSandwich):
        return Detectable(report.detectable, 0.0, np.inf, 0.9, LEVEL)
    inside = (report, getattr(report, "uniform", None), getattr(report, "ranks", None))
    return next(one.power for one in inside if getattr(one, "power", None) is not None)


def cell(check: str, dims: int, error: str, repetitions: int) -> dict:
    """Return the claimed size of an error and how often it was detected; None if the check makes no claim."""
    seed = zlib.crc32(f"{check}/{dims}".encode())
    right = CHECKS[check](np.random.default_rng(seed), jax.random.key(seed), dims, "none", 0.0)
    size = getattr(claim(right), error, 0.0)
    if error not in ("none", "correlation") and not 0 < size < np.inf:
        return {}
    num_rejected = 0
    for number in range(repetitions):
        rng = np.random.default_rng([seed, 1 + number, ERRORS.index(error)])
        report = CHECKS[check](rng, jax.random.key(seed + 1 + number), dims, error, size)
        num_rejected += report.passed is False
    return {"size": size, "found": num_rejected, "of": repetitions}


def kept_promise(row: dict) -> bool:
    """Whether the share may be 0.8 or more (one-sided, 0.001)."""
    return stats.binom.cdf(row["found"], row["of"], ASKED) > 1e-3


# What the diagnostics claim


def coverage(repetitions: int) -> dict[str, list[float]]:
    """Return the coverage of 95 % intervals at k-hat below 0.7: of the mean by ESS, of the evidence by its error."""
    rng = np.random.default_rng(20261130)
    chains = np.zeros((repetitions, 4, 250))
    noise = rng.normal(size=chains.shape)
    chains[..., 0] = noise[..., 0] / np.sqrt(1 - 0.7**2)
    for t in range(1, 250):
        chains[..., t] = 0.7 * chains[..., t - 1] + noise[..., t]
    draws = jnp.asarray(np.moveaxis(chains, 0, -1))
    inside = np.abs(draws.mean((0, 1))) < 1.96 * np.asarray(diagnostics.mcse_mean(draws))
    shifted = draws.at[0].add(0.5 * np.sqrt(1 / (1 - 0.7**2)))
    apart = [float(np.mean(np.asarray(diagnostics.rhat(each)) >= 1.01)) for each in (draws, shifted)]
    shares = {
        "mean by ess": [float(np.mean(inside))],
        "rhat of 1.01 and more: right, one chain off by 0.5 sd": apart,
    }
    for dims in DIMENSIONS:
        u = 0.85 * rng.normal(size=(repetitions, 1000, dims))
        ratios = jnp.asarray(np.sum(-0.5 * u**2 * (1 - 0.85**-2), axis=2) + dims * np.log(0.85))
        estimate = jax.vmap(importance.evidence)(ratios)
        good = np.asarray(estimate.khat) < 0.7
        covered = np.abs(np.asarray(estimate.log_evidence)) < 1.96 * np.asarray(estimate.standard_error)
        shares[f"evidence, d = {dims}: k-hat below 0.7, interval right among those"] = [
            float(good.mean()),
            float(covered[good].mean()) if good.any() else float("nan"),
        ]
    return shares


def main() -> None:
    """Print the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--keep", type=Path, help="file of finished cells, with which a killed run continues")
    parser.add_argument("--repetitions", type=int, default=100)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    stored = json.loads(arguments.keep.read_text()) if arguments.keep and arguments.keep.exists() else {}
    repetitions = 2 if arguments.small else arguments.repetitions
    for check in CHECKS:
        for dims in (1, 2) if arguments.small else DIMENSIONS:
            for error in ERRORS if dims > 1 else ERRORS[:-1]:
                name = f"{check}/{dims}/{error}"
                if name not in stored:
                    stored[name] = cell(check, dims, error, max(repetitions // SLOW.get(check, 1), 2))
                    print(name, stored[name], flush=True)
                    if arguments.keep:
                        arguments.keep.write_text(json.dumps(stored))
    lines = table(stored)
    common.print_table("claimed size: share found", lines[0], lines[1:])
    missed = [
        name
        for name, row in stored.items()
        if row and name.split("/")[2] in ERRORS[1:4] and not kept_promise(row)
    ]
    print(
        f"asked, a share of {ASKED} at what is claimed with 0.9: {'missed by ' + str(missed) if missed else 'met'}"
    )
    intervals = coverage(20 if arguments.small else 1000)
    print(json.dumps(intervals, indent=1))
    if not arguments.small:
        settings = {
            "simulations": SIMULATIONS,
            "draws": DRAWS,
            "places": PLACES,
            "sample": SAMPLE,
            "runs": RUNS,
        }
        body = {"settings": settings, "cells": stored, "missed": missed, "coverage": intervals}
        common.write_results("check_power", body | {"markdown": markdown(lines)}, packages=("flax",))


def table(stored: dict) -> list[list[str]]:
    """Header and one row for each check and number of dimensions."""
    rows = [["check", "d", "no error", "bias, sd", "too narrow", "too wide", "correlation"]]
    for name in dict.fromkeys(name.rsplit("/", 1)[0] for name in stored):
        cells = [stored.get(f"{name}/{error}", {}) for error in ERRORS]
        rows.append(
            [*name.split("/"), *(shown(one, error) for one, error in zip(cells, ERRORS, strict=True))]
        )
    return rows


def shown(row: dict, error: str) -> str:
    if not row:
        return "-"
    share = f"{row['found'] / row['of']:.2f}"
    return share if error in ("none", "correlation") else f"{row['size']:.2f}: {share}"


def markdown(lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:])]


if __name__ == "__main__":
    main()
