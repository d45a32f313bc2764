"""Is it worth converging? Hyperparameters of a classifier by L-BFGS, against the published alternation.

Protocol: ionosphere with its index column, as published (``li2023.py``): 5 folds, isotropic Matern-5/2 kernel from
variance = lengthscale = 1, probit. Ours is ``gp.fit(learn=gp.ML2(num_restarts=1))``, the maximum of a converged
evidence. The alternation of Li, John and Solin (2023) is built from the same pieces: rounds of 20 steps of
conjugate-computation variational inference with step 0.1 and of 20 Adam steps with rate 0.01 on the objective in
softplus coordinates at fixed sites, until the objective falls after a round (which is then taken back), or nothing
moves (``allclose`` as published), or 10000 rounds. A round is one compiled function and builds K once for its 20 steps.
Both have 20 quadrature nodes, as published. Their hybrid follows the partial gradient, which is not the gradient of any
function: a line search may stall on it.

CPU: process seconds over all folds, one thread. "with compilation" adds what is compiled once, for the first fold; the
ratio is between times without it.

Required: at least 10 times less CPU than the alternation.
"""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from li2023 import Fold, folds, start_model

from probinfer import gp
from probinfer.gp.approximation.assembly import assemble
from probinfer.gp.approximation.fixed_point import FixedPoint
from probinfer.gp.approximation.gaussian_marginals import marginals_from
from probinfer.gp.approximation.objectives import Objective, energy
from probinfer.gp.approximation.updates import updated_sites
from probinfer.gp.structure.dense import posterior_matrices

NODES, STEPS, STEP_SIZE, RATE, MAX_ROUNDS = 20, 20, 0.1, 0.01, 10_000
OURS = {
    "EP": gp.EP(num_nodes=NODES),
    "VI": gp.VI(num_nodes=NODES),
    "Hybrid, total": gp.Hybrid("total", num_nodes=NODES),
    "Hybrid, partial": gp.Hybrid("partial", num_nodes=NODES),
}
# The objective (power) of each alternation.
THEIRS = {"alternation, VI": 0.0, "alternation, hybrid": 1.0}


class State(NamedTuple):
    """The state of the alternation."""

    raw: Any  # variance and lengthscale before softplus
    adam: Any
    sites: Any


def model_at(raw) -> gp.Model:
    variance, lengthscale = jax.nn.softplus(raw)
    return gp.Model(gp.kernels.Matern52(variance, lengthscale), gp.likelihoods.Bernoulli("probit"))


def beginning(num: int) -> State:
    """Return unit hyperparameters and flat sites."""
    raw = jnp.asarray(np.full(2, np.log(np.expm1(1.0))))
    sites = jnp.asarray(np.stack([np.zeros(num), np.full(num, 1e-6)]))
    return State(raw, optax.adam(RATE).init(raw), sites)  # from NumPy: strong types, one compilation


@partial(jax.jit, static_argnums=0)
def one_round(power: float, state: State, X, y) -> tuple[State, Any]:
    """20 steps in the sites, 20 in the hyperparameters, and the objective after them."""
    objective, likelihood = Objective(power, NODES), gp.likelihoods.Bernoulli("probit")
    K, zeros = model_at(state.raw).kernel.gram(X), jnp.zeros_like(y)

    def site_step(_, sites):
        q = marginals_from(posterior_matrices(K, sites[1], False), zeros, *sites)
        new = updated_sites(Objective(0.0, NODES), likelihood, y, q, sites)
        return (1 - STEP_SIZE) * sites + STEP_SIZE * new

    sites = jax.lax.fori_loop(0, STEPS, site_step, state.sites)

    def loss(raw):
        return -energy(objective, model_at(raw), X, y, sites)

    def adam_step(_, carried):
        raw, adam = carried
        change, adam = optax.adam(RATE).update(jax.grad(loss)(raw), adam)
        return raw + change, adam

    raw, adam = jax.lax.fori_loop(0, STEPS, adam_step, (state.raw, state.adam))
    return State(raw, adam, sites), -loss(raw)


