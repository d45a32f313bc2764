"""Do particles without a learning rate match Adam at its best rate if gradients come from minibatches?

Question: test log likelihood and root mean squared error after 100 and 500 steps of Stein variational gradient
descent on batches of 10, 50 and 200 rows.

Models (``coin_minibatch_models.py``): logistic regression (breast cancer, 100 particles), and Bayesian neural networks
with 50 rectified units and unknown precisions of weights and noise (concrete, yacht, wine; 20 particles). Ten random
splits, nine tenths to train on; all scaling is learned on these. Scores in units of y; for the logistic regression the
error is that of the mean probability.

Methods:
    default         this library with its defaults
    fuse            its geometry, distance over gradients from the first step
    published       Sharrock and Nemeth (2023): raw coordinates, h = median / log(N + 1), coin of unit 1/2
    published, 100  the same with alpha = 100, their setting for networks
    Adam            raw coordinates, h as in the default; seven rates from 1e-4 to 10, evenly on a log scale

Hindsight: all rates of Adam run on three splits; those that are best at any number of steps in either score run on all
ten, and the best mean on the *test* rows is shown, its own at each number of steps and for each score: which is
impossible in practice. Differences are paired by split, with Student-t intervals of 95 %. Float32.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from coin_accuracy import adam
from coin_energy import paired
from coin_minibatch_models import MODELS

from probinfer import betting, coin

NAME = "coin_minibatch"
SPLITS, SCOUTS = 10, 3
BATCHES = (10, 50, 200)
STEPS = (100, 500)
RATES = np.geomspace(1e-4, 10, 7)
METHODS = ("default", "fuse", "published", "published, 100", "Adam")
SCORES = ("log likelihood", "RMSE")


def algorithm(method: str, fn: Any, rate: Any) -> Any:
    """Return the rule of this name; the rate is that of Adam."""
    raw = coin.Identity()
    match method:
        case "default":
            return coin.svgd(fn)
        case "fuse":
            return coin.svgd(fn, bet=betting.fuse(unit=0.1, particles=True))
        case "published":
            return coin.svgd(fn, geometry=raw, bet=betting.coin(unit=0.5), bandwidth="published")
        case "published, 100":
            bet = betting.coin(alpha=100.0, unit=0.5)
            return coin.svgd(fn, geometry=raw, bet=bet, bandwidth="published")
        case "Adam":
            return coin.svgd(fn, geometry=raw, bet=adam(rate))
    raise ValueError(method)


def lane(method: str, width: int, fn: Any, key: Any, rate: Any, start: Any) -> Any:
    """Run ten blocks of ``width`` steps; return the positions after two blocks and at the end."""
    rule = algorithm(method, fn, rate)

    def step(state, key):
        return rule.step(key, state)[0], None

    def block(state, key):
        state = jax.lax.scan(step, state, jax.random.split(key, width))[0]
        return state, state.positions

    errors = jax.lax.scan(block, rule.init(start), jax.random.split(key, 10))[1]
    return jax.tree.map(lambda leaf: leaf[jnp.array([1, 9])], errors)


@partial(jax.jit, static_argnums=(0, 1))
def lanes(method: str, width: int, fns: Any, keys: Any, rates: Any, starts: Any) -> Any:
    """Make the runs sequentially."""
    return jax.lax.map(lambda args: lane(method, width, *args), (fns, keys, rates, starts))


class Bench:
    """One model with one batch size: the targets and initial particles of all splits."""

    def __init__(self, name: str, batch: int, small: bool):
        make, num = MODELS[name]
        self.problems = [make(seed) for seed in range(SPLITS)]
        stack = partial(jax.tree.map, lambda *x: jnp.stack(x))
        self.fns = stack(*[p.target_fn(batch).logdensity_fn for p in self.problems])
        self.keys = jax.random.split(jax.random.key(batch), SPLITS)
        self.starts = stack(*[p.start(jax.random.key(i), num) for i, p in enumerate(self.problems)])
        self.width = 10 if small else STEPS[-1] // 10

    def scores(self, method: str, splits: np.ndarray, rates: np.ndarray) -> np.ndarray:
        """Scores (lane, step count, score), as many lanes at a time as there are splits."""
        values = []
        for first in range(0, len(splits), SPLITS):
            part = slice(first, first + SPLITS)
            chosen = np.resize(splits[part], SPLITS)  # one program for every number of lanes
            speeds = jnp.asarray(np.resize(rates[part], SPLITS), jnp.result_type(float))
            select = partial(jax.tree.map, lambda leaf, chosen=chosen: leaf[chosen])
            runs = lanes(method, self.width, select(self.fns), self.keys[chosen], speeds, select(self.starts))
            for k, number in enumerate(splits[part]):
                clouds = [jax.tree.map(lambda leaf, k=k, i=i: leaf[k, i], runs) for i in range(len(STEPS))]
                values.append([[float(v) for v in self.problems[number].scores(cloud)] for cloud in clouds])
        return np.array(values)

    def single(self, method: str) -> np.ndarray:
        """Return the scores of all splits."""
        return self.scores(method, np.arange(SPLITS), np.ones(SPLITS))

    def hindsight(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores of Adam's best rates (split, step count, score), and the rates."""
        first = self.scores("Adam", np.repeat(np.arange(SCOUTS), len(RATES)), np.tile(RATES, SCOUTS))
        first = first.reshape(SCOUTS, len(RATES), len(STEPS), 2)
        best = np.unique(np.argmin(losses(first.mean(axis=0)), axis=0))
        rest = np.arange(SCOUTS, SPLITS)
        more = self.scores("Adam", np.repeat(rest, len(best)), np.tile(RATES[best], len(rest)))
        more = more.reshape(len(rest), len(best), len(STEPS), 2)
        runs = np.concatenate([first[:, best], more])  # (split, rate, step count, score)
        chosen = np.argmin(losses(runs.mean(axis=0)), axis=0)
        return np.take_along_axis(runs, chosen[None, None], axis=1)[:, 0], RATES[best[chosen]]


