"""Are fused shards and composed scores correct, and at what cost? Exact distributions against uncorrected shortcuts.

Fusion (``smc.fuse``), C = 2, 4, 16 shards:

- linear regression with known noise, 800 rows, 5 coefficients: posterior and log evidence in closed form;
- logistic regression of rare events, 800 rows, 5 coefficients, some 5 % ones, so that a shard of 50 rows has two or
  three: against a long run of NUTS on all data. Shards are sampled by NUTS, each with the prior to the power 1/C.

Beside it consensus Monte Carlo (Scott et al. 2016: averages of the same draws, weighted by their precisions). Errors:
the largest over coefficients of |mean - exact mean| / exact standard deviation, and of |log of the ratio of standard
deviations|; the largest of means and variances in standard errors, from the 8 islands of a run (Student's t_7, the
largest of ten: 4.9 is one in fifty).

Composed scores (``smc.composed``): power, product and guidance of two-dimensional mixtures with exact scores; relative
error of the integral, mass left of zero, and total variation over 64 cells against the density on a grid; by number of
steps, with the weights and without.
"""

from __future__ import annotations

import time
import warnings
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.tree_util import Partial
from scipy.special import logsumexp

import probinfer as pi
from probinfer import mcmc, smc, targets
from probinfer.core.binding import LogDensity

NAME = "smc_corrections"
ROWS, COLUMNS, SCALE, NOISE = 800, 5, 2.5, 1.5
SHARDS, STEPS = (2, 4, 16), (10, 20, 40, 80)
PARTICLES = 1024  # of composed scores


# Shards of regressions


