"""How accurate is coin EM, against Adam? Errors of known parameters, predictions of logistic regression.

Question 1: hierarchical normal model, z_i ~ N(theta, c²), x_i ~ N(z_i, c²), i = 1 ... 100, 10 particles; the best theta
is the mean of x. Error of theta in units of c after 100, 300 and 1000 steps from theta = 0, for c = 1e-3, 1 and 1e3,
particles started with spread 1. True theta is 5 c.

Question 2: logistic regression with prior N(0, 1/alpha) on the weights and Gamma(a, b) on alpha, a and b learned, as in
the published experiments: Wisconsin and banknote (PROBINFER_DATA), 10 particles, 1000 steps, 30 % held out, features
standardized, no intercept, batches of 100 for banknote. Mean over test points and particles of log p(y | w) ("lppd" of
the published tables), log of the mean over particles (the log predictive density), test error.

Methods: ``coin.em`` as it comes, joint and marginal; the published settings (elementwise coins of unit 0.5 for both,
identity geometry, median / log(N+1) bandwidth), joint and marginal; Adam for both in the published settings, the best
of 11 rates 1e-4 ... 10 in hindsight of the mean result. 10 seeds; brackets are 95 % bootstrap intervals of means over
seeds, the last column paired differences to the hindsight-best Adam. Published figures are those of the results files
of Sharrock, Dodd and Nemeth (2024), for the same number of particles and steps but their own splits.
"""

from __future__ import annotations

import time
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from measurements import measurement_path

from probinfer import betting, coin
from probinfer.core.binding import LogDensity, StochasticLogDensity

NAME = "coin_em"
SEEDS, PARTICLES, STEPS = 10, 10, 1000
MARKS = (100, 300, 1000)
RATES = tuple(10.0 ** np.arange(-4, 1.1, 0.5))
PUBLISHED = {
    "Wisconsin": {"coin, joint": -0.254, "coin, marginal": -0.165, "Adam, best rate": -0.124},
    "banknote": {"coin, joint": -0.097, "coin, marginal": -0.082, "Adam, best rate": -0.077},
}


def ways(maximise_fn: Any) -> dict[str, Any]:
    """Return the methods, functions of a log joint density; those of Adam also take a rate."""
    half = betting.coin(unit=0.5)
    theirs = {"geometry": coin.Identity(), "bandwidth": "published"}
    return {
        "coin.em, joint": lambda fn: coin.em(fn),
        "coin.em, marginal": lambda fn: coin.em(fn, maximize_fn=maximise_fn),
        "published coin, joint": lambda fn: coin.em(fn, bet=half, parameter_bet=half, **theirs),
        "published coin, marginal": lambda fn: coin.em(fn, bet=half, maximize_fn=maximise_fn, **theirs),
        "Adam": lambda fn, rate: coin.em(fn, bet=adam(rate), parameter_bet=adam(rate), **theirs),
    }


def adam(rate):
    """Adam with an array as learning rate, so that all rates share one compiled program."""
    core = optax.scale_by_adam()

    def update(updates, state, params=None):
        updates, state = core.update(updates, state, params)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformation(core.init, update)


def follow(algorithm, state, key, judge, marks):
    """Return the judge's value of the state at each recorded step."""
    recorded = []
    for before, mark in zip((0, *marks), marks, strict=False):

        def step(state, number):
            return algorithm.step(jax.random.fold_in(key, number), state)[0], None

        state, _ = jax.lax.scan(step, state, jnp.arange(before, mark))
        recorded.append(judge(state))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *recorded)


def log_hierarchical(x, c, latent, theta):
    return -0.5 * jnp.sum((latent - theta) ** 2 + (x - latent) ** 2) / c**2