def losses(scores: np.ndarray) -> np.ndarray:
    """Return the score with smaller values as better ones, and infinity if it is not finite."""
    signed = scores * np.array([-1.0, 1.0])
    return np.where(np.isfinite(signed), signed, np.inf)


def one_case(
    name: str, batch: int, methods: list[str], old: dict[str, Any], *, small: bool
) -> dict[str, Any]:
    """Measure these methods; earlier results of other methods are kept."""
    bench = Bench(name, batch, small)
    record = {"model": name, "batch": batch, "best rates": old.get("best rates")}
    for part in ("scores", "seconds"):
        record[part] = {m: v for m, v in old.get(part, {}).items() if m in METHODS}
    for method in methods:
        start = time.process_time()
        if method == "Adam":
            record["scores"][method], record["best rates"] = bench.hindsight()
        else:
            record["scores"][method] = bench.single(method)
        record["seconds"][method] = round(time.process_time() - start, 1)
    scores = {m: np.asarray(record["scores"][m]) for m in METHODS}
    record["means"] = {m: s.mean(axis=0) for m, s in scores.items()}
    record["against Adam"] = {m: paired(s - scores["Adam"]) for m, s in scores.items() if m != "Adam"}
    print(f"{name}, batch {batch}: {sum(record['seconds'].values()):.0f} s", flush=True)
    return record


