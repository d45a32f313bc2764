"""Which approximation should learn the hyperparameters of a classifier, and what did the published EP measure?

Question: Li, John and Solin (2023) report that EP predicts clearly worse than variational inference and than their
hybrid. Their EP row was run with a library whose default finds the sites once, at variance = lengthscale = 1, and then
learns the hyperparameters with these sites frozen. Does a frozen EP reproduce their row, and what does a converged EP
do?

Protocol: ``li2023.py``: isotropic Matern-5/2 kernel, probit, 5 folds; ML-II by L-BFGS from variance = lengthscale = 1
(``gp.ML2(num_restarts=1)``), nothing bounded or clipped. Where the training data are separable the evidence may have no
maximum: variance and status say so. Frozen EP: sites of EP at the start, hyperparameters at the maximum of the evidence
of these Gaussian sites, prediction from the same sites. NUTS: on EP's evidence with ``gp.default_prior``, 2 chains of
200 warm-up steps and 300 draws from the ML-II end; on breast cancer one fold.

Scores: mean test NLPD and accuracy; mean and standard error over folds. EP minus NUTS is paired by test point, with a
normal 95 % interval over points.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from li2023 import DATA, PUBLISHED, Fold, folds, start_model
from scipy import optimize

from probinfer import gp, mcmc
from probinfer.core.errors import NumericalError
from probinfer.core.status import Status
from probinfer.gp.approximation.assembly import assemble
from probinfer.gp.approximation.fixed_point import FixedPoint
from probinfer.gp.approximation.gaussian_marginals import marginals

INFERENCE = {
    "Laplace": gp.Laplace(),
    "EP": gp.EP(),
    "VI": gp.VI(),
    "Hybrid, total": gp.Hybrid("total"),
    "Hybrid, partial": gp.Hybrid("partial"),
}
METHODS = ("Laplace", "frozen EP", "EP", "VI", "Hybrid, total", "Hybrid, partial", "NUTS")
# The published row beside which a method stands.
BESIDE = {"Laplace": "Laplace", "frozen EP": "EP", "EP": "EP", "VI": "VI"}
BESIDE |= {"Hybrid, total": "Hybrid", "Hybrid, partial": "Hybrid", "NUTS": "MCMC"}
NUM_FOLDS, NUTS_FOLDS = 5, {"breast cancer": 1}


def kernel_at(log_values):
    return gp.kernels.Matern52(jnp.exp(log_values[0]), jnp.exp(log_values[1]))


@jax.jit
def first_sites(X, y):
    return gp.EP().condition(start_model(), X, y).sites


@jax.jit
def frozen_loss(log_values, X, sites):
    """Minus the log evidence of fixed Gaussian sites, up to a constant, and its gradient."""

    def loss(log_values):
        K = kernel_at(log_values).gram(X)
        return -marginals(K, jnp.zeros(X.shape[0]), sites.lam1, sites.lam2, False).log_z

    return jax.value_and_grad(loss)(log_values)


@jax.jit
def frozen_predict(log_values, X, y, sites, X_test):
    model = gp.Model(kernel_at(log_values), start_model().likelihood)
    zeros, count = jnp.zeros_like(y[0]), jnp.zeros((), jnp.int32)
    fixed_point = FixedPoint(jnp.stack([sites.lam1, sites.lam2]), zeros, count, count)
    return assemble(model, X, y, fixed_point, zeros, 32).predict(X_test)


def run_frozen(fold: Fold) -> tuple[dict, np.ndarray, np.ndarray]:
    """Run EP once, then learn the hyperparameters with its sites fixed."""
    X, y = jnp.asarray(fold.X), jnp.asarray(fold.y)
    sites = first_sites(X, y)

    def loss(log_values):
        value, gradient = frozen_loss(jnp.asarray(log_values), X, sites)
        return float(value), np.asarray(gradient)

    end = optimize.minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B")
    mean, variance = frozen_predict(jnp.asarray(end.x), X, y, sites, jnp.asarray(fold.X_test))
    log_ones = start_model().likelihood.log_prob(jnp.ones_like(mean), mean, variance)
    log_prob = start_model().likelihood.log_prob(jnp.asarray(fold.y_test), mean, variance)
    record = {
        "variance": float(np.exp(end.x[0])),
        "lengthscale": float(np.exp(end.x[1])),
        "status": "OK" if end.success else str(end.message),
    }
    return record, np.asarray(log_prob), np.exp(np.asarray(log_ones))


def run_fit(model, inference, learn, fold: Fold) -> tuple[dict, np.ndarray, np.ndarray]:
    """Run ``gp.fit``; return its report and its predictions."""
    fit = gp.fit(
        jax.random.key(1),
        model,
        fold.X,
        fold.y,
        inference=inference,
        learn=learn,
        standardize=False,
        progress=False,
    )
    record: dict[str, Any] = {"status": Status(int(fit.info.status)).name}
    kernel = fit.models.kernel
    record |= {
        "variance": float(np.median(kernel.variance)),
        "lengthscale": float(np.median(kernel.lengthscale)),
    }
    if fit.is_point:
        record |= {
            "log evidence": float(fit.log_evidence),
            "evaluations": int(fit.info.num_evaluations[0]),
        }
    else:
        info = fit.info
        record |= {
            "variance, 95 %": np.quantile(kernel.variance, [0.025, 0.975]).tolist(),
            "rhat": max(float(np.max(leaf)) for leaf in jax.tree.leaves(info.rhat)),
            "ess": min(float(np.min(leaf)) for leaf in jax.tree.leaves((info.ess, info.ess_tail))),
            "divergences": int(np.sum(info.diverging)),
            "gradients": int(info.num_warmup_gradients) + int(np.sum(info.num_leapfrogs)),
        }
    predictive = fit.predict_y(fold.X_test)
    log_prob = np.asarray(predictive.log_prob(jnp.asarray(fold.y_test)))
    return record, log_prob, np.asarray(predictive.probability)


def run_fold(fold: Fold, methods: list[str], known: dict, small: bool) -> dict:
    """Run methods on one fold; ``known`` holds the results of other methods."""
    results = dict(known)
    for method in methods:
        start = time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                record, log_prob, probability = run_method(fold, method, results, small)
            except NumericalError as error:
                results[method] = {"status": "failed", "error": str(error)}
                continue
        results[method] = record | {
            "nlpd": -float(log_prob.mean()),
            "accuracy": float(np.mean((probability > 0.5) == (fold.y_test == 1))),
            "seconds": time.process_time() - start,
            "warnings": [str(w.message)[:200] for w in caught],
        }
        if method in ("EP", "NUTS"):
            results[method]["pointwise nlpd"] = np.round(-log_prob, 6).tolist()
        shown = {key: value for key, value in results[method].items() if key != "pointwise nlpd"}
        print("   ", method, shown, flush=True)
    return results


def run_method(fold: Fold, method: str, known: dict, small: bool):
    """Return the report, and log densities and probabilities at the test points."""
    if method == "frozen EP":
        return run_frozen(fold)
    if method != "NUTS":
        return run_fit(start_model(), INFERENCE[method], gp.ML2(num_restarts=1), fold)
    model, ep = start_model(), known.get("EP", {})
    if "variance" in ep:
        model = gp.replace(
            model, {"kernel.variance": ep["variance"], "kernel.lengthscale": ep["lengthscale"]}
        )
    warmup, draws = (30, 30) if small else (200, 300)
    nuts = mcmc.NUTS(num_chains=2, num_warmup=warmup, num_draws=draws)
    return run_fit(model, INFERENCE["EP"], nuts, fold)


def values(parts: list[dict], method: str, key: str) -> np.ndarray:
    """Return one number for each fold that has it."""
    return np.array([part[method][key] for part in parts if key in part.get(method, {})])


def mean_error(numbers: np.ndarray, digits: int) -> str:
    if not len(numbers):
        return ""
    error = f" ({numbers.std(ddof=1) / np.sqrt(len(numbers)):.{digits}f})" if len(numbers) > 1 else ""
    return f"{numbers.mean():.{digits}f}{error}"


def paired(parts: list[dict]) -> tuple[float, float, float] | None:
    """Test NLPD of EP minus that of NUTS, mean and 95 % interval over points of the folds that have both."""
    both = [part for part in parts if all("pointwise nlpd" in part.get(name, {}) for name in ("EP", "NUTS"))]
    if not both:
        return None
    gaps = np.concatenate(
        [np.subtract(*(p[name]["pointwise nlpd"] for name in ("EP", "NUTS"))) for p in both]
    )
    half = 1.96 * gaps.std(ddof=1) / np.sqrt(len(gaps))
    return float(gaps.mean()), float(gaps.mean() - half), float(gaps.mean() + half)


def verdict(name: str, parts: list[dict]) -> str:
    """Return the conclusions about the published EP results, and about EP compared with NUTS."""
    frozen, ours = values(parts, "frozen EP", "nlpd"), values(parts, "EP", "nlpd")
    sentences = []
    if len(frozen) == len(ours) > 1:
        errors = [x.std(ddof=1) / np.sqrt(len(x)) for x in (frozen, ours, frozen - ours)]
        sentences.append(
            f"frozen EP {frozen.mean():.3f} (s.e. {errors[0]:.3f}), converged EP {ours.mean():.3f} "
            f"(s.e. {errors[1]:.3f}), paired {np.mean(frozen - ours):+.3f} (s.e. {errors[2]:.3f})"
        )
        if name in PUBLISHED:
            published = PUBLISHED[name]["EP"][0]
            distances = [
                abs(x.mean() - published) / e for x, e in zip((frozen, ours), errors[:2], strict=True)
            ]
            sentence = "the published row is that of EP with frozen sites"
            if distances[0] > 2:
                sentence = "frozen sites do not reproduce the published row"
            elif distances[1] <= distances[0]:
                sentence = "the published row is no closer to frozen sites than to converged ones"
            sentences.append(
                f"published EP {published:.3f}, {distances[0]:.1f} s.e. from frozen, {distances[1]:.1f} from "
                f"converged: {sentence}"
            )
    gap = paired(parts)
    if gap is not None:
        inside = gap[1] <= 0 <= gap[2]
        sentences.append(
            f"EP by ML-II minus NUTS on EP's evidence: {gap[0]:+.4f} ({gap[1]:+.4f} to {gap[2]:+.4f})"
            + (", no difference that these points show" if inside else ", a difference")
        )
    return f"{name}: " + "; ".join(sentences) + "."


def report(name: str, result: dict) -> None:
    parts = result["folds"]
    header = [
        "",
        "test NLPD (s.e.)",
        "published",
        "accuracy (s.e.)",
        "published",
        "log variance",
        "log lengthscale",
    ]
    header += ["statuses", "R-hat", "ESS", "CPU s a fold"]
    rows = []
    for method in METHODS:
        published = PUBLISHED.get(name, {}).get(BESIDE[method])
        statuses = [part[method]["status"] for part in parts if method in part]
        rhat, ess, seconds = (values(parts, method, key) for key in ("rhat", "ess", "seconds"))
        rows.append(
            [
                method,
                mean_error(values(parts, method, "nlpd"), 4),
                f"{published[0]:.3f}" if published else "",
                mean_error(values(parts, method, "accuracy"), 3),
                f"{published[1]:.3f}" if published else "",
                *(extent(np.log(values(parts, method, key))) for key in ("variance", "lengthscale")),
                ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses)),
                f"{rhat.max():.3f}" if len(rhat) else "",
                f"{ess.min():.0f}" if len(ess) else "",
                f"{np.median(seconds):.1f}" if len(seconds) else "",
            ]
        )
    common.print_table(f"{name}: {result['size']}, {len(parts)} folds", header, rows)
    print(verdict(name, parts), flush=True)


def extent(numbers: np.ndarray) -> str:
    return f"{np.median(numbers):.2f} ({numbers.min():.2f} to {numbers.max():.2f})" if len(numbers) else ""


def plot(results: dict) -> None:
    """Plot the test NLPD of each method, measured and published."""
    fig, axes = common.figure(width=3.1 * len(results) + 0.6, height=3.6, columns=len(results))
    for axis, (name, result) in zip(np.ravel(axes), results.items(), strict=True):
        for position, method in enumerate(METHODS):
            numbers = values(result["folds"], method, "nlpd")
            if len(numbers):
                error = numbers.std(ddof=1) / np.sqrt(len(numbers)) if len(numbers) > 1 else 0
                axis.errorbar(position, numbers.mean(), error, fmt="o", color="C0")
            published = PUBLISHED.get(name, {}).get(BESIDE[method])
            if published:
                axis.plot(position + 0.2, published[0], "D", color="C1", fillstyle="none")
        axis.set_xticks(range(len(METHODS)), METHODS, rotation=60, ha="right", fontsize=8)
        axis.set_title(name)
    first = np.ravel(axes)[0]
    first.set_ylabel("test NLPD")
    first.plot([], [], "o", color="C0", label="here, with s.e. over folds")
    first.plot([], [], "D", color="C1", fillstyle="none", label="published")
    first.legend(frameon=False, fontsize=8)
    common.save_figure(fig, "gp_classification")


def write(results: dict, settings: dict) -> None:
    """Collect the results of all runs, and list the missing ones."""
    merged = {name: results[name] for name in DATA if name in results}
    missing = {
        name: [
            f"{method}: {num} of {num_wanted} folds"
            for method in METHODS
            for num_wanted in [NUTS_FOLDS.get(name, NUM_FOLDS) if method == "NUTS" else NUM_FOLDS]
            if (num := sum(method in part for part in merged.get(name, {}).get("folds", []))) < num_wanted
        ]
        for name in DATA
    }
    missing = {name: lines for name, lines in missing.items() if lines}
    body = {"settings": settings, "missing": missing, "results": merged}
    common.write_results("gp_classification", body, ("scikit-learn",))
    plot(merged)


def main() -> None:
    parser = common.parser(__doc__)
    only = "the data sets to run; the results of the others are kept from the last run"
    parser.add_argument("--only", nargs="+", choices=list(DATA), default=list(DATA), help=only)
    chosen = "the methods to run, likewise; NUTS starts where EP ended"
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help=chosen)
    arguments = parser.parse_args()
    results = {} if arguments.small else common.read_results("gp_classification").get("results", {})
    for name in arguments.only:
        parts = folds(name, NUM_FOLDS)
        if arguments.small:
            parts = [Fold(p.X[:60], p.y[:60], p.X_test[:30], p.y_test[:30]) for p in parts[:2]]
        known = results.get(name, {}).get("folds", []) + [{}] * len(parts)
        size = f"{len(parts[0].y)} x {parts[0].X.shape[1]} in training"
        environment = common.environment(("scikit-learn",))
        results[name] = {"size": size, "environment": environment, "folds": known[: len(parts)]}
        for number, fold in enumerate(parts):
            print(f"{name}, fold {number}", flush=True)
            with_nuts = number < NUTS_FOLDS.get(name, len(parts))
            methods = [method for method in arguments.methods if method != "NUTS" or with_nuts]
            results[name]["folds"][number] = run_fold(fold, methods, known[number], arguments.small)
            results[name]["verdict"] = verdict(name, results[name]["folds"])
            if not arguments.small:
                write(results, {"nuts": "2 chains x (200 + 300)", "fold seed": 42})
        report(name, results[name])


if __name__ == "__main__":
    main()
