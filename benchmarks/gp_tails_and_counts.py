"""Student-t noise and Poisson counts: how far is each approximation from sampling the joint model?

Question: with heavy-tailed noise (not log-concave) and with counts, what do Laplace, EP, VI and Hybrid cost in held-out
log density against the exact posterior of latent values and hyperparameters, and is it the point estimate of the
hyperparameters or the Gaussian in place of p(f | y) that costs it?

Data: neal, 100 points with outliers, in the folds and from the start of Li, John and Solin (2023, table 2; code of the
paper): Matern-5/2, zero mean, nothing standardized, Student-t with 3 degrees of freedom and a learned scale, all from
1; KFold(5, shuffle, random_state 42). Gaussian noise with exact inference is the baseline. Coal: mining disasters in
333 bins of a third of a year, Poisson, Matern-5/2 with a learned constant mean of the log rate, time standardized; five
random folds of bins (training parts cut to 266), a constant rate as baseline.

Protocol: approximations learn by ``gp.fit`` with ``gp.ML2(num_restarts=1)``. Sites are found from those of the start,
as in learning: for Student-t there may be several fixed points, and none may be found from scratch; what ``fit`` itself
predicts is in the column "fit". NUTS samples the joint model with ``gp.default_prior``, in coordinates where it mixes
(``tails_and_counts.py``, exact): on neal Student-t noise as a mixture of normals, f integrated out; on coal latent
values whitened by their posterior under fixed Gaussian sites. Latent values whitened by the prior
(``gp.joint_posterior``) mix slowly, since the data hold f in place and not ν = L⁻¹ (f − μ); they are the row "whitened
f", on coal for the first fold only. "θ of NUTS": each approximation of f given θ, averaged over
hyperparameters that NUTS drew: what is left of its distance is due to the approximation of f.

Scores: test NLPD; paired difference from NUTS by test point with a normal 95 % interval over points; NLPD of single
chains gives the Monte Carlo error of NUTS. A second difference is over the folds where the sites at the learned
hyperparameters converged, which is known only after learning: it says what an approximation is worth where it was
found. An answer: the interval of the difference covers 0, or lies within 0.01 of it.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jax.scipy.stats import poisson
from tails_and_counts import (
    DATA,
    LATENT,
    WEIGHTS,
    Fold,
    predict_given_weights,
    prior_of,
    prior_whitened_draws,
    sites_posterior,
    stacked,
    start_model,
    weights_posterior,
)
from tails_and_counts_plot import curves, plot, shown_data

from probinfer import gp, infer, mcmc
from probinfer.core.errors import NumericalError
from probinfer.core.status import Status

NODES = 64  # Student-t noise is narrow beside the marginals that the search starts from
INFERENCE = {
    "Laplace": gp.Laplace(),
    "EP": gp.EP(num_nodes=NODES),
    "VI": gp.VI(num_nodes=NODES),
    "Hybrid": gp.Hybrid("total", num_nodes=NODES),
}
BASELINE = {"neal": "Gaussian noise, ML-II", "coal": "constant rate"}
NUTS, WHITENED, FREE_DF = "NUTS", "NUTS, whitened f", "NUTS, df learned"
SAMPLERS = {"neal": (NUTS, WHITENED, FREE_DF), "coal": (NUTS, WHITENED)}
AT_NUTS = ", θ of NUTS"
ENGINES = {
    ("neal", NUTS): mcmc.NUTS(num_chains=4, num_warmup=500, num_draws=1000),
    ("neal", WHITENED): mcmc.NUTS(num_chains=4, num_warmup=500, num_draws=500),
    ("neal", FREE_DF): mcmc.NUTS(num_chains=4, num_warmup=500, num_draws=500),
    ("coal", NUTS): mcmc.NUTS(num_chains=2, num_warmup=200, num_draws=300, max_tree_depth=3),
    ("coal", WHITENED): mcmc.NUTS(num_chains=2, num_warmup=200, num_draws=200),
}
PER_CHAIN, NUM_MIXED = 200, {"neal": 200, "coal": 100}  # draws that predict: of a chain, with approximate f


@jax.jit
def predict_all(inference, models, X, y, X_all, sites):
    """Latent means and variances ``(S, M)`` at S hyperparameter values, with status and evidence of each."""

    def one(model):
        solution = inference.condition(model, X, y, sites)
        return *solution.predict(X_all), solution.status, solution.log_evidence

    return jax.lax.map(one, models)


def run_nuts(name: str, method: str, fold: Fold, engine) -> tuple[dict, np.ndarray, Any, Any]:
    """Report, log densities, predictive distribution, and some models drawn from the posterior."""
    model = start_model(name, fold.y)
    prior = prior_of(model, fold.X, method == FREE_DF)
    if method == WHITENED:
        free, target = gp.joint_posterior(model, prior, fold.X, fold.y)
    elif name == "coal":
        free, target, sites = sites_posterior(model, prior, fold.X, fold.y)
    else:
        free, target = weights_posterior(model, prior, fold.X, fold.y)
    posterior = infer(jax.random.key(0), target, engine, progress=False)
    thinned = np.linspace(0, engine.num_draws - 1, min(PER_CHAIN, engine.num_draws)).astype(int)
    chains = []
    for chain in range(engine.num_chains):
        draws = {key: leaf[chain, thinned] for key, leaf in posterior.draws.items()}
        models = stacked(free, model, {key: draws[key] for key in free.names})
        if WEIGHTS in draws:
            moments = predict_given_weights(models, draws[WEIGHTS], fold.X, fold.y, fold.X_all)
            chains.append(models.likelihood.predictive(*moments))
            continue
        if method != WHITENED:
            draws |= {LATENT: prior_whitened_draws(models, draws[LATENT], fold.X, sites)}
        chains.append(gp.joint_predictive(free, model, draws, fold.X, fold.X_all))
    by_chain = np.stack([log_densities(chain, fold) for chain in chains])
    info = posterior.info
    record = {
        "status": Status(int(info.status)).name,
        "rhat": max(float(np.max(leaf)) for leaf in jax.tree.leaves(info.rhat)),
        "ess": min(float(np.min(leaf)) for leaf in jax.tree.leaves((info.ess, info.ess_tail))),
        "divergences": int(np.sum(info.diverging)),
        "gradients": int(info.num_warmup_gradients) + int(np.sum(info.num_leapfrogs)),
        "nlpd of chains": (-by_chain.mean(1)).tolist(),
    }
    record |= {key: float(np.median(posterior[key])) for key in free.names}
    some = posterior.resample(jax.random.key(1), NUM_MIXED[name])
    parts = [(chain.likelihood, chain.means, chain.variances) for chain in chains]
    likelihood, means, variances = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    return (
        record,
        logsumexp(by_chain, axis=0) - np.log(len(by_chain)),
        likelihood.predictive(means, variances),
        stacked(free, model, {key: some[key] for key in free.names}),
    )


def log_densities(predictive, fold: Fold) -> np.ndarray:
    """Log density of the held-out outputs; the distribution is that at ``X_all``."""
    y = np.zeros(len(fold.X_all))
    y[fold.held_out] = fold.y_held_out
    return np.asarray(predictive.log_prob(jnp.asarray(y)))[fold.held_out]


def run_ml2(name: str, inference, fold: Fold) -> tuple[dict, np.ndarray, Any]:
    """``gp.fit``, and its hyperparameters with the sites that learning saw."""
    model = start_model(name, fold.y)
    if isinstance(inference, gp.Exact):
        model = gp.Model(model.kernel, gp.likelihoods.Gaussian(1.0))
    fit = gp.fit(
        jax.random.key(1),
        model,
        fold.X,
        fold.y,
        inference=inference,
        learn=gp.ML2(num_restarts=1),
        prior=prior_of(model, fold.X),
        standardize=False,
        progress=False,
    )
    nlpd = -np.asarray(fit.log_prob(fold.X_all[fold.held_out], fold.y_held_out)).mean()
    *moments, status, evidence = approximate(inference, model, fit.models, fold)
    predictive = fit.models.likelihood.predictive(*moments)
    record = {
        "status": Status(int(fit.info.status)).name,
        "status of sites": Status(int(status[0])).name,
        "log evidence": float(evidence[0]),
        "evaluations": int(fit.info.num_evaluations[0]),
        "fit": {"nlpd": float(nlpd), "log evidence": float(fit.log_evidence)},
    }
    record |= {key: float(gp.leaves.get_leaf(fit.model, key)) for key in gp.leaf_names(model)}
    return record, log_densities(predictive, fold), predictive


def approximate(inference, start, models, fold: Fold):
    data = jnp.asarray(fold.X), jnp.asarray(fold.y)
    sites = None if isinstance(inference, gp.Exact) else gp.condition(start, *data, inference).sites
    return predict_all(inference, models, *data, jnp.asarray(fold.X_all), sites)


def run_mixed(name: str, inference, models, fold: Fold) -> tuple[dict, np.ndarray, Any]:
    """The approximation of f at hyperparameters that NUTS drew; draws at which it fails are left out and counted."""
    mean, variance, status, _ = approximate(inference, start_model(name, fold.y), models, fold)
    good = np.asarray(status) == Status.OK
    if not good.any():
        raise NumericalError("the approximation fails at every draw", int(np.max(status)))
    likelihood = jax.tree.map(lambda leaf: leaf[good], models.likelihood)
    predictive = likelihood.predictive(mean[good], variance[good])
    record = {"status": "OK" if good.all() else "SOME_DRAWS_FAILED", "draws": [int(good.sum()), len(good)]}
    return record, log_densities(predictive, fold), predictive


def run_constant_rate(fold: Fold) -> tuple[dict, np.ndarray, None]:
    log_density = poisson.logpmf(fold.y_held_out, float(fold.y.mean()))
    return {"status": "OK"}, np.asarray(log_density), None


def run_fold(name: str, fold: Fold, engines: dict, is_first: bool) -> dict:
    """Run each method on one fold."""
    results: dict[str, Any] = {}

    def keep(method, work, *arguments):
        start = time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                record, log_density, predictive, *rest = work(*arguments)
            except NumericalError as error:
                results[method] = {"status": "failed", "error": str(error)}
                return None
        results[method] = record | {"nlpd": -float(np.mean(log_density))}
        results[method] |= {"seconds": time.process_time() - start}
        results[method] |= {"warnings": [str(w.message)[:200] for w in caught]}
        print("   ", method, results[method], flush=True)
        results[method]["pointwise nlpd"] = np.round(-np.asarray(log_density), 6).tolist()
        if is_first and method in (NUTS, "EP, ML-II", "Gaussian noise, ML-II"):
            results[method]["curves"] = curves(name, predictive, fold)
        return rest

    for method in SAMPLERS[name] if is_first or name == "neal" else (NUTS,):
        rest = keep(method, run_nuts, name, method, fold, engines[name, method])
        if method == NUTS:
            drawn = rest[0]
    if name == "neal":
        keep(BASELINE[name], run_ml2, name, gp.Exact(), fold)
    else:
        keep(BASELINE[name], run_constant_rate, fold)
    for label, inference in INFERENCE.items():
        keep(f"{label}, ML-II", run_ml2, name, inference, fold)
        if label != "Hybrid":  # which has VI's f given θ
            keep(f"{label}{AT_NUTS}", run_mixed, name, inference, drawn, fold)
    return results


def methods_of(name: str) -> list[str]:
    learned = [f"{label}, ML-II" for label in INFERENCE]
    mixed = [f"{label}{AT_NUTS}" for label in INFERENCE if label != "Hybrid"]
    return [*SAMPLERS[name], BASELINE[name], *learned, *mixed]


def paired(parts: list[dict], method: str) -> dict | None:
    """Test NLPD of a method minus that of NUTS with its 95 % interval, over the folds where the method has one."""
    both = [part for part in parts if "pointwise nlpd" in part.get(method, {})]
    if not both:
        return None
    gaps = np.concatenate([np.subtract(p[method]["pointwise nlpd"], p[NUTS]["pointwise nlpd"]) for p in both])
    half = 1.96 * gaps.std(ddof=1) / np.sqrt(len(gaps))
    nlpd = np.concatenate([p[method]["pointwise nlpd"] for p in both]).mean()
    return {
        "nlpd": float(nlpd),
        "difference": float(gaps.mean()),
        "interval": [float(gaps.mean() - half), float(gaps.mean() + half)],
        "folds": len(both),
    }


def compare(result: dict) -> dict:
    """The result with its differences from NUTS, over all folds and over those where the sites converged."""
    parts, name = result["folds"], result["name"]
    good = {
        method: [p for p in parts if p.get(method, {}).get("status of sites", "OK") == "OK"]
        for method in methods_of(name)
    }
    return result | {
        "compared": {method: paired(parts, method) for method in methods_of(name)},
        "compared, converged": {method: paired(good[method], method) for method in methods_of(name)},
        "chain error": {method: chain_error(parts, method) for method in SAMPLERS[name]},
    }


def chain_error(parts: list[dict], method: str) -> float | None:
    """Return the standard error of the NLPD of a sampler, from its chains."""
    spreads = [p[method]["nlpd of chains"] for p in parts if "nlpd of chains" in p.get(method, {})]
    if not spreads:
        return None
    return float(np.sqrt(np.sum(np.var(spreads, axis=1, ddof=1) / len(spreads[0]))) / len(spreads))


def report(result: dict) -> None:
    name, rows = result["name"], []
    for method in methods_of(name):
        parts = [part[method] for part in result["folds"] if method in part]
        compared, converged = result["compared"][method], result["compared, converged"][method]
        error = result["chain error"].get(method)
        nlpds = [part["fit"]["nlpd"] for part in parts if "fit" in part]
        draws = [part["draws"] for part in parts if "draws" in part]
        rhat, ess = ([part[key] for part in parts if key in part] for key in ("rhat", "ess"))
        rows.append(
            [
                method,
                f"{compared['nlpd']:.4f}" + (f" ± {error:.4f}" if error else "") if compared else "",
                difference(compared) if method != NUTS else "",
                f"{converged['folds']}: {difference(converged)}" if converged and method != NUTS else "",
                f"{np.mean(nlpds):.4f}" if nlpds else "",
                counted([part["status"] for part in parts]),
                counted([part["status of sites"] for part in parts if "status of sites" in part])
                or ("{} of {} draws OK".format(*np.sum(draws, axis=0)) if draws else ""),
                f"{max(rhat):.3f}, {min(ess):.0f}" if rhat else "",
                f"{np.median([part.get('seconds', np.nan) for part in parts]):.1f}",
            ]
        )
    header = ["", "test NLPD (± Monte Carlo)", "minus NUTS (95 %)", "folds that converged"]
    header += ["fit", "statuses", "sites", "R-hat, ESS", "CPU s"]
    common.print_table(f"{name}: {result['size']}, {len(result['folds'])} folds", header, rows)


def difference(compared: dict | None) -> str:
    return (
        "{:+.4f} ({:+.4f} to {:+.4f})".format(compared["difference"], *compared["interval"])
        if compared
        else ""
    )


def counted(labels: list[str]) -> str:
    return ", ".join(f"{labels.count(label)} {label}" for label in dict.fromkeys(labels))


def write(results: dict) -> None:
    ordered = {key: results[key] for key in DATA if key in results}
    settings = {f"{key[0]}, {key[1]}": repr(engine) for key, engine in ENGINES.items()}
    common.write_results("gp_tails_and_counts", {"settings": settings, "results": ordered})
    plot(ordered)


def main() -> None:
    parser = common.parser(__doc__)
    only = "the data sets to run; the results of the others are kept from the last run"
    parser.add_argument("--only", nargs="+", choices=list(DATA), default=list(DATA), help=only)
    arguments = parser.parse_args()
    results = {} if arguments.small else common.read_results("gp_tails_and_counts").get("results", {})
    engines = ENGINES
    if arguments.small:
        engines = {key: mcmc.NUTS(num_chains=2, num_warmup=40, num_draws=40) for key in ENGINES}
    for name in arguments.only:
        folds = DATA[name]()
        if arguments.small:
            folds = [f._replace(X=f.X[:40], y=f.y[:40]) for f in folds[:1]]
        result: dict[str, Any] = {"name": name, "size": f"{len(folds[0].y)} in training", **shown_data(name)}
        result |= {"environment": common.environment(("scikit-learn",)), "folds": []}
        for number, fold in enumerate(folds):
            print(f"{name}, fold {number}", flush=True)
            result["folds"].append(run_fold(name, fold, engines, number == 0))
        results[name] = compare(result)
        if not arguments.small:
            write(results)
        report(results[name])


if __name__ == "__main__":
    main()
