"""Is the full hyperparameter posterior worth its cost? Four regressions of Lalchand and Rasmussen (2020).

Question: do their published numbers hold, that integrating over the hyperparameters of an exact Gaussian process (NUTS,
or a mean-field or full-rank Gaussian) predicts better than the maximum of the evidence (ML-II)?

Protocol: ``lalchand2020.py`` has data, splits, kernels and priors, with every choice that the paper leaves open. All
methods go through ``gp.fit`` with ``standardize=False`` and the same model; only ``learn=`` differs. ML-II takes the
best of several starts, and the optima found are listed; the other methods start around it. On the airline data their
prior is centered at the ML-II estimates, as in the paper. Scores over the test points: RMSE of the predictive mean;
NLPD, the mean of -log (1/S) sum_s N(y; mu_s, v_s) over at most 200 hyperparameter draws; and the estimator of the
authors' later public code, the mean over draws of the NLPDs of the components, an upper bound of the former. Standard
errors: between test points, for series between years; differences to ML-II are paired. NUTS must have R-hat below 1.01
and bulk and tail ESS above 400 for every hyperparameter (on the log scale, where it samples).

The airline series decides nothing: its test part is 44 months in four autocorrelated years, and by years the paired
difference of NUTS and ML-II has an interval twenty times as wide as itself and more, with centered outputs and with raw
ones. The published standard errors there take the months as independent.

Criterion: for every data set, whether the published ordering (by NLPD and by RMSE) is reproduced within the errors, and
if not, why.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from typing import Any, NamedTuple

import common
import jax
import numpy as np
from lalchand2020 import METHODS, PROBLEMS, PUBLISHED, RegressionSetup, airline_prior, wide_prior
from scipy.stats import norm, t

from probinfer import gp, mcmc, vi

# Starts of ML-II (wine: see ``lalchand2020``); NUTS chains, draws of a chain and the most warm-up steps.
STARTS = {"co2": 10, "airline": 100, "airline_raw": 100, "wine": 1, "concrete": 10}
DRAWS = {
    "co2": (4, 1500, 400),
    "airline": (4, 1000, 1000),
    "airline_raw": (4, 1000, 1000),
    "wine": (4, 1300, 300),
    "concrete": (4, 800, 400),
}


@dataclasses.dataclass(frozen=True)
class Near:
    """An engine whose starts are normal around the model's own values, in unconstrained (log) coordinates.

    Draws from priors as wide as these are no places to start from: most lie where the evidence is flat or in modes
    that no one means.
    """

    engine: Any
    spread: float

    def sample(self, key, target, **options):
        """Call ``sample`` of the engine with these initial positions."""
        draw = jax.tree_util.Partial(_near, target.start, self.spread)
        return self.engine.sample(key, dataclasses.replace(target, draw_fn=draw), **options)


def _near(start, spread, key, attempt):
    leaves, structure = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.fold_in(key, attempt), len(leaves))
    moved = [
        leaf + spread * jax.random.normal(k, leaf.shape, leaf.dtype)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


class Scored(NamedTuple):
    """Pointwise scores of the predictions: squared errors and negative log densities of the test points."""

    squared: np.ndarray
    nlpd: np.ndarray
    nlpd_components: np.ndarray
    nlpd_halves: tuple[float, float]
    coverage: float


def score(fit: gp.Fit, problem: RegressionSetup) -> Scored:
    """Return the pointwise scores of a fit."""
    predictive = fit.predict_y(problem.X_test)
    means, sds = np.asarray(predictive.means), np.sqrt(np.asarray(predictive.variances))
    components = norm.logpdf(problem.y_test, means, sds)
    lower, upper = np.asarray(predictive.quantile(np.array([0.025, 0.975])))
    return Scored(
        squared=(problem.y_test - means.mean(0)) ** 2,
        nlpd=-_log_mean(components),
        nlpd_components=-components.mean(0),
        nlpd_halves=tuple(float(-_log_mean(half).mean()) for half in (components[::2], components[-1::-2])),
        coverage=float(np.mean((lower <= problem.y_test) & (problem.y_test <= upper))),
    )


def _log_mean(log_values: np.ndarray) -> np.ndarray:
    top = log_values.max(0)
    return top + np.log(np.mean(np.exp(log_values - top), 0))


def mean_and_error(values: np.ndarray, block: int) -> tuple[float, float]:
    """Return the mean and its standard error from the block means."""
    blocks = np.array_split(values, max(len(values) // block, 2))
    means = np.array([part.mean() for part in blocks])
    return float(values.mean()), float(means.std(ddof=1) / np.sqrt(len(blocks)))


def summarize(scored: Scored, reference: Scored, block: int) -> dict:
    """Scores with standard errors, and paired differences to a reference with 95 % intervals."""
    mse, mse_error = mean_and_error(scored.squared, block)
    rmse = np.sqrt(mse)
    nlpd, nlpd_error = mean_and_error(scored.nlpd, block)
    quantile = float(t.ppf(0.975, max(len(scored.nlpd) // block, 2) - 1))
    dnlpd, dnlpd_error = mean_and_error(scored.nlpd - reference.nlpd, block)
    dmse, dmse_error = mean_and_error(scored.squared - reference.squared, block)
    total = rmse + np.sqrt(reference.squared.mean())  # a - b = (a^2 - b^2) / (a + b)
    return {
        "rmse": rmse,
        "rmse error": mse_error / (2 * rmse),
        "nlpd": nlpd,
        "nlpd error": nlpd_error,
        "nlpd, mean over components": float(scored.nlpd_components.mean()),
        "nlpd of half the components": scored.nlpd_halves,
        "coverage of 95 %": scored.coverage,
        "nlpd minus ML-II": (dnlpd, dnlpd - quantile * dnlpd_error, dnlpd + quantile * dnlpd_error),
        "rmse minus ML-II": tuple((dmse + s * quantile * dmse_error) / total for s in (0, -1, 1)),
    }


def flat(tree: Any) -> np.ndarray:
    """Return all numbers of a tree of diagnostics."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def convergence(method: str, fit: gp.Fit) -> dict:
    """Return the report of the learner."""
    info = fit.info
    if method == "NUTS":
        return {
            "worst rhat": float(flat(info.rhat).max()),
            "least bulk ess": float(flat(info.ess).min()),
            "least tail ess": float(flat(info.ess_tail).min()),
            "by hyperparameter": {
                name: [np.ravel(part[name]).tolist() for part in (info.rhat, info.ess, info.ess_tail)]
                for name in info.rhat
            },
            "divergences": int(np.sum(info.diverging)),
            "gradients": int(info.num_warmup_gradients) + int(np.sum(info.num_leapfrogs)),
            "warm-up steps": int(info.num_warmup),
            "metric": info.metric_name,
        }
    if method == "ML-II":
        values = np.asarray(info.values)
        top = np.sort(values[np.isfinite(values)])[::-1]
        distinct = [float(v) for i, v in enumerate(top) if i == 0 or top[i - 1] - v > 1e-2]
        return {
            "log evidence": float(fit.log_evidence),
            "starts at the best": int(np.sum(values > top[0] - 1e-2)),
            "starts": len(values),
            "distinct optima": distinct[:8],
        }
    return {
        "elbo": float(info.elbo),
        "elbo error": float(info.elbo_standard_error),
        "khat": float(info.khat),
        "fixed sample": int(info.num_samples),
        "gap": float(info.gap),
        "gradients": int(info.num_gradients),
        "status": int(info.status),
    }


