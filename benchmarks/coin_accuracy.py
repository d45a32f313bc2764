"""Which particles come closest to a density: without a learning rate, or with the best of eleven rates in hindsight?

Question: the energy distance between 100 particles and the target after 100, 300 and 1000 steps of Stein variational
gradient descent, with the rules of this library, the published ones, and Adam at the rate that proved best.

Targets (``coin_targets.py``): the six two-dimensional densities of Sharrock and Nemeth (2023) (the funnel with a log
variance of standard deviation 1.5), an uneven mixture, a banana, five Student-t of scales 0.1 ... 10, AR(0.8) in 50
dimensions, a rotated normal density of condition number 1e4, two logistic regressions, and the eleven posteriors of
posteriordb. Start: N(0, I); posteriordb: where every engine of this library starts. "Chosen": constants of the rules
were once chosen on this target or one like it. The others are held out.

Methods, all with the kernel exp(-r^2/h):
    default         this library with its defaults
    fuse            its geometry, distance over gradients from the first step
    coin            its geometry, an elementwise coin throughout
    published       Sharrock and Nemeth (2023): raw coordinates, the coin of unit 1/2, h = median / log(N + 1)
    published, med  the same with h = median
    raw fuse        Sharrock and Nemeth (2025): raw coordinates, distance over gradients, h = median
    Adam            raw coordinates, h = median with the annealing of the default
    Adam, plain     raw coordinates, h = median throughout
The medians are those of the same function, on the same pairs.

Hindsight: Adam has eleven rates, 1e-4 ... 10. All run with three seeds; those that are among the two best of their form
at any number of steps in either measure run with all ten, and of these the best mean is shown, at each number of
steps and in each measure its own. All methods start from the same clouds.

Measure: energy distance to up to 5000 reference draws, raw, and in coordinates in which the reference has covariance
I ("white"): the first sees the wide directions only. Particles: every pair, so that 100 independent draws have the mean
"i.i.d." of the table, not zero; below it particles are better spread than independent draws. Intervals: Student-t over
the seeds, of differences with the seeds paired.

Criterion: the upper 95 % end of the difference to Adam, the better of its two forms, is at most a tenth of Adam's
distance and the floor of independent draws.

Memory: one run at a time, O(N d). Float32.
"""

from __future__ import annotations

import math
import time
import zlib
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from coin_accuracy_report import compared, plot, show
from coin_energy import Reference, short
from coin_targets import TARGETS, rows

from probinfer import betting, coin
from probinfer.coin.cloud.bandwidth import scaled_kernel, squared_bandwidth
from probinfer.coin.cloud_descent import descent
from probinfer.coin.stein_descent import svgd_direction
from probinfer.kernels import RBF

NAME = "coin_accuracy"
SEEDS, SCOUTS, PARTICLES = 10, 3, 100
STEPS = (100, 300, 1000)
RATES = np.geomspace(1e-4, 10, 11)
OURS = ("default", "fuse", "coin")
RAW = ("published", "published, med", "raw fuse")
ADAMS = ("Adam", "Adam, plain")
METHODS = (*OURS, *RAW, *ADAMS)


def adam(rate: Any) -> optax.GradientTransformation:
    """Adam with a learning rate that may be a traced array."""
    core = optax.scale_by_adam()

    def update(gradients, state, params=None):
        moves, state = core.update(gradients, state, params)
        return -rate * moves, state

    return optax.GradientTransformation(core.init, update)


def plain_direction(kernel: Any, z: Any, scores: Any, keep: Any, score_fn: Any) -> Any:
    """Stein's direction under a kernel with the median heuristic, without annealing."""
    square = squared_bandwidth("median", z, keep, jnp.int32(10**6))
    return svgd_direction(scaled_kernel(kernel, square), z, scores, keep, score_fn)


def plain(fn: Any, bet: Any) -> Any:
    """SVGD in raw coordinates, with the median heuristic at every step."""
    kernel = RBF(lengthscale=math.sqrt(0.5))
    return descent(fn, plain_direction, kernel, coin.Identity(), bet, bandwidth="fixed")


def algorithm(method: str, fn: Any, rate: Any) -> Any:
    """Return the rule of this name; the rate is that of Adam."""
    raw = coin.Identity()
    match method:
        case "default":
            return coin.svgd(fn)
        case "fuse":
            return coin.svgd(fn, bet=betting.fuse(unit=0.1, particles=True))
        case "coin":
            return coin.svgd(fn, bet=betting.coin(unit=0.1))
        case "published":
            return coin.svgd(fn, geometry=raw, bet=betting.coin(unit=0.5), bandwidth="published")
        case "published, med":
            return plain(fn, betting.coin(unit=0.5))
        case "raw fuse":
            return plain(fn, betting.fuse(unit=1e-6, particles=True))
        case "Adam":
            return coin.svgd(fn, geometry=raw, bet=adam(rate))
        case "Adam, plain":
            return plain(fn, adam(rate))
    raise ValueError(method)


def lane(method: str, blocks: int, width: int, fn: Any, key: Any, rate: Any, start: Any) -> Any:
    """Run once; return the positions after each of ``blocks`` blocks of ``width`` steps."""
    rule = algorithm(method, fn, rate)

    def step(state, key):
        return rule.step(key, state)[0], None

    def block(state, key):
        state = jax.lax.scan(step, state, jax.random.split(key, width))[0]
        return state, state.positions

    return jax.lax.scan(block, rule.init(start), jax.random.split(key, blocks))[1]


@partial(jax.jit, static_argnums=(0, 1, 2))
def lanes(method: str, blocks: int, width: int, fn: Any, keys: Any, rates: Any, starts: Any) -> Any:
    """Make the runs sequentially in one program."""
    return jax.lax.map(lambda args: lane(method, blocks, width, fn, *args), (keys, rates, starts))


