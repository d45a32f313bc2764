"""Do four methods for the posterior of a stochastic volatility model agree, and what does each cost?

Model: x_t = mu + phi (x_{t-1} - mu) + sigma eta_t, stationary at the start, y_t ~ N(0, exp(x_t)), with the priors
mu ~ N(0, 5^2), phi ~ N(0.9, 0.1^2) on (-1, 1), sigma ~ LogNormal(-1, 1). float64.

Data (statsmodels):

- inflation: quarterly US inflation 1959-2009, annual rate in percent (``macrodata.infl``), minus its mean. What is
  modelled is its spread about that mean, so that a long stay far from the mean counts as high volatility.
- sunspots: the residuals of an autoregression of order 9, by least squares, of the square root of the yearly number
  1700-2008 (a square root makes the variance of counts about constant: what is left to find is a slow change).

``PMMH`` and ``SMC2`` estimate the likelihood by bootstrap filters, ``ParticleGibbs`` draws the path too, and NUTS runs
on the joint density of parameters and standardized innovations: it shares no line of code with particle filters.
Every engine is called twice with its own defaults for all but the number of draws: the first call compiles, the second
is timed (process CPU seconds, pilots and warm-up included). Both give draws.

Agreement: means, standard deviations and the 5 %, 25 %, 75 % and 95 % quantiles of each parameter, by chain (by island,
weighted by its evidence), with the standard error of their spread over the chains of both calls; all pairs of engines
are compared by Welch's t, adjusted by Bonferroni over everything in this run.
"""

from __future__ import annotations

import time
import warnings
from itertools import combinations

import common
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.tree_util import Partial
from scipy import stats

import probinfer as pi
from probinfer import mcmc, smc, targets
from probinfer.smc import islands

NAME = "smc_volatility"
ORDER = 9  # of the autoregression of sunspots
PRIORS = {
    "mu": dist.Normal(0.0, 5.0),
    "phi": dist.TruncatedNormal(0.9, 0.1, low=-1.0, high=1.0),
    "sigma": dist.LogNormal(-1.0, 1.0),
}
STATISTICS = ("mean", "sd", "5 %", "25 %", "75 %", "95 %")


def inflation() -> np.ndarray:
    """(203,)."""
    from statsmodels.datasets import macrodata

    y = np.asarray(macrodata.load_pandas().data["infl"], float)
    return y - y.mean()


def sunspots() -> np.ndarray:
    """(300,)."""
    from statsmodels.datasets import sunspots as data

    y = np.sqrt(np.asarray(data.load_pandas().data["SUNACTIVITY"], float))
    lags = np.stack(
        [y[ORDER - k : len(y) - k] for k in range(1, ORDER + 1)] + [np.ones(len(y) - ORDER)], axis=1
    )
    return y[ORDER:] - lags @ np.linalg.lstsq(lags, y[ORDER:], rcond=None)[0]


# The model


def spread(theta):
    """Of the stationary law."""
    return theta["sigma"] / jnp.sqrt(1 - theta["phi"] ** 2)


