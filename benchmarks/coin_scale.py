"""Does coin sampling reach targets of any scale, from any start, with no setting changed?

Normal targets in 2 dimensions of standard deviation c, from N(0, I), from the right scale, and from a start a thousand
standard deviations away; and in 3 dimensions with three scales, along the axes and rotated (log density written as
-|Q'x / s|²/2 and judged in the eigenbasis). 100 particles, in float64 and float32.

For every case and 10 seeds: the smallest and largest ratio of the standard deviation of a coordinate to the right one,
and the largest error of a mean in right standard deviations, after 100, 300 and 1000 steps; for right starts the
extremes over all steps. Required: at T = 1000 ratios in [0.9, 1.1] and means within 0.1; a right start never leaves
[0.8, 1.25]. Beside the default stands the published coin: no geometry, a first step of 0.5, median / log(N + 1).
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np

from probinfer import betting, coin
from probinfer.core.binding import LogDensity

NAME = "coin_scale"
SEEDS, PARTICLES = 10, 100
STEPS = (100, 300, 1000)
METHODS = ("default", "published coin")
ROTATION = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]


class Case(NamedTuple):
    """A target, its start: scales (d,), rotation, where the start is centered and how wide it is."""

    name: str
    scale: Any
    rotation: Any
    center: Any
    width: Any
    right: bool


def cases(bits: int) -> list[Case]:
    """Return all cases; those of float32 have narrower ranges."""
    powers = (-6, -4, -2, 0, 2, 4, 6) if bits == 64 else (-4, -2, 0, 2, 4)
    square, zeros = np.eye(2), np.zeros(2)
    result = []
    for power in powers:
        scale = np.full(2, 10.0**power)
        result.append(
            Case(
                name=f"sd 1e{power}, start N(0, I)",
                scale=scale,
                rotation=square,
                center=zeros,
                width=np.ones(2),
                right=False,
            )
        )
        result.append(
            Case(
                name=f"sd 1e{power}, start right",
                scale=scale,
                rotation=square,
                center=zeros,
                width=scale,
                right=True,
            )
        )
    result.append(
        Case(
            name="sd 1, start 1000 away",
            scale=np.ones(2),
            rotation=square,
            center=np.full(2, 1000.0),
            width=np.ones(2),
            right=False,
        )
    )
    three = 10.0 ** np.array([-3, 0, 3] if bits == 64 else [-2, 0, 2])
    for name, rotation in (("along the axes", np.eye(3)), ("rotated", ROTATION)):
        label = f"sds {', '.join(f'{s:g}' for s in three)} {name}"
        result.append(
            Case(
                name=label, scale=three, rotation=rotation, center=np.zeros(3), width=np.ones(3), right=False
            )
        )
    return result


def log_normal(scale, rotation, x):
    """Principal axes are the columns of the rotation."""
    return -0.5 * jnp.sum((rotation.T @ x / scale) ** 2)


def built(method: str, scale: Any, rotation: Any) -> Any:
    """The algorithm."""
    log_density = LogDensity(log_normal, scale, rotation)
    if method == "default":
        return coin.svgd(log_density)
    return coin.svgd(log_density, geometry=coin.Identity(), bet=betting.coin(unit=0.5), bandwidth="published")


@partial(jax.jit, static_argnames=("method", "steps"))
def measure(method: str, steps: tuple[int, ...], scale, rotation, starts):
    """By seed: ratios (seed, T, d) and mean errors, and the extremes of the ratios over all steps (seed, 2)."""
    algorithm = built(method, scale, rotation)

    def judged(state):
        y = state.positions @ rotation / scale
        return jnp.std(y, axis=0), jnp.abs(jnp.mean(y, axis=0))

    def step(_, carry):
        state, low, high = carry
        state = algorithm.step(jax.random.key(0), state)[0]
        spread_error, _ = judged(state)
        return state, jnp.minimum(low, jnp.min(spread_error)), jnp.maximum(high, jnp.max(spread_error))

    def one(start):
        one = jnp.ones((), start.dtype)
        carry, recorded, before = (algorithm.init(start), jnp.inf * one, 0 * one), [], 0
        for until in steps:
            carry = jax.lax.fori_loop(before, until, step, carry)
            recorded.append(judged(carry[0]))
            before = until
        ratios, means = (jnp.stack(parts) for parts in zip(*recorded))
        return ratios, means, jnp.stack(carry[1:])

    return jax.lax.map(one, starts)


def row(case: Case, method: str, bits: int, seeds: int) -> dict:
    """Measure all seeds of one case."""
    dtype = jnp.float64 if bits == 64 else jnp.float32
    noise = np.random.default_rng(7).normal(size=(seeds, PARTICLES, len(case.scale)))
    starts = jnp.asarray(case.center + noise * case.width, dtype)
    measured = measure(
        method, STEPS, jnp.asarray(case.scale, dtype), jnp.asarray(case.rotation, dtype), starts
    )
    ratios, means, extremes = (np.asarray(a, float) for a in measured)
    last, error = ratios[:, -1], means[:, -1]
    good = np.all((last > 0.9) & (last < 1.1), axis=1) & np.all(error < 0.1, axis=1)
    if case.right:
        good &= (extremes[:, 0] > 0.8) & (extremes[:, 1] < 1.25)
    return {
        "case": case.name,
        "bits": bits,
        "method": method,
        "seeds": seeds,
        "passed": int(good.sum()),
        "ratios": [[float(np.nanmin(r)), float(np.nanmax(r))] for r in np.moveaxis(ratios, 1, 0)],
        "means": [float(np.nanmax(m)) for m in np.moveaxis(means, 1, 0)],
        "extremes": [float(extremes[:, 0].min()), float(extremes[:, 1].max())] if case.right else None,
    }


def short(low: float, high: float) -> str:
    """Format an interval in few characters."""
    return f"{low:.3g}..{high:.3g}"


def rows_of(records: list[dict]) -> list[list[str]]:
    """Print the table."""
    return [
        [
            f"{r['case']}, float{r['bits']}",
            r["method"],
            *[short(*ends) for ends in r["ratios"]],
            f"{r['means'][-1]:.2g}",
            short(*r["extremes"]) if r["extremes"] else "",
            f"{r['passed']}/{r['seeds']}",
        ]
        for r in records
    ]


def plot(records: list[dict]) -> None:
    """Plot the ratios at the three times for each case."""
    figure, axes = common.figure(width=11, height=6.5, columns=2)
    for axis, bits in zip(axes, (64, 32)):
        names = list(dict.fromkeys(r["case"] for r in records if r["bits"] == bits))
        axis.axvspan(0.9, 1.1, color="0.88", linewidth=0)
        for number, method in enumerate(METHODS):
            for t in range(len(STEPS)):
                chosen = [r for r in records if r["bits"] == bits and r["method"] == method]
                positions = [names.index(r["case"]) + 0.2 * (2 * number - 1) + 0.1 * (t - 1) for r in chosen]
                ends = np.array([r["ratios"][t] for r in chosen])
                middle = np.sqrt(ends[:, 0] * ends[:, 1])
                axis.plot(middle, positions, ".", color=f"C{number}", alpha=0.35 + 0.3 * t, markersize=5)
                axis.hlines(
                    positions,
                    ends[:, 0],
                    ends[:, 1] * 1.02,
                    color=f"C{number}",
                    alpha=0.35 + 0.3 * t,
                    linewidth=3,
                )
                if t == len(STEPS) - 1:
                    axis.plot([], [], color=f"C{number}", linewidth=3, label=method)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.invert_yaxis()
        axis.set(xscale="log", xlabel="standard deviation over the right one", title=f"float{bits}")
    axes[0].legend(frameon=False, fontsize=8, loc="center left")
    figure.text(
        0.5,
        0.005,
        "bars: smallest to largest over seeds and coordinates; pale to dark: T = 100, 300, 1000",
        ha="center",
        fontsize=7,
    )
    common.save_figure(figure, NAME)


def main() -> None:
    """Run the benchmark, print the tables, and write the results."""
    arguments = common.parser(__doc__).parse_args()
    jax.config.update("jax_enable_x64", True)
    seeds = 2 if arguments.small else SEEDS
    start = time.process_time()
    records = []
    for bits in (64, 32):
        for case in cases(bits)[:3] if arguments.small else cases(bits):
            records += [row(case, method, bits, seeds) for method in METHODS]
    header = ["case", "", *[f"sd ratio, T = {t}" for t in STEPS], "mean error", "all steps", "passed"]
    common.print_table("coin sampling at every scale", header, rows_of(records))
    failed = [r for r in records if r["method"] == "default" and r["passed"] < r["seeds"]]
    print(
        "Default, not passed:",
        *([f"{r['case']}, float{r['bits']}" for r in failed] or ["nothing"]),
        sep="\n  ",
    )
    cpu_seconds = time.process_time() - start
    print(f"{cpu_seconds:.0f} CPU seconds")
    if not arguments.small:
        common.write_results(NAME, {"records": records, "CPU seconds": cpu_seconds})
        plot(records)


if __name__ == "__main__":
    main()
