"""How precise is tempered SMC per evaluation of the density, compared with adaptive tempered SMC of blackjax?

Question: (1) does the 95 % interval of the log evidence hold the exact value 95 times in 100? (2) error of the log
evidence and of posterior means times the square root of what was evaluated, for this library's moves ("auto", "hmc",
"nuts", "independent") and for blackjax, in one run, float64.

Targets (``smc_tempered_targets.py``): a correlated, badly scaled normal likelihood in 2, 10 and 50 dimensions and two
separate modes in 2 and 5, with exact evidence; the three hyperparameters of a Gaussian process on forty years of the
Nile, with the evidence by the trapezoidal rule, which agrees with a coarser grid to 1e-6.

Ours: 8 islands and a pilot, which is counted, of 256 particles, half the default (GP: 128; in 50 dimensions the default
of 512 too); no-U-turn moves on one target. Blackjax: one
population of 512 particles (GP: 256), systematic resampling, HMC with trajectories of a quarter period in the metric,
target ESS 0.5 and 0.9, 3 and 10 moves a level, the dearest ways on cheap targets only; its evidence is the sum of its
log likelihood increments, its means are weighted. Two ways to tune it, and neither search is counted: "own", the
covariance of its own weighted particles as metric and the one step size of four whose acceptance is nearest to 0.8;
"pilot", metric and step size of our pilot at the nearest temperature.

Counted: evaluations of the density, with gradient or without, each as one, which is in favor of gradients. A run
of HMC in blackjax takes a gradient at its start and at each leapfrog; choosing the temperature and the weights take a
density each.

Error: root mean square over seeds; of means in posterior standard deviations, over coordinates. Score: error times the
square root of the mean evaluations, in thousands. Intervals: Wilson for coverages, percentile bootstrap over seeds for
scores, the seeds of both sides drawn together.
"""

from __future__ import annotations

import time
import warnings

import common
import jax
import numpy as np
from smc_tempered_peer import Peer
from smc_tempered_targets import TARGETS

import probinfer as pi
from probinfer import smc
from probinfer.smc.tempered import initial_distribution, populations

NAME = "smc_tempered"
SEEDS, ISLANDS = 40, 8
MOVES = ("auto", "hmc", "nuts", "independent")
PEERS = (("own", 0.5, 3), ("pilot", 0.5, 3), ("own", 0.5, 10), ("own", 0.9, 3), ("own", 0.9, 10))


def ours(case, moves: str, num: int):
    """Seed -> (log evidence, mean, gradients, densities, interval)."""
    engine = smc.Tempered(num_particles=num, num_islands=ISLANDS, moves=moves)

    def run(seed):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior = pi.infer(jax.random.key(1000 + seed), case.target, engine, progress=False)
        weights = np.exp(np.asarray(posterior.log_weights, float) - float(np.max(posterior.log_weights)))
        u = np.stack([np.asarray(leaf, float) for leaf in jax.tree.leaves(posterior.unconstrained)], axis=-1)
        u = u.reshape(*weights.shape, -1)
        mean = np.einsum("in,ind->d", weights, u) / weights.sum()
        info = posterior.info
        return (
            float(posterior.log_evidence),
            mean,
            int(info.num_gradients),
            int(info.num_densities),
            info.interval(),
        )

    return run


def measured(name: str, method: str, case, run, seeds: int) -> dict:
    """Run all seeds of one method."""
    first = time.process_time()
    run(seeds)
    first = time.process_time() - first
    start = time.process_time()
    rows = [run(seed) for seed in range(seeds)]
    cpu_seconds = (time.process_time() - start) / seeds
    intervals = [row[4] for row in rows]
    record = {
        "target": name,
        "way": method,
        "errors": [row[0] - case.log_evidence for row in rows],
        "mean errors": [float(np.sqrt(np.mean(((row[1] - case.mean) / case.sd) ** 2))) for row in rows],
        "gradients": float(np.mean([row[2] for row in rows])),
        "densities": float(np.mean([row[3] for row in rows])),
        "seconds": cpu_seconds,
        "first call": first,
        "covered": None
        if intervals[0] is None
        else int(sum(low <= case.log_evidence <= high for low, high in intervals)),
    }
    error = np.sqrt(np.mean(np.square(record["errors"])))
    print(
        f"{name}, {method}: error {error:.4f}, {record['gradients'] + record['densities']:.0f}, {cpu_seconds:.2f} s",
        flush=True,
    )
    return record


def wilson(count: int, num: int) -> tuple[float, float]:
    """A 95 % interval of a share."""
    z, share = 1.96, count / num
    middle = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * np.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def score(record: dict, key: str, chosen: np.ndarray) -> np.ndarray:
    """Return the error times the root of the number of evaluations, for resampled seeds."""
    squares = np.square(record[key])[chosen]
    return np.sqrt(squares.mean(axis=-1) * (record["gradients"] + record["densities"]) / 1000)


def compared(records: list[dict]) -> None:
    """Add scores, and their ratios to those of "auto" on the same target, with intervals."""
    for record in records:
        num = len(record["errors"])
        chosen = np.random.default_rng(0).integers(0, num, (2000, num))
        base = next(r for r in records if r["target"] == record["target"] and r["way"] == "auto")
        for key, quantity in (("errors", "evidence"), ("mean errors", "means")):
            every = np.arange(num)[None]
            ratios = score(record, key, chosen) / score(base, key, chosen)
            record[f"score, {quantity}"] = float(score(record, key, every)[0])
            record[f"ratio, {quantity}"] = float(score(record, key, every)[0] / score(base, key, every)[0])
            record[f"its interval, {quantity}"] = [float(q) for q in np.quantile(ratios, [0.025, 0.975])]