def design() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows with an intercept, real responses, rare events."""
    rng = np.random.default_rng(5)
    X = np.column_stack([np.ones(ROWS), rng.normal(size=(ROWS, COLUMNS - 1))])
    y = X @ np.array([1.0, -0.5, 0.3, 0.0, 2.0]) + NOISE * rng.normal(size=ROWS)
    rare = rng.random(ROWS) < 1 / (1 + np.exp(-X @ np.array([-3.6, 1.0, -0.7, 0.4, 0.0])))
    return X, y, rare.astype(float)


def log_linear(X, y, w):
    return jnp.sum(-0.5 * ((y - X @ w) / NOISE) ** 2) - len(y) * np.log(NOISE * np.sqrt(2 * np.pi))


def log_logistic(X, y, w):
    return jnp.sum(y * (X @ w) - jax.nn.softplus(X @ w))


def log_fraction(X, y, share, w):
    return log_logistic(X, y, w) - 0.5 * share * jnp.sum((w / SCALE) ** 2)


def normal_posterior(X, y):
    """Mean, covariance and log evidence of the linear regression."""
    precision = X.T @ X / NOISE**2 + np.eye(COLUMNS) / SCALE**2
    covariance = np.linalg.inv(precision)
    mean = covariance @ X.T @ y / NOISE**2
    spread = NOISE**2 * np.eye(len(y)) + SCALE**2 * X @ X.T
    log_evidence = -0.5 * (np.linalg.slogdet(2 * np.pi * spread)[1] + y @ np.linalg.solve(spread, y))
    return mean, covariance, log_evidence


def consensus(draws: list) -> np.ndarray:
    """Averages of draws (M, d), weighted by the precision of each set."""
    precisions = [np.linalg.inv(np.cov(x.T)) for x in draws]
    fewest = min(len(x) for x in draws)
    total = sum(x[:fewest] @ p for x, p in zip(draws, precisions))
    return total @ np.linalg.inv(sum(precisions))


def errors(draws: np.ndarray, weights, mean, sd) -> tuple[float, float]:
    """Largest error of a mean in standard deviations, and of a log standard deviation."""
    found = np.average(draws, axis=0, weights=weights)
    spread = np.sqrt(np.average((draws - found) ** 2, axis=0, weights=weights))
    return float(np.max(np.abs(found - mean) / sd)), float(np.max(np.abs(np.log(spread / sd))))


def largest_t(posterior, mean, sd, reference_ess: float) -> float:
    """Return the largest error of means and variances in standard errors of 8 islands (Student's t_7)."""
    z = (np.asarray(jax.tree.leaves(posterior.draws)[0]) - mean) / sd
    weights = np.exp(np.asarray(posterior.log_weights)[:, :1] - float(posterior.log_evidence))
    islands = weights * np.concatenate([z, z**2 - 1], axis=-1).mean(axis=1)
    of_reference = np.repeat([1 / reference_ess, 4 / reference_ess], COLUMNS)  # squares mix half as well
    error = np.sqrt(islands.var(axis=0, ddof=1) / len(islands) + of_reference)
    return float(np.max(np.abs(islands.mean(axis=0)) / error))


def fused(
    key, sub_posteriors, draws, share_prior: bool, mean, sd, reference_ess: float = np.inf
) -> tuple[dict, pi.Posterior]:
    """Return a fusion, its errors and its cost."""
    before = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = smc.fuse(key, sub_posteriors, draws, share_prior=share_prior, progress=False)
    seconds = time.process_time() - before
    flat = np.asarray(jax.tree.leaves(posterior.flat())[0])
    off = errors(flat, np.exp(posterior.flat_log_weights()), mean, sd)
    record = {
        "error of mean": off[0],
        "error of log sd": off[1],
        "largest t": largest_t(posterior, mean, sd, reference_ess),
        "gradients": int(posterior.info.num_gradients),
        "levels": len(posterior.info.temperatures),
        "ess": float(np.min(jax.tree.leaves(posterior.info.ess)[0])),
        "seconds": seconds,
        "status": int(posterior.info.status),
    }
    return record, posterior


def linear(counts) -> list[dict]:
    """Fuse shards of a linear regression, whose posterior is known."""
    X, y, _ = design()
    mean, covariance, log_evidence = normal_posterior(X, y)
    records, rng = [], np.random.default_rng(0)
    for count in counts:
        parts = list(zip(np.split(X, count), np.split(y, count)))
        prior = dist.Normal(jnp.zeros(COLUMNS), SCALE)
        sub_posteriors = [
            targets.from_prior(prior, LogDensity(log_linear, jnp.asarray(a), jnp.asarray(b)))
            for a, b in parts
        ]
        draws = [
            jnp.asarray(rng.multivariate_normal(*normal_posterior(a, b)[:2], size=1000)) for a, b in parts
        ]
        record, posterior = fused(
            jax.random.key(count), sub_posteriors, draws, True, mean, np.sqrt(np.diag(covariance))
        )
        record |= {
            "model": "linear",
            "shards": count,
            "error of log evidence": float(posterior.log_evidence) - log_evidence,
            "its standard error": float(posterior.info.log_evidence_error),
        }
        records.append(record)
        print(record, flush=True)
    return records


def nuts(key, target, num_draws: int, num_chains: int):
    """Draws (n, d), smallest ESS, gradients and CPU seconds."""
    before = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = mcmc.NUTS(num_draws=num_draws, num_chains=num_chains).sample(key, target, progress=False)
    seconds = time.process_time() - before
    num_gradients = int(posterior.info.num_warmup_gradients) + int(np.sum(posterior.info.num_leapfrogs))
    ess = float(np.min(jax.tree.leaves(posterior.info.ess)[0]))
    return np.asarray(posterior.flat()), ess, num_gradients, seconds


def logistic(counts, num_draws: int) -> tuple[list[dict], dict]:
    """Fuse shards of a logistic regression of rare events."""
    X, _, y = design()

    def target(a, b, share):
        data = (jnp.asarray(a), jnp.asarray(b), jnp.asarray(share))
        return targets.from_logdensity(LogDensity(log_fraction, *data), jnp.zeros(COLUMNS))

    reference, ess, num_gradients, seconds = nuts(jax.random.key(0), target(X, y, 1.0), 5 * num_draws, 4)
    mean, sd = reference.mean(0), reference.std(0)
    full_data = {"ess": ess, "gradients": num_gradients, "seconds": seconds, "events": int(y.sum())}
    print(full_data, flush=True)
    records = []
    for count in counts:
        sub_posteriors = [target(a, b, 1 / count) for a, b in zip(np.split(X, count), np.split(y, count))]
        runs = [
            nuts(key, t, num_draws, 2)
            for key, t in zip(jax.random.split(jax.random.key(1), count), sub_posteriors)
        ]
        draws = [run[0] for run in runs]
        record, _ = fused(
            jax.random.key(count), sub_posteriors, [jnp.asarray(x) for x in draws], False, mean, sd, ess
        )
        off = errors(consensus(draws), None, mean, sd)
        record |= {
            "model": "logistic",
            "shards": count,
            "fewest events": int(min(part.sum() for part in np.split(y, count))),
            "gradients of shards": sum(run[2] for run in runs) / count,
            "consensus, error of mean": off[0],
            "consensus, error of log sd": off[1],
        }
        records.append(record)
        print(record, flush=True)
    return records, full_data


# Scores of mixtures

BOTH = {
    "two": ([0.3, 0.7], [[-2.0, 0.0], [2.0, 0.5]], [[[0.6, 0.0], [0.0, 0.6]], [[0.3, 0.1], [0.1, 0.5]]]),
    "wide": ([0.5, 0.5], [[-2.0, 0.0], [2.0, 0.5]], [[[1.0, 0.0], [0.0, 1.0]], [[1.2, 0.2], [0.2, 1.0]]]),
    "other": ([0.5, 0.5], [[-2.0, 1.0], [1.0, -1.0]], [[[0.8, 0.0], [0.0, 0.8]], [[1.0, -0.4], [-0.4, 0.9]]]),
}
CASES = {
    "p^2": (("two", "two"), (2.0, 0.0)),
    "p1 p2": (("two", "other"), (1.0, 1.0)),
    "guidance, w = 1.5": (("wide", "two"), (-0.5, 1.5)),
}
NOISES, CELLS = (0.02, 200.0), np.array([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0])


def log_mixture(weights, locs, covariances, noise, x):
    """Log density at one point, noise added; its gradient is the score."""
    covariance = covariances + noise**2 * jnp.eye(2)
    (a, b), (_, c) = jnp.moveaxis(covariance, 0, -1)
    determinant = a * c - b**2
    u, v = (x - locs).T
    quadratic = (c * u**2 - 2 * b * u * v + a * v**2) / determinant
    return jax.nn.logsumexp(jnp.log(weights) - 0.5 * (quadratic + jnp.log(determinant))) - jnp.log(2 * jnp.pi)


def score(weights, locs, covariances, x, t):
    return jax.grad(log_mixture, argnums=4)(weights, locs, covariances, t, x)


def cells(points, mass) -> np.ndarray:
    """Mass of the cells that the lines at ``CELLS`` cut out."""
    rows, columns = (np.searchsorted(CELLS, points[:, i]) for i in (0, 1))
    counts = np.zeros((len(CELLS) + 1,) * 2)
    np.add.at(counts, (rows, columns), mass)
    return counts


def exact(mixtures, exponents) -> tuple[float, np.ndarray]:
    """Log integral of the product at the smallest noise, and masses of cells, on a grid."""
    axis = np.linspace(-9, 9, 721)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    logs = sum(
        a * np.asarray(jax.vmap(partial(log_mixture, *mixture_of, NOISES[0]))(jnp.asarray(points)))
        for mixture_of, a in zip(mixtures, exponents)
    )
    logs = logs + 2 * np.log(axis[1] - axis[0])
    total = float(logsumexp(logs))
    return total, cells(points, np.exp(logs - total))


@jax.jit
def runs(model, keys):
    """Make independent runs sequentially."""
    num_steps = model.init.args[0].noise_levels.shape[0]
    return jax.lax.map(lambda key: smc.particle_filter(key, model, num_steps, PARTICLES, store="none"), keys)


def scores(steps, num_runs: int) -> list[dict]:
    """Return errors by number of steps, with weights and, for the largest number, without."""
    records = []
    for name, (names, exponents) in CASES.items():
        mixtures = [tuple(jnp.asarray(part) for part in BOTH[one]) for one in names]
        log_integral, masses = exact(mixtures, exponents)
        diffusion = smc.VarianceExploding(*NOISES)
        fns = [Partial(score, *mixture_of) for mixture_of in mixtures]
        for num_steps, corrected in [*((n, True) for n in steps), (max(steps), False)]:
            model = smc.composed(diffusion, fns, exponents, (2,), num_steps, corrected=corrected)
            before = time.process_time()
            results = jax.block_until_ready(runs(model, jax.random.split(jax.random.key(1), num_runs)))
            seconds = time.process_time() - before
            scale = np.exp(np.asarray(results.log_evidence) - (log_integral if corrected else 0))
            weights = np.exp(np.asarray(results.log_weights) - (log_integral if corrected else 0)) / PARTICLES
            cell_counts = np.stack([cells(x, w) for x, w in zip(np.asarray(results.particles), weights)])
            left = cell_counts[:, :4].sum(axis=(1, 2))
            record = {
                "case": name,
                "steps": num_steps,
                "corrected": corrected,
                "integral": float(scale.mean() - 1),
                "integral, standard error": float(scale.std(ddof=1) / np.sqrt(num_runs)),
                "left": float(left.mean()),
                "left, standard error": float(left.std(ddof=1) / np.sqrt(num_runs)),
                "left, exact": float(masses[:4].sum()),
                "total variation": float(0.5 * np.abs(cell_counts.mean(0) / scale.mean() - masses).sum()),
                "sd of log integral": float(np.asarray(results.log_evidence).std(ddof=1)),
                "seconds": seconds,
            }
            records.append(record)
            print(record, flush=True)
    return records


def plot(fusions: list[dict], composed: list[dict]) -> None:
    """Plot the errors against the number of shards and of steps."""
    figure, (left, right) = common.figure(width=9.5, height=3.6, columns=2)
    rows = [r for r in fusions if r["model"] == "logistic"]
    shards = [r["shards"] for r in rows]
    left.plot(shards, [r["error of mean"] for r in rows], "o-", label="fused")
    left.plot(shards, [r["consensus, error of mean"] for r in rows], "o-", label="consensus")
    left.set(xscale="log", yscale="log", xlabel="shards", ylabel="largest error of a mean, posterior sd")
    left.set_xticks(shards, [str(s) for s in shards])
    left.minorticks_off()
    left.set_title("logistic regression of rare events", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    for number, name in enumerate(CASES):
        rows = [r for r in composed if r["case"] == name and r["corrected"]]
        steps = np.array([r["steps"] for r in rows])
        right.errorbar(
            steps,
            [abs(r["integral"]) for r in rows],
            [2 * r["integral, standard error"] for r in rows],
            fmt="o-",
            color=f"C{number}",
            label=name,
        )
    first = next(r for r in composed if r["corrected"])
    right.plot(
        steps, abs(first["integral"]) * (steps / steps[0]) ** -2.0, "k--", linewidth=0.8, label="1 / steps^2"
    )
    right.set(xscale="log", yscale="log", xlabel="steps", ylabel="|relative error of the integral|")
    right.set_xticks(steps, [str(n) for n in steps])
    right.minorticks_off()
    right.set_ylim(1e-4, None)
    right.set_title("composed scores", fontsize=9)
    right.legend(frameon=False, fontsize=8)
    common.save_figure(figure, NAME)


def tables(fusions: list[dict], full_data: dict, composed: list[dict]) -> None:
    """Print the results."""
    header = [
        "",
        "shards",
        "error of mean",
        "of log sd",
        "consensus: mean",
        "log sd",
        "gradients",
        "ESS",
        "CPU s",
    ]
    rows = [
        [
            r["model"],
            str(r["shards"]),
            f"{r['error of mean']:.3f}",
            f"{r['error of log sd']:.3f}",
            f"{r['largest t']:.1f}",
            f"{r['consensus, error of mean']:.2f}" if "consensus, error of mean" in r else "",
            f"{r['consensus, error of log sd']:.2f}" if "consensus, error of log sd" in r else "",
            str(r["gradients"]),
            f"{r['ess']:.0f}",
            f"{r['seconds']:.1f}",
        ]
        for r in fusions
    ]
    common.print_table(f"fusion (all data by NUTS: {full_data})", header, rows)
    header = ["", "steps", "integral - 1", "+-", "mass left", "+-", "exact", "total variation", "CPU s"]
    rows = [
        [
            r["case"] + ("" if r["corrected"] else ", no weights"),
            str(r["steps"]),
            f"{r['integral']:.4f}" if r["corrected"] else "",
            f"{r['integral, standard error']:.4f}" if r["corrected"] else "",
            f"{r['left']:.4f}",
            f"{r['left, standard error']:.4f}",
            f"{r['left, exact']:.4f}",
            f"{r['total variation']:.4f}",
            f"{r['seconds']:.1f}",
        ]
        for r in composed
    ]
    common.print_table("composed scores", header, rows)


def main() -> None:
    """Run the benchmark, print the tables, and write the results."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--only", choices=("fusion", "scores"), help="measure one part; the other stays as it was"
    )
    arguments = parser.parse_args()
    small = arguments.small
    counts, steps = ((2,), (10, 20)) if small else (SHARDS, STEPS)
    body = {} if small else {k: v for k, v in common.read_results(NAME).items() if k != "environment"}
    if arguments.only != "scores":
        more, full_data = logistic(counts, 100 if small else 500)
        body |= {"fusion": linear(counts) + more, "all data": full_data}
    if arguments.only != "fusion":
        body["scores"] = scores(steps, 4 if small else 40)
    tables(body.get("fusion", []), body.get("all data", {}), body.get("scores", []))
    if not small:
        common.write_results(NAME, body)
        plot(body["fusion"], body["scores"])


if __name__ == "__main__":
    main()
