"""How much does a cloud of 100 particles shrink as the dimension grows, and is the user warned?

Standard normals in 10 to 200 dimensions, 100 particles started at N(1, 0.3²), 10 seeds, up to 3000 steps: the ratio of
the standard deviation of the particles to the right one, mean over coordinates and seeds with a 95 % interval
(Student's t over seeds). Beside it the mean-field formula (1 + (e - 2) d/N)^(-1/2), the share of seeds in which the
verdict of ``coin.SVGD`` warns, the published bandwidth, and as many particles as ``coin.particles_for`` asks for.
Required: the warning appears wherever the ratio is below 0.85.
"""

from __future__ import annotations

import time
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from probinfer import betting, coin
from probinfer.coin.engine.diagnostics import describe_misfit

NAME = "coin_collapse"
SEEDS, PARTICLES = 10, 100
DIMS = (10, 20, 30, 50, 75, 100, 150, 200)
STEPS = (100, 300, 1000, 3000)


def log_standard(x):
    """Return the log density up to a constant."""
    return -0.5 * jnp.sum(x**2)


def built(method: str):
    """The algorithm."""
    if method != "published coin":
        return coin.svgd(log_standard)
    return coin.svgd(
        log_standard, geometry=coin.Identity(), bet=betting.coin(unit=0.5), bandwidth="published"
    )


@partial(jax.jit, static_argnames=("method", "steps"))
def measure(method: str, steps: tuple[int, ...], starts):
    """By seed: mean ratio (seed, T) and virials (seed, T, d)."""
    algorithm = built(method)

    def one(start):
        state, recorded, before = algorithm.init(start), [], 0
        for until in steps:
            state = jax.lax.fori_loop(
                before, until, lambda _, state: algorithm.step(jax.random.key(0), state)[0], state
            )
            x = state.positions
            # the score of a standard normal is -x
            recorded.append((jnp.mean(jnp.std(x, axis=0)), -jnp.var(x, axis=0)))
            before = until
        return tuple(jnp.stack(parts) for parts in zip(*recorded))

    return jax.lax.map(one, starts)


def row(method: str, dims: int, size: int, steps: tuple[int, ...], seeds: int) -> dict:
    """Measure all seeds of one dimension."""
    noise = np.random.default_rng(dims).normal(size=(seeds, size, dims))
    ratios, virials = (np.asarray(a, float) for a in measure(method, steps, jnp.asarray(1 + 0.3 * noise)))
    warned = np.array([[bool(describe_misfit(virial, size)) for virial in seed] for seed in virials])
    half = stats.t.ppf(0.975, seeds - 1) * ratios.std(axis=0, ddof=1) / seeds**0.5
    print(f"{method}, d = {dims}, N = {size}:", np.round(ratios.mean(axis=0), 3), flush=True)
    return {
        "method": method,
        "d": dims,
        "N": size,
        "steps": steps,
        "ratio": ratios.mean(axis=0).tolist(),
        "half interval": half.tolist(),
        "formula": coin.predicted_sd(size, dims),
        "warned": warned.mean(axis=0).tolist(),
        "missed": int(np.sum(~warned & (ratios < 0.85))),
    }


def rows_of(records: list[dict]) -> list[list[str]]:
    """Print the table."""
    rows = []
    for r in records:
        values = zip(r["steps"], r["ratio"], r["half interval"], r["warned"])
        known = {t: f"{ratio:.3f} ± {half:.3f} ({share:.0%})" for t, ratio, half, share in values}
        cells = [known.get(t, "") for t in STEPS]
        rows.append(
            [f"{r['method']}, d = {r['d']}", str(r["N"]), f"{r['formula']:.3f}", *cells, str(r["missed"])]
        )
    return rows


def plot(records: list[dict]) -> None:
    """Plot the ratios against the dimension."""
    figure, axes = common.figure(width=6.5, height=4.2)
    chosen = [r for r in records if r["method"] == "default"]
    dims = [r["d"] for r in chosen]
    for t, until in enumerate(STEPS):
        values, half = ([r[key][t] for r in chosen] for key in ("ratio", "half interval"))
        axes.errorbar(dims, values, half, marker="o", markersize=3, label=f"default, T = {until}")
    axes.plot(dims, [r["formula"] for r in chosen], "k--", linewidth=0.9, label="mean-field formula")
    other = [r for r in records if r["method"] == "published coin"]
    axes.plot(
        [r["d"] for r in other],
        [r["ratio"][-1] for r in other],
        "s-",
        color="0.6",
        label="published bandwidth",
    )
    more = [r for r in records if r["method"] == "N by dimension"]
    axes.plot(
        [r["d"] for r in more], [r["ratio"][-1] for r in more], "^", color="C4", label="coin.particles_for(d)"
    )
    axes.axhline(0.85, color="C3", linewidth=0.8, linestyle=":")
    axes.set(xlabel="dimension", ylabel="standard deviation over the right one", ylim=(0, 1.1))
    axes.legend(frameon=False, fontsize=7, ncols=2)
    common.save_figure(figure, NAME)


def main() -> None:
    """Run the benchmark, print the tables, and write the results."""
    arguments = common.parser(__doc__).parse_args()
    seeds, dims, steps = (2, DIMS[:1], STEPS[:1]) if arguments.small else (SEEDS, DIMS, STEPS)
    start = time.process_time()
    records = [row("default", d, PARTICLES, steps, seeds) for d in dims]
    records += [row("published coin", d, PARTICLES, steps[-2:-1] or steps, min(seeds, 3)) for d in dims]
    records += [
        row("N by dimension", d, coin.particles_for(d), steps[1:2] or steps, 3) for d in dims if d <= 100
    ]
    cpu_seconds = time.process_time() - start
    header = ["", "N", "formula", *[f"T = {t} (warned)" for t in STEPS], "below 0.85, not warned"]
    common.print_table("width kept by a cloud", header, rows_of(records))
    missed = sum(r["missed"] for r in records)
    print(f"Below 0.85 and not warned: {missed}. {cpu_seconds:.0f} CPU seconds")
    if not arguments.small:
        common.write_results(NAME, {"records": records, "missed": missed, "CPU seconds": cpu_seconds})
        plot(records)


if __name__ == "__main__":
    main()