def rows_of(records: list[dict]) -> list[list[str]]:
    """Print the table."""
    rows = []
    for r in records:
        num = len(r["errors"])
        covered = ""
        if r["covered"] is not None:
            low, high = wilson(r["covered"], num)
            covered = f"{r['covered'] / num:.0%} ({low:.0%}-{high:.0%})"
        cells = [
            f"{r[f'ratio, {quantity}']:.2f} ({{:.2f}}-{{:.2f}})".format(*r[f"its interval, {quantity}"])
            for quantity in ("evidence", "means")
        ]
        rows.append(
            [
                r["target"],
                r["way"],
                covered,
                f"{np.sqrt(np.mean(np.square(r['errors']))):.3f}",
                f"{np.sqrt(np.mean(np.square(r['mean errors']))):.3f}",
                f"{r['gradients'] / 1000:.0f}",
                f"{r['densities'] / 1000:.0f}",
                *cells,
                f"{r['seconds']:.2f}",
            ]
        )
    return rows


def contradictions(records: list[dict]) -> list[str]:
    """List the results in which this library is worse."""
    sentences = []
    for r in records:
        num = len(r["errors"])
        if r["covered"] is not None and wilson(r["covered"], num)[1] < 0.95:
            sentences.append(
                f"{r['target']}, {r['way']}: the interval covers {r['covered']} of {num}, too few"
            )
        for quantity in ("evidence", "means"):
            if r["way"] != "auto" and r[f"its interval, {quantity}"][1] < 1:
                sentences.append(
                    f"{r['target']}, {r['way']}: {quantity} for fewer evaluations than auto "
                    f"({r[f'ratio, {quantity}']:.2f} of the score)"
                )
    return sentences


def plot(records: list[dict]) -> None:
    """Plot the ratios of the scores to those of auto."""
    figure, axes = common.figure(width=10, height=5.5, columns=2)
    names = list(dict.fromkeys(r["target"] for r in records))
    methods = [method for method in dict.fromkeys(r["way"] for r in records) if method != "auto"]
    for axis, quantity in zip(axes, ("evidence", "means")):
        axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
        for number, method in enumerate(methods):
            rows = [r for r in records if r["way"] == method]
            positions = [names.index(r["target"]) + 0.065 * (number - (len(methods) - 1) / 2) for r in rows]
            middle = np.array([r[f"ratio, {quantity}"] for r in rows])
            ends = np.array([r[f"its interval, {quantity}"] for r in rows]).T
            style = "o" if not method.startswith("blackjax") else "s"
            axis.errorbar(
                positions,
                middle,
                np.abs(ends - middle),
                fmt=style,
                markersize=3.5,
                elinewidth=0.8,
                color=f"C{number % 10}",
                label=method,
            )
        axis.set(yscale="log", ylabel=f"{quantity}: error x root of evaluations, over that of auto")
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes[0].legend(frameon=False, fontsize=7)
    common.save_figure(figure, NAME)


def one_target(name: str, case, seeds: int, *, small: bool) -> tuple[list[dict], dict]:
    """Run all methods on a target, and record its exact values."""
    num = 64 if small else case.num_particles
    moves = [kind for kind in MOVES if kind not in case.without]
    records = [measured(name, kind, case, ours(case, kind, num), seeds) for kind in moves]
    if case.mean.size >= 50:  # does the interval hold where the particles are not few?
        records.append(measured(name, f"auto, {2 * num} particles", case, ours(case, "auto", 2 * num), seeds))
    initial = initial_distribution.find_initial_distribution(jax.random.key(1), case.target, False, None)
    engine = smc.Tempered(num_particles=num, moves="hmc")
    pilot = populations.learn_schedule(engine, initial, jax.random.key(2), False)
    run = Peer(initial.bridge, pilot.schedule, 2 * num)
    for tuning, ess, steps in PEERS[: case.num_peers]:
        method = f"blackjax {tuning}, ESS {ess}, {steps} moves"
        records.append(measured(name, method, case, run.way(tuning, ess, steps), seeds))
    return records, {"log evidence": case.log_evidence, "blackjax's own step size": run.step_size}


def main() -> None:
    """Run the benchmark, print the tables, and write the results."""
    parser = common.parser(__doc__)
    parser.add_argument("--only", nargs="*", help="measure these targets, keep the results of the others")
    arguments = parser.parse_args()
    seeds = 3 if arguments.small else SEEDS
    chosen = arguments.only or list(TARGETS)
    before = common.read_results(NAME) if arguments.only and not arguments.small else {}
    records = [record for record in before.get("records", []) if record["target"] not in chosen]
    facts = before.get("targets", {})
    for name in chosen:
        new, facts[name] = one_target(name, TARGETS[name](), seeds, small=arguments.small)
        records += new
        compared(records)
        if not arguments.small:
            body = {"records": records, "targets": facts, "against": contradictions(records)}
            common.write_results(NAME, body)
    header = [
        "target",
        "",
        "interval covers",
        "error, evidence",
        "error, means",
        "gradients, 1000",
        "densities, 1000",
    ]
    header += ["score / auto, evidence", "score / auto, means", "CPU s"]
    common.print_table("tempered SMC", header, rows_of(records))
    against = contradictions(records)
    print("Against this library:", *(against or ["nothing"]), sep="\n  ")
    if not arguments.small:
        plot(records)


if __name__ == "__main__":
    main()