@partial(jax.jit, static_argnums=0)
def objective_at(power: float, state: State, X, y):
    return energy(Objective(power, NODES), model_at(state.raw), X, y, state.sites)


def alternate(power: float, X, y, max_rounds: int) -> tuple[State, float, int, str]:
    """Return the last accepted state, its objective, the number of rounds, and why they ended."""
    state = beginning(len(y))
    value = float(objective_at(power, state, X, y))
    for done in range(1, max_rounds + 1):
        new, new_value = one_round(power, state, X, y)
        new_value = float(new_value)
        if not new_value >= value:
            return state, value, done, "objective fell"
        old_numbers, new_numbers = (np.concatenate([s.raw, np.ravel(s.sites)]) for s in (state, new))
        if np.allclose(old_numbers, new_numbers):
            return state, value, done, "nothing moved"
        state, value = new, new_value
    return state, value, max_rounds, "out of rounds"


@jax.jit
def predict_at(state: State, X, y, X_test):
    """Return the latent moments at test points, from the given sites."""
    count = jnp.zeros((), jnp.int32)
    fixed_point = FixedPoint(state.sites, jnp.zeros_like(y[0]), count, count)
    return assemble(model_at(state.raw), X, y, fixed_point, jnp.zeros_like(y[0]), NODES).predict(X_test)


def run_alternation(power: float, fold: Fold, max_rounds: int) -> dict:
    """Run one fold by the alternation."""
    X, y = jnp.asarray(fold.X), jnp.asarray(fold.y)
    start = time.process_time()
    jax.block_until_ready(one_round(power, beginning(len(y)), X, y))
    float(objective_at(power, beginning(len(y)), X, y))
    first = time.process_time()
    alternate(power, X, y, 1)
    second = time.process_time()
    state, value, rounds, reason = alternate(power, X, y, max_rounds)
    seconds = time.process_time() - second
    mean, variance = predict_at(state, X, y, jnp.asarray(fold.X_test))
    log_prob = gp.likelihoods.Bernoulli("probit").log_prob(jnp.asarray(fold.y_test), mean, variance)
    compilation = max(0.0, (first - start) - (second - first))
    return {
        "seconds": seconds,
        "compilation": compilation,
        "objective": value,
        "work": rounds,
        "end": reason,
        "nlpd": -float(jnp.mean(log_prob)),
    } | judged(model_at(state.raw), X, y)


def run_ours(inference, fold: Fold, is_first: bool) -> dict:
    """Run one fold by L-BFGS, the first fold twice: the difference of the two times is the compilation."""
    times, messages = [], []
    for _ in range(2 if is_first else 1):
        start = time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit = gp.fit(
                jax.random.key(0),
                start_model(),
                fold.X,
                fold.y,
                inference=inference,
                learn=gp.ML2(num_restarts=1),
                standardize=False,
                progress=False,
            )
            jax.block_until_ready(fit.models)
        times.append(time.process_time() - start)
        messages = [str(w.message) for w in caught]
    return {
        "seconds": times[-1],
        "compilation": max(0.0, times[0] - times[-1]),
        "objective": float(fit.log_evidence),
        "work": int(fit.info.num_evaluations[0]),
        "end": gp_status(fit.info.status),
        "warnings": messages,
        "nlpd": -float(jnp.mean(fit.log_prob(fold.X_test, fold.y_test))),
    } | judged(fit.model, jnp.asarray(fold.X), jnp.asarray(fold.y))


def gp_status(status) -> str:
    from probinfer.core.status import Status

    return Status(int(status)).name


def judged(model, X, y) -> dict:
    """Return hyperparameters and the converged evidences at them, by the same code for each method."""
    return {
        "variance": float(model.kernel.variance),
        "lengthscale": float(model.kernel.lengthscale),
        "evidence": {
            name: float(gp.log_evidence(model, X, y, OURS[name])) for name in ("EP", "VI", "Hybrid, total")
        },
    }