def toy(method, make, c: float, seeds: int, marks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Absolute errors over c: (seed, mark), and for Adam (rate, seed, mark)."""

    def one(key, *rate):
        key_data, key_start, key_run = jax.random.split(key, 3)
        x = c * (5 + jnp.sqrt(2.0) * jax.random.normal(key_data, (100,)))
        algorithm = make(LogDensity(log_hierarchical, x, jnp.asarray(c)), *rate)
        state = algorithm.init(jax.random.normal(key_start, (PARTICLES, 100)), jnp.zeros(()))
        return follow(algorithm, state, key_run, lambda s: jnp.abs(s.parameters - jnp.mean(x)) / c, marks)

    return {"error": timed(method, one, jax.random.split(jax.random.key(0), seeds))}


def timed(method: str, run_one: Any, seeds: Any) -> Any:
    """Run all seeds, and all rates for Adam, in one program."""
    if method == "Adam":
        run = jax.jit(
            lambda s: jax.lax.map(lambda r: jax.lax.map(lambda x: run_one(x, r), s), jnp.asarray(RATES))
        )
    else:
        run = jax.jit(lambda s: jax.lax.map(run_one, s))
    return jax.tree.map(np.asarray, run(seeds))


def read(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return features and labels 0 and 1."""
    if name == "banknote":
        table = np.loadtxt(measurement_path("coin/data_banknote_authentication.txt"), delimiter=",")
        return table[:, :-1], table[:, -1]
    rows = np.loadtxt(measurement_path("coin/breast-cancer-wisconsin.data"), delimiter=",", dtype=str)
    table = rows[~(rows == "?").any(axis=1)].astype(float)
    return table[:, 1:10], (table[:, 10] - 2) / 2


def split(name: str, seed: int) -> dict[str, np.ndarray]:
    """Use 70 % for training and 30 % for testing, standardized by the training part."""
    X, y = read(name)
    order = np.random.default_rng(seed).permutation(len(y))
    test, train = np.split(order, [round(0.3 * len(y))])
    mean, sd = X[train].mean(0), X[train].std(0)
    return {"X": (X[train] - mean) / sd, "y": y[train], "X_test": (X[test] - mean) / sd, "y_test": y[test]}


def log_gamma_normal(latent, parameters):
    """Prior of the weights and of alpha = exp(latent alpha), as published: a density of alpha, without Jacobian."""
    alpha, (a, b) = jnp.exp(latent["alpha"]), (jnp.exp(parameters["a"]), jnp.exp(parameters["b"]))
    weights = 0.5 * latent["beta"].size * latent["alpha"] - 0.5 * alpha * jnp.sum(latent["beta"] ** 2)
    gamma = a * parameters["b"] - jax.scipy.special.gammaln(a) + (a - 1) * latent["alpha"] - b * alpha
    return weights + gamma


def log_bernoulli(X, y, beta):
    logits = X @ beta
    return y * jax.nn.log_sigmoid(logits) + (1 - y) * jax.nn.log_sigmoid(-logits)


def log_logistic(X, y, latent, parameters):
    return jnp.sum(log_bernoulli(X, y, latent["beta"])) + log_gamma_normal(latent, parameters)


def log_logistic_batch(X, y, key, latent, parameters):
    chosen = jax.random.randint(key, (100,), 0, len(y))
    part = jnp.sum(log_bernoulli(X[chosen], y[chosen], latent["beta"]))
    return len(y) / 100 * part + log_gamma_normal(latent, parameters)


def best_gamma(latents):
    """Return the maximum-likelihood shape and rate of the particles' alpha, by Newton steps for the log shape."""
    log_alpha = latents["alpha"]
    top = jnp.max(log_alpha)
    log_mean = top + jnp.log(jnp.mean(jnp.exp(log_alpha - top)))
    gap = jnp.maximum(log_mean - jnp.mean(log_alpha), 1e-6)
    start = jnp.log((3 - gap + jnp.sqrt((gap - 3) ** 2 + 24 * gap)) / (12 * gap))

    def newton(_, log_a):
        a = jnp.exp(log_a)
        value = log_a - jax.scipy.special.digamma(a) - gap
        slope = 1 - a * jax.scipy.special.polygamma(1, a)
        return log_a - value / slope

    log_a = jax.lax.fori_loop(0, 5, newton, start)
    return {"a": log_a, "b": log_a - log_mean}


def logistic_start(key, dims: int):
    """As published: alpha near 1 (0.01 on the log scale), weights ten times as wide."""
    key_alpha, key_beta = jax.random.split(key)
    alpha = 0.01 * jax.random.gamma(key_alpha, 1.0, (PARTICLES,))
    beta = jax.random.normal(key_beta, (PARTICLES, dims)) / jnp.sqrt(alpha)[:, None]
    return {"alpha": alpha, "beta": beta}, {"a": jnp.zeros(()), "b": jnp.log(jnp.asarray(0.01))}


def logistic(method, make, name: str, seeds: int, steps: int) -> dict[str, np.ndarray]:
    """Return test scores, (seed,) or, for Adam, (rate, seed)."""
    parts = [split(name, seed) for seed in range(seeds)]
    data = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    keys = jax.random.split(jax.random.key(1), seeds)

    def one(argument, *rate):
        key, fold = argument
        key_start, key_run = jax.random.split(key)
        kind, fn = (
            (StochasticLogDensity, log_logistic_batch) if name == "banknote" else (LogDensity, log_logistic)
        )
        algorithm = make(kind(fn, fold["X"], fold["y"]), *rate)
        state = algorithm.init(*logistic_start(key_start, fold["X"].shape[1]))

        def judge(state):
            logs = jax.vmap(lambda beta: log_bernoulli(fold["X_test"], fold["y_test"], beta))(
                state.positions["beta"]
            )
            together = jax.scipy.special.logsumexp(logs, axis=0) - jnp.log(PARTICLES)
            return {
                "lppd as published": jnp.mean(logs),
                "log predictive": jnp.mean(together),
                "error": jnp.mean((together < jnp.log(0.5)).astype(float)),
            }

        return follow(algorithm, state, key_run, judge, (steps,))

    runs = timed(method, one, (keys, data))
    return {score: values[..., 0] for score, values in runs.items()}


def interval(values: np.ndarray) -> list[float]:
    """Return the mean and its bootstrap interval."""
    chosen = np.random.default_rng(0).integers(0, len(values), (4000, len(values)))
    return [float(np.mean(values)), *map(float, np.quantile(values[chosen].mean(1), [0.025, 0.975]))]


def records_of(problem: str, score: str, scores: dict[str, np.ndarray], sign: int) -> list[dict]:
    """Return records of one score for all methods on one problem; ``sign`` -1: larger is better."""
    rates = np.where(np.isfinite(scores["Adam"]), scores["Adam"], -sign * -np.inf).mean(axis=1)
    rates = np.where(np.isfinite(rates), rates, sign * np.inf)
    best = int(np.argmin(sign * rates))
    base = scores["Adam"][best]
    records = []
    for method, values in scores.items():
        values = base if method == "Adam" else values
        label = f"Adam, rate {RATES[best]:.2g} in hindsight" if method == "Adam" else method
        record = {"problem": problem, "score": score, "way": label, "mean": interval(values)}
        records.append(record | {"less Adam": interval(values - base), "all": values, "sign": sign})
    return records


def ours_again(before: list[dict], seeds: int, marks: tuple[int, ...], steps: int) -> list[dict]:
    """Return the stored records, with those of ``coin.em`` measured again with the same seeds."""
    fresh: dict[tuple[str, str, str], np.ndarray] = {}
    for method in ("coin.em, joint", "coin.em, marginal"):
        for c in (1e-3, 1.0, 1e3):
            errors = toy(method, ways(jnp.mean)[method], c, seeds, marks)["error"]
            for number, mark in enumerate(marks):
                fresh[f"hierarchical, c = {c:g}", f"error at {mark}", method] = errors[..., number]
        for name in ("Wisconsin", "banknote"):
            runs = logistic(method, ways(best_gamma)[method], name, seeds, steps)
            fresh |= {(name, score, method): values for score, values in runs.items()}
    base = {(r["problem"], r["score"]): np.array(r["all"]) for r in before if r["way"].startswith("Adam")}
    records = []
    for record in before:
        values = fresh.get((record["problem"], record["score"], record["way"]))
        if values is not None:
            less = values - base[record["problem"], record["score"]]
            record = record | {"mean": interval(values), "less Adam": interval(less), "all": values}
        records.append(record)
    return records


def measure(seeds: int, marks: tuple[int, ...], steps: int, report: Any) -> list[dict]:
    """Measure all methods on all problems."""
    records = []
    for c in (1e-3, 1.0, 1e3):
        scores = {
            method: toy(method, make, c, seeds, marks)["error"] for method, make in ways(jnp.mean).items()
        }
        for number, mark in enumerate(marks):
            at_mark = {method: values[..., number] for method, values in scores.items()}
            records += records_of(f"hierarchical, c = {c:g}", f"error at {mark}", at_mark, 1)
        report(records)
    for name in ("Wisconsin", "banknote"):
        scores = {
            method: logistic(method, make, name, seeds, steps) for method, make in ways(best_gamma).items()
        }
        for score in ("lppd as published", "log predictive", "error"):
            at_mark = {method: values[score] for method, values in scores.items()}
            records += records_of(name, score, at_mark, 1 if score == "error" else -1)
        report(records)
    return records


def shown(triple: list[float]) -> str:
    return f"{triple[0]:.4g} ({triple[1]:.4g}, {triple[2]:.4g})"


def contradictions(records: list[dict]) -> list[str]:
    """List the cases in which ``coin.em`` is significantly worse than Adam with the best rate in hindsight."""
    sentences = []
    for r in records:
        low, high = sorted(r["sign"] * np.array(r["less Adam"][1:]))
        if r["way"].startswith("coin.em") and low > 0:
            sentences.append(
                f"{r['problem']}, {r['score']}, {r['way']}: {r['mean'][0]:.4g}, Adam better by {low:.2g} to {high:.2g}"
            )
    return sentences


def plot(records: list[dict]) -> None:
    """Plot the errors of the hierarchical model against the number of steps, and the log predictive densities."""
    figure, axes = common.figure(width=11, height=3.4, columns=4)
    problems = list(dict.fromkeys(r["problem"] for r in records))
    for axis, problem in zip(axes[:3], problems[:3], strict=True):
        labels = list(dict.fromkeys(r["way"].split(", rate")[0] for r in records if r["problem"] == problem))
        for label in labels:
            rows = [r for r in records if r["problem"] == problem and r["way"].split(", rate")[0] == label]
            steps = [int(r["score"].split()[-1]) for r in rows]
            axis.plot(steps, [r["mean"][0] for r in rows], marker="o", ms=3, label=label)
        axis.set(xscale="log", yscale="log", title=problem, xlabel="steps", ylabel="error of theta / c")
    axes[0].legend(frameon=False, fontsize=6)
    for number, problem in enumerate(problems[3:]):
        rows = [r for r in records if r["problem"] == problem and r["score"] == "log predictive"]
        for line, r in enumerate(rows):
            middle, low, high = r["mean"]
            axes[3].errorbar(
                number + 0.12 * line,
                middle,
                [[middle - low], [high - middle]],
                fmt="o",
                ms=3,
                color=f"C{line}",
            )
    axes[3].set_xticks(range(len(problems[3:])), problems[3:])
    axes[3].set(title="test log predictive density")
    common.save_figure(figure, NAME)


def main() -> None:
    """Run the benchmark, print the tables, and write the results."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--ours", action="store_true", help="measure coin.em anew, keep what is stored of the others"
    )
    arguments = parser.parse_args()
    small = arguments.small
    seeds, marks, steps = (2, (10, 20), 20) if small else (SEEDS, MARKS, STEPS)
    start = time.process_time()

    def keep(records):
        if not small:
            body = {"records": records, "published": PUBLISHED, "against": contradictions(records)}
            common.write_results(NAME, body | {"CPU seconds": time.process_time() - start})

    if arguments.ours and not small:
        records = ours_again(common.read_results(NAME)["records"], seeds, marks, steps)
        keep(records)
    else:
        records = measure(seeds, marks, steps, keep)
    rows = [[r["problem"], r["score"], r["way"], shown(r["mean"]), shown(r["less Adam"])] for r in records]
    common.print_table("coin EM", ["problem", "score", "", "mean", "less Adam"], rows)
    print("Published lppd:", PUBLISHED)
    print("Against this library:", *(contradictions(records) or ["nothing"]), sep="\n  ")
    if not small:
        plot(records)


if __name__ == "__main__":
    main()