def hyperparameters(fit: gp.Fit, free: tuple[str, ...]) -> dict:
    """Return median and 95 % interval of each hyperparameter; for a point estimate, its value."""
    fits = {}
    for name in free:
        value = fit.models
        for part in name.split("."):
            value = value[int(part)] if isinstance(value, (tuple, list)) else getattr(value, part)
        fits[name] = np.quantile(np.asarray(value), [0.5, 0.025, 0.975], axis=0).T.tolist()
    return fits


def engine(method: str, name: str, small: bool) -> Any:
    """Return the learner of a method."""
    if method == "ML-II":
        return Near(gp.ML2(num_restarts=4 if small else STARTS[name]), 1.5)
    if method == "NUTS":
        chains, draws, warmup = (2, 100, 100) if small else DRAWS[name]
        return Near(
            mcmc.NUTS(num_chains=chains, num_draws=draws, num_warmup=warmup, target_acceptance=0.9), 0.5
        )
    draws = 200 if small else 1000
    return vi.MeanField(num_draws=draws) if method == "mean-field" else vi.FullRank(num_draws=draws)


def run_problem(name: str, small: bool, seed: int) -> dict:
    """Run all methods on one data set."""
    problem = PROBLEMS[name]()
    if small:
        problem = thin(problem)
    model, prior, results, reference = problem.model, wide_prior(problem), {}, None
    free = tuple(leaf for leaf in gp.leaf_names(problem.model) if leaf not in problem.fixed)
    for number, method in enumerate(METHODS):
        start, key = time.process_time(), jax.random.key(100 * seed + number)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit = gp.fit(
                key,
                model,
                problem.X,
                problem.y,
                learn=engine(method, name, small),
                prior=prior,
                standardize=False,
                progress=False,
            )
        jax.block_until_ready(fit.models)
        seconds = time.process_time() - start
        scored = score(fit, problem)
        if method == "ML-II":
            # The others start around the optimum that this one found.
            model, reference = fit.model, scored
            if name.startswith("airline"):
                prior = airline_prior(problem, fit.model)
        results[method] = summarize(scored, reference, problem.block) | {
            "seconds": seconds,
            "convergence": convergence(method, fit),
            "hyperparameters": hyperparameters(fit, free),
            "warnings": [str(w.message) for w in caught],
            "published": PUBLISHED[name][method],
        }
        print_progress(name, method, results[method])
    size = {"train": len(problem.y), "test": len(problem.y_test), "columns": problem.X.shape[1]}
    return {"size": size, "methods": results, "environment": common.environment()}