def table(results: dict) -> None:
    header = [
        "",
        "folds",
        "CPU s",
        "compilation",
        "rounds or evaluations",
        "ended",
        "objective",
        "converged there",
    ]
    header += ["log variance", "log lengthscale", "test NLPD"]
    rows = []
    for name, by_fold in results.items():
        folds = list(by_fold.values())
        if not folds:
            continue
        power = THEIRS.get(name)
        objective_name = {None: name.replace("partial", "total"), 0.0: "VI", 1.0: "Hybrid, total"}[power]
        ends = [fold["end"] for fold in folds]
        rows.append(
            [
                name,
                str(len(folds)),
                f"{cpu(folds):.1f}",
                f"{max(fold['compilation'] for fold in folds):.1f}",
                ", ".join(str(fold["work"]) for fold in folds),
                ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends)),
                f"{np.mean([fold['objective'] for fold in folds]):.4f}",
                f"{np.mean([fold['evidence'][objective_name] for fold in folds]):.4f}",
                spread(np.log([fold["variance"] for fold in folds])),
                spread(np.log([fold["lengthscale"] for fold in folds])),
                mean_error([fold["nlpd"] for fold in folds]),
            ]
        )
    common.print_table("ionosphere, sum or mean over folds (range)", header, rows)
    names = [name for name in OURS if results[name]]
    shown = ratios(results)
    rows = [[name, *(shown[theirs].get(name, "") for theirs in shown)] for name in names]
    common.print_table(
        "CPU of the alternation / CPU of ours, on the folds that both have", ["", *shown], rows
    )


def spread(values) -> str:
    return f"{np.mean(values):.2f} ({np.min(values):.2f} to {np.max(values):.2f})"


def mean_error(values) -> str:
    error = f" ({np.std(values, ddof=1) / np.sqrt(len(values)):.4f})" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{error}"


def ratios(results: dict) -> dict[str, dict[str, str]]:
    """Return the ratio of the CPU time of each alternation to that of each of our methods, and the number of folds."""
    ratio_of: dict = {}
    for theirs in THEIRS:
        ratio_of[theirs] = {}
        for name in OURS:
            both = [number for number in results[theirs] if number in results[name]]
            if both:
                times = [cpu([results[method][number] for number in both]) for method in (theirs, name)]
                ratio_of[theirs][name] = f"{times[0] / times[1]:.1f} ({len(both)} folds)"
    return ratio_of


def cpu(folds: list[dict]) -> float:
    return sum(fold["seconds"] for fold in folds)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=(*OURS, *THEIRS), default=(*OURS, *THEIRS))
    kept = "the folds to run; the results of other folds and methods are kept from earlier runs"
    parser.add_argument("--folds", nargs="+", type=int, choices=range(5), default=range(5), help=kept)
    arguments = parser.parse_args()
    parts, numbers = folds("ionosphere"), arguments.folds
    if arguments.small:
        parts, numbers = [Fold(f.X[:80], f.y[:80], f.X_test[:30], f.y_test[:30]) for f in parts], (0, 1)
    results: dict = {} if arguments.small else common.read_results("gp_alternation").get("results", {})
    results = {name: results.get(name, {}) for name in (*OURS, *THEIRS)}
    for number in numbers:
        for name in arguments.methods:
            if name in OURS:
                fold_result = run_ours(OURS[name], parts[number], number == numbers[0])
            else:
                fold_result = run_alternation(
                    THEIRS[name], parts[number], 20 if arguments.small else MAX_ROUNDS
                )
            results[name][str(number)] = fold_result
            print(number, name, fold_result, flush=True)
            if not arguments.small:
                write(results)
    table(results)


def write(results: dict) -> None:
    """Collect the results of all runs, and list the missing ones."""
    settings = {"nodes": NODES, "steps": STEPS, "step size": STEP_SIZE, "rate": RATE}
    missing = {name: sorted({*map(str, range(5))} - set(found)) for name, found in results.items()}
    missing = {name: numbers for name, numbers in missing.items() if numbers}
    body = {"settings": settings, "folds not run": missing, "ratios": ratios(results), "results": results}
    common.write_results("gp_alternation", body)


if __name__ == "__main__":
    main()