def show(records: list[dict[str, Any]]) -> None:
    """Print a table of each score after the last step, and the cases in which Adam is better."""
    for k, score in enumerate(SCORES):
        lines = []
        for r in records:
            low, high = (np.asarray(end)[-1, k] for end in r["against Adam"]["default"])
            cells = [f"{np.asarray(r['means'][m])[-1, k]:.4g}" for m in METHODS]
            rate = f"{np.asarray(r['best rates'])[-1, k]:.2g}"
            lines.append([f"{r['model']}, {r['batch']}", *cells, rate, f"{low:+.3g} ... {high:+.3g}"])
        header = ["model, batch", *METHODS, "its rate", "default - Adam"]
        common.print_table(f"{score} on test rows after {STEPS[-1]} steps", header, lines)
    print("Adam at its best rate is better (the interval excludes zero):", *worse(records), sep="\n  ")
    cpu_seconds = sum(sum(r["seconds"].values()) for r in records)
    print(f"CPU: {cpu_seconds / 60:.1f} minutes, compilation included")


def worse(records: list[dict[str, Any]]) -> list[str]:
    """List the cases in which Adam with the best rate in hindsight is significantly better."""
    sentences = []
    for r in records:
        for k, (score, sign) in enumerate(zip(SCORES, (-1, 1), strict=True)):
            for i, count in enumerate(STEPS):
                ends = sign * np.array([np.asarray(end)[i, k] for end in r["against Adam"]["default"]])
                if ends.min() > 0:
                    sentences.append(f"{r['model']}, batch {r['batch']}, {count} steps: {score}")
    return sentences or ["nowhere"]


def plot(records: list[dict[str, Any]]) -> None:
    """Plot the paired differences to Adam after the last step."""
    figure, axes = common.figure(width=10, height=0.35 * len(records) + 1.5, columns=2)
    for k, (axis, score, sign) in enumerate(zip(axes, SCORES, (1, -1), strict=True)):
        for number, method in enumerate(("default", "fuse", "published, 100")):
            ends = np.array([[np.asarray(e)[-1, k] for e in r["against Adam"][method]] for r in records])
            unit = np.array([np.asarray(r["scores"]["Adam"])[:, -1, k].std(ddof=1) for r in records])
            ends = sign * ends / unit[:, None]
            middle = ends.mean(axis=1)
            positions = np.arange(len(records)) + 0.2 * (number - 1)
            half = np.abs(ends[:, 1] - ends[:, 0]) / 2
            axis.errorbar(middle, positions, xerr=half, fmt="o", ms=4, color=f"C{number}", label=method)
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlabel(f"{score}: better than Adam's best, in sd over splits")
        labels = [f"{r['model']}, {r['batch']}" for r in records]
        axis.set_yticks(np.arange(len(records)), labels if k == 0 else [""] * len(labels), fontsize=8)
        axis.invert_yaxis()
    axes[0].legend(frameon=False, fontsize=7)
    common.save_figure(figure, NAME)


def main() -> None:
    """Run the benchmark; print and write the results after each case."""
    parser = common.parser(__doc__)
    parser.add_argument("--only", nargs="*", help="models to measure; the results of the others are kept")
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS, help="measure these anew")
    parser.add_argument("--resume", action="store_true", help="leave out what has results")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", False)
    old = [] if arguments.small else common.read_results(NAME).get("records", [])
    known = {(r["model"], r["batch"]): r for r in old}
    cases = [(name, batch) for name in MODELS for batch in BATCHES]
    for name, batch in cases[3:4] if arguments.small and not arguments.only else cases:
        if arguments.only and name not in arguments.only:
            continue
        old_record = known.get((name, batch), {})
        again = [] if arguments.resume else arguments.methods
        methods = [m for m in METHODS if m in again or m not in old_record.get("scores", {})]
        if not methods:
            continue
        known[name, batch] = one_case(name, batch, methods, old_record, small=arguments.small)
        jax.clear_caches()
        if not arguments.small:
            records = [known[case] for case in cases if case in known]
            body = {"steps": STEPS, "rates": RATES, "records": records, "Adam is better": worse(records)}
            common.write_results(NAME, body)
    records = [known[case] for case in cases if case in known]
    show(records)
    if not arguments.small:
        plot(records)


if __name__ == "__main__":
    main()