class Bench:
    """One target: the initial particles of all seeds, and the distances of runs."""

    def __init__(self, name: str, case: Any, small: bool):
        keys = jax.random.split(jax.random.key(zlib.crc32(name.encode())), SEEDS)
        self.case, self.reference = case, Reference(case.draws)
        self.starts = jax.tree.map(lambda *x: jnp.stack(x), *[case.start(k, PARTICLES) for k in keys])
        self.keys = jax.random.split(jax.random.key(1), SEEDS)
        self.blocks, self.width = 10, 10 if small else 100

    def distances(self, method: str, seeds: Any, rates: Any) -> np.ndarray:
        """Energy distances (lane, step count, raw | white) of runs with these seeds and rates, eleven at a time."""
        recorded = []
        for first in range(0, len(seeds), len(RATES)):
            part = slice(first, first + len(RATES))
            chosen = np.resize(seeds[part], len(RATES))  # one program for every number of lanes
            num_kept = len(seeds[part])
            speeds = jnp.asarray(np.resize(rates[part], len(RATES)), jnp.result_type(float))
            starts = jax.tree.map(lambda x, indices=chosen: x[indices], self.starts)
            arguments = (self.case.logdensity_fn, self.keys[chosen], speeds, starts)
            runs = rows(lanes(method, self.blocks, self.width, *arguments), 3)[:num_kept]
            blocks_of_steps = [count * self.blocks // STEPS[-1] - 1 for count in STEPS]
            recorded += [[self.reference.distances(run[i]) for i in blocks_of_steps] for run in runs]
        return np.array(recorded)

    def single(self, method: str) -> np.ndarray:
        """Return the distances of all seeds."""
        return self.distances(method, np.arange(SEEDS), np.ones(SEEDS))

    def grid(self, method: str) -> dict[str, Any]:
        """Adam: all rates with a few seeds, the best ones with all seeds."""
        every, seeds = np.arange(len(RATES)), np.arange(SCOUTS)
        scouts = self.distances(method, np.repeat(seeds, len(RATES)), np.tile(RATES, SCOUTS))
        scouts = scouts.reshape(SCOUTS, len(RATES), *scouts.shape[1:])
        means = np.nan_to_num(scouts.mean(axis=0), nan=np.inf, posinf=np.inf)
        best = np.unique(np.argsort(means, axis=0)[:2])
        rest = np.arange(SCOUTS, SEEDS)
        more = self.distances(method, np.repeat(rest, len(best)), np.tile(RATES[best], len(rest)))
        full = {int(k): scouts[:, k] for k in every}
        more = more.reshape(len(rest), len(best), *more.shape[1:])
        for column, k in enumerate(best):
            full[int(k)] = np.concatenate([scouts[:, k], more[:, column]])
        return {"means": means, "full": {k: full[k] for k in map(int, best)}}


def hindsight(grid: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances of the best rate, (seed, step count, measure), and this rate."""
    numbers = list(grid["full"])
    runs = np.stack([grid["full"][k] for k in numbers])  # (rate, seed, step count, measure)
    best = np.argmin(np.nan_to_num(runs.mean(axis=1), nan=np.inf), axis=0)
    chosen = np.take_along_axis(runs, best[None, None], axis=0)[0]
    return chosen, RATES[np.array(numbers)[best]]


def one_target(name: str, methods: list[str], before: dict[str, Any], *, small: bool) -> dict[str, Any]:
    """Measure these methods on a target; earlier results of other methods are kept."""
    make, chosen = TARGETS[name]
    bench = Bench(name, make(), small)
    record = {"target": name, "chosen": chosen, "dimension": bench.case.draws.shape[1]}
    record["floor"] = bench.reference.floor(PARTICLES)
    for part in ("distances", "seconds", "best rates", "grid"):
        record[part] = dict(before.get(part, {}))
    for method in methods:
        start = time.process_time()
        if method in ADAMS:
            grid = bench.grid(method)
            record["distances"][method], record["best rates"][method] = hindsight(grid)
            record["grid"][method] = short(grid["means"])
        else:
            record["distances"][method] = bench.single(method)
        record["distances"][method] = short(record["distances"][method])
        record["seconds"][method] = round(time.process_time() - start, 1)
        print(f"{name}, {method}: {record['seconds'][method]:.0f} s", flush=True)
    return compared(record, ADAMS, OURS)


def main() -> None:
    """Run the benchmark; print and write the results after each target."""
    parser = common.parser(__doc__)
    parser.add_argument("--only", nargs="*", help="measure these targets, keep the results of the others")
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS, help="measure these anew")
    parser.add_argument("--resume", action="store_true", help="leave out targets that have results")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", False)
    before = {} if arguments.small else {r["target"]: r for r in common.read_results(NAME).get("records", [])}
    names = [n for n in TARGETS if not arguments.only or any(n.startswith(part) for part in arguments.only)]
    for name in names:
        old = before.get(name, {})
        missing = [m for m in METHODS if m not in old.get("distances", {})]
        again = [] if arguments.resume else arguments.methods
        methods = [m for m in METHODS if m in missing or m in again]
        if methods:
            before[name] = one_target(name, methods, old, small=arguments.small)
            jax.clear_caches()
        if methods and not arguments.small:
            records = [before[n] for n in TARGETS if n in before]
            common.write_results(NAME, {"steps": STEPS, "rates": RATES, "seeds": SEEDS, "records": records})
    records = [before[n] for n in TARGETS if n in before]
    show(records, STEPS)
    if not arguments.small:
        plot(records, NAME)


if __name__ == "__main__":
    main()