def log_normal(x, loc, scale):
    """Log density."""
    return -0.5 * ((x - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * np.log(2 * np.pi)


def start(theta, key):
    """x_0."""
    return theta["mu"] + spread(theta) * jax.random.normal(key, (), theta["mu"].dtype)


def move(theta, key, x, t):
    """x_t given x_{t-1}."""
    return center(theta, x) + theta["sigma"] * jax.random.normal(key, (), x.dtype)


def center(theta, x):
    """Of the next state."""
    return theta["mu"] + theta["phi"] * (x - theta["mu"])


def fit(y, x_previous, x, t):
    """Log potential."""
    return -0.5 * (np.log(2 * np.pi) + x + y[t] ** 2 * jnp.exp(-x))


def transition(theta, x_previous, x, t):
    """Log density of ``move``."""
    return log_normal(x, center(theta, x_previous), theta["sigma"])


def log_initial(theta, x):
    """Log density of ``start``."""
    return log_normal(x, theta["mu"], spread(theta))


def model(y, theta):
    """The model of one value of the parameters."""
    return smc.FeynmanKac(
        Partial(start, theta), Partial(move, theta), Partial(fit, y), Partial(transition, theta)
    )


def joint_model(y):
    """The same for NUTS: x is a linear map of independent innovations."""
    theta = {name: numpyro.sample(name, prior) for name, prior in PRIORS.items()}
    z = numpyro.sample("z", dist.Normal(jnp.zeros(len(y)), 1.0))
    innovations = (theta["sigma"] * z).at[0].set(spread(theta) * z[0])

    def combine(a, b):
        return a[0] * b[0], b[0] * a[1] + b[1]

    _, x = jax.lax.associative_scan(combine, (jnp.full(len(y), theta["phi"]), innovations))
    numpyro.sample("y", dist.Normal(0.0, jnp.exp(0.5 * (theta["mu"] + x))), obs=y)


def engines(small: bool) -> dict:
    """Return the schemes by name."""
    few = {"num_warmup": 50, "num_draws": 100} if small else {}
    sizes = {"num_parameters": 32, "num_islands": 2} if small else {"num_parameters": 128, "num_islands": 4}
    return {
        "PMMH": smc.PMMH(**(few or {"num_draws": 3000})),
        "SMC^2": smc.SMC2(**sizes),
        "particle Gibbs": smc.ParticleGibbs(**(few or {"num_draws": 2000})),
        "NUTS, joint": mcmc.NUTS(**(few or {"num_draws": 500})),
    }


# What is asked of the draws


def by_chain(posterior) -> tuple[np.ndarray, np.ndarray]:
    """Draws (chain, draw, parameter) and weights of the chains (chain,)."""
    draws = np.stack([np.asarray(posterior[name]) for name in PRIORS], axis=-1)
    logs = np.zeros(len(draws)) if posterior.log_weights is None else np.asarray(posterior.log_weights)[:, 0]
    return draws, np.exp(logs - logs.max())


def statistics(draws: np.ndarray) -> np.ndarray:
    """(chain, statistic, parameter)."""
    quantiles = np.quantile(draws, [0.05, 0.25, 0.75, 0.95], axis=1)
    return np.stack([draws.mean(axis=1), draws.std(axis=1, ddof=1), *quantiles], axis=1)


def pooled(posteriors) -> dict:
    """Weighted means of the statistics over chains, with standard errors and degrees of freedom."""
    parts = [by_chain(posterior) for posterior in posteriors]
    values = np.concatenate([statistics(draws) for draws, _ in parts])
    # islands of one call share a proposal; each call has the weight of its mean evidence
    weights = np.concatenate([weight / weight.sum() for _, weight in parts]) / len(parts)
    mean = np.einsum("c,csp->sp", weights, values)
    num = len(values)
    variance = np.einsum("c,csp->sp", weights**2, (values - mean) ** 2) * num / (num - 1)
    free = 1 / np.sum(weights**2) - 1
    return {"mean": mean, "error": np.sqrt(variance), "free": free}


def welch(a: dict, b: dict) -> np.ndarray:
    """Two-sided p-values (statistic, parameter)."""
    parts = np.stack([a["error"] ** 2, b["error"] ** 2])
    free = parts.sum(axis=0) ** 2 / (parts[0] ** 2 / a["free"] + parts[1] ** 2 / b["free"])
    return 2 * stats.t.sf(np.abs(a["mean"] - b["mean"]) / np.sqrt(parts.sum(axis=0)), free)


def least_ess(posterior) -> float:
    """Smallest effective sample size of a parameter; islands count by the share of the evidence they carry."""
    share = 1.0
    if posterior.log_weights is not None:
        logs = np.asarray(posterior.info.log_evidences)
        share = islands.evidence_ess(logs) / len(logs)
    return share * min(float(posterior.info.ess[name]) for name in PRIORS)


def acceptance(info) -> float:
    """Mean acceptance rate of the proposals."""
    rates = getattr(info, "acceptance", None)
    return float(np.nanmean(np.asarray(info.acceptance_rate if rates is None else rates)))


def measure(y: np.ndarray, small: bool) -> dict:
    """All engines on one series."""
    data = jnp.asarray(y)
    parameters = smc.Parameters(PRIORS, Partial(model, data), len(y), log_initial)
    joint = targets.from_numpyro(joint_model, data)
    runs = {}
    for name, engine in engines(small).items():
        target = joint if name.startswith("NUTS") else parameters
        posteriors, seconds = [], []
        for seed in range(2):
            before = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", pi.ConvergenceWarning)
                posteriors.append(pi.infer(jax.random.key(seed), target, engine, progress=False))
            seconds.append(time.process_time() - before)
        draws = np.concatenate([by_chain(p)[0].reshape(-1, len(PRIORS)) for p in posteriors])
        info = posteriors[1].info
        runs[name] = pooled(posteriors) | {
            "first call, CPU s": seconds[0],
            "second call, CPU s": seconds[1],
            "ESS of the second call": least_ess(posteriors[1]),
            "ESS a CPU second": least_ess(posteriors[1]) / seconds[1],
            "status": [int(p.info.status) for p in posteriors],
            "largest R-hat": [max(float(p.info.rhat[name]) for name in PRIORS) for p in posteriors],
            "particles": int(getattr(info, "num_particles", 0)),
            "variance of log Z": float(getattr(info, "log_evidence_variance", np.nan)),
            "acceptance": acceptance(info),
            "quantiles for the picture": np.quantile(draws, [0.05, 0.25, 0.75, 0.95], axis=0),
        }
        if posteriors[0].log_evidence is not None:
            runs[name]["log evidence"] = [float(p.log_evidence) for p in posteriors]
            runs[name]["its error"] = [float(p.info.log_evidence_error) for p in posteriors]
        print(name, [f"{s:.1f} s" for s in seconds], f"ESS {least_ess(posteriors[1]):.0f}", flush=True)
    return runs


def compare(runs: dict[str, dict]) -> list[dict]:
    """All pairs of engines, statistics and parameters of all series."""
    rows = []
    for series, by_engine in runs.items():
        for a, b in combinations(by_engine, 2):
            p = welch(by_engine[a], by_engine[b])
            for (s, k), value in np.ndenumerate(p):
                pair = {"series": series, "pair": f"{a}, {b}", "statistic": STATISTICS[s]}
                rows.append(pair | {"parameter": list(PRIORS)[k], "p": float(value)})
    for row in rows:
        row["p, adjusted"] = min(1.0, row["p"] * len(rows))
    return rows


def plot(runs: dict[str, dict]) -> None:
    """Posterior intervals by engine, and ESS a second."""
    figure, axes = common.figure(width=11.5, height=5.2, rows=len(runs), columns=4)
    symbols = ("$\\mu$", "$\\phi$", "$\\sigma$")
    for row, (series, by_engine) in zip(np.atleast_2d(axes), runs.items()):
        names = list(by_engine)
        for k, axis in enumerate(row[:3]):
            for number, name in enumerate(names):
                quantiles = np.asarray(by_engine[name]["quantiles for the picture"])[:, k]
                low, left, right, high = quantiles
                error = 1.96 * by_engine[name]["error"][0, k]
                axis.plot([low, high], [number, number], color=f"C{number}", linewidth=1.2)
                axis.plot([left, right], [number, number], color=f"C{number}", linewidth=5, alpha=0.35)
                mean = by_engine[name]["mean"][0, k]
                axis.errorbar(mean, number, xerr=error, color="black", marker="o", markersize=3, capsize=3)
            axis.set(title=f"{series}: {symbols[k]}", yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
            axis.set_yticklabels(names if k == 0 else [])
        rates = [by_engine[name]["ESS a CPU second"] for name in names]
        row[3].barh(range(len(names)), rates, color=[f"C{i}" for i in range(len(names))])
        row[3].set(title="ESS a CPU second", yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
        row[3].set_yticklabels([])
        for number, rate in enumerate(rates):
            row[3].annotate(
                f"{rate:.1f}", (rate, number), xytext=(3, 0), textcoords="offset points", va="center"
            )
        row[3].margins(x=0.2)
    figure.text(
        0.5,
        0.005,
        "thin: 90 % interval, thick: 50 %; black: posterior mean and its 95 % Monte Carlo interval",
        ha="center",
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    common.save_figure(figure, NAME)


def show(runs: dict[str, dict], rows: list[dict]) -> None:
    """Tables."""
    header = [
        "",
        "mu",
        "phi",
        "sigma",
        "ESS",
        "CPU s",
        "ESS a CPU s",
        "first call",
        "particles",
        "log evidence",
    ]
    for series, by_engine in runs.items():
        lines = []
        for name, record in by_engine.items():
            cells = [
                f"{m:.4f} ± {e:.4f} ({s:.3f})"
                for m, e, s in zip(record["mean"][0], record["error"][0], record["mean"][1])
            ]
            logs = record.get("log evidence", [])
            logs = "; ".join(f"{z:.2f} ± {e:.2f}" for z, e in zip(logs, record.get("its error", [])))
            numbers = [
                f"{record['ESS of the second call']:.0f}",
                f"{record['second call, CPU s']:.1f}",
                f"{record['ESS a CPU second']:.1f}",
                f"{record['first call, CPU s']:.1f}",
                str(record["particles"] or ""),
            ]
            lines.append([name, *cells, *numbers, logs])
        common.print_table(f"{series}: mean ± its standard error (posterior sd)", header, lines)
    min_row = min(rows, key=lambda row: row["p"])
    print(
        f"{len(rows)} comparisons; the smallest p-value, adjusted, is {min_row['p, adjusted']:.3f} "
        f"({min_row['series']}, {min_row['pair']}: {min_row['statistic']} of {min_row['parameter']})"
    )


def main() -> None:
    """Run the benchmark, print the tables, and write the results."""
    arguments = common.parser(__doc__).parse_args()
    series = {"inflation": inflation()[: 30 if arguments.small else None]}
    if not arguments.small:
        series["sunspots"] = sunspots()
    before = time.process_time()
    runs = {}
    for name, y in series.items():
        print(f"{name}: {len(y)} observations", flush=True)
        runs[name] = measure(y, arguments.small)
    rows = compare(runs)
    show(runs, rows)
    if not arguments.small:
        body = {"seconds": time.process_time() - before, "statistics": STATISTICS, "parameters": list(PRIORS)}
        common.write_results(NAME, body | {"series": runs, "comparisons": rows}, ("statsmodels",))
        plot(runs)


if __name__ == "__main__":
    main()