def thin(problem: RegressionSetup) -> RegressionSetup:
    """Return a small version, with at most 60 training and 40 test points."""
    step = -(-len(problem.y) // 60)
    return problem._replace(
        X=problem.X[::step], y=problem.y[::step], X_test=problem.X_test[:40], y_test=problem.y_test[:40]
    )


def print_progress(name: str, method: str, result: dict) -> None:
    shown = {key: value for key, value in result["convergence"].items() if key != "by hyperparameter"}
    print(
        f"{name}, {method}: rmse {result['rmse']:.3f}, nlpd {result['nlpd']:.3f}, "
        f"{result['seconds']:.0f} s, {shown} {result['warnings'] or ''}",
        flush=True,
    )


def report(results: dict, settings: dict) -> None:
    """Print the tables; write the results and the plot."""
    header = ["", "RMSE (s.e.)", "NLPD (s.e.)", "mean over components", "NLPD - ML-II (95 %)"]
    header += ["published RMSE (s.e.)", "published NLPD", "95 % covers", "R-hat", "bulk / tail ESS", "CPU s"]
    for name, result in results.items():
        rows = [row(method, fit) for method, fit in result["methods"].items()]
        size = result["size"]
        common.print_table(
            f"{name}: {size['train']} x {size['columns']}, {size['test']} tested", header, rows
        )
    if not settings["small"]:
        stored = common.read_results("gp_hyperparameters").get("results", {})
        results = {name: (stored | results)[name] for name in PROBLEMS if name in stored | results}
        common.write_results("gp_hyperparameters", {"settings": settings, "results": results})
        plot(results)


def row(method: str, fit: dict) -> list[str]:
    middle, low, high = fit["nlpd minus ML-II"]
    rmse, rmse_error, nlpd = fit["published"]
    checked = fit["convergence"]
    is_nuts = method == "NUTS"
    return [
        method,
        f"{fit['rmse']:.3f} ({fit['rmse error']:.3f})",
        f"{fit['nlpd']:.3f} ({fit['nlpd error']:.3f})",
        f"{fit['nlpd, mean over components']:.3f}",
        "" if method == "ML-II" else f"{middle:+.3f} ({low:+.3f} to {high:+.3f})",
        f"{rmse:.2f} ({rmse_error:.2f})",
        f"{nlpd:.2f}",
        f"{100 * fit['coverage of 95 %']:.0f} %",
        f"{checked['worst rhat']:.4f}" if is_nuts else "",
        f"{checked['least bulk ess']:.0f} / {checked['least tail ess']:.0f}" if is_nuts else "",
        f"{fit['seconds']:.0f}",
    ]


def plot(results: dict) -> None:
    """Plot NLPD and RMSE of each method, measured and published."""
    figure, axes = common.figure(width=2.9 * len(results) + 0.6, height=5.2, rows=2, columns=len(results))
    axes = np.asarray(axes).reshape(2, len(results))
    for column, (name, result) in enumerate(results.items()):
        for line, key in enumerate(("nlpd", "rmse")):
            axis = axes[line, column]
            for position, (method, fit) in enumerate(result["methods"].items()):
                axis.errorbar(position, fit[key], fit[f"{key} error"], fmt="o", color="C0")
                published = PUBLISHED[name][method]
                axis.plot(
                    position + 0.2, published[2 if key == "nlpd" else 0], "D", color="C1", fillstyle="none"
                )
            axis.set_xticks(range(len(METHODS)), METHODS if line else [""] * len(METHODS), rotation=35)
            if line == 0:
                axis.set_title(name)
        axes[0, 0].set_ylabel("NLPD")
        axes[1, 0].set_ylabel("RMSE")
    axes[0, 0].plot([], [], "o", color="C0", label="here, with s.e.")
    axes[0, 0].plot([], [], "D", color="C1", fillstyle="none", label="published")
    axes[0, 0].legend(frameon=False, fontsize=8)
    common.save_figure(figure, "gp_hyperparameters")


def main() -> None:
    parser = common.parser(__doc__)
    only = "the data sets to run; the results of the others are kept from the last run"
    parser.add_argument("--only", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), help=only)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results = {name: run_problem(name, arguments.small, arguments.seed) for name in arguments.only}
    report(results, {"seed": arguments.seed, "small": arguments.small, "starts": STARTS, "draws": DRAWS})


if __name__ == "__main__":
    main()
