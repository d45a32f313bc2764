"""How long does TARP take on 1000 simulations x 1000 draws x 10 dimensions with 1000 bootstrap curves?

Ours: references that depend on the data (a regression, fitted to other simulations), whitened distances, exact band and
p-value, 1000 bootstrap curves of the ranks. The peer is the released package tarp: random references in a box, no band,
and its own bootstrap, of which a few iterations are run and scaled up. Process CPU time, after a first call that
compiles; asked: at most 0.1 s. The posterior is exact, so the p-values should look uniform.
"""

from __future__ import annotations

import time

import common
import jax
import jax.numpy as jnp
import numpy as np

from probinfer import checks

SIMULATIONS, DRAWS, DIMENSIONS, CURVES, PEER_CURVES = 1000, 1000, 10, 1000, 3


def make(key, simulations: int, draws: int):
    """Parameters theta ~ N(0, I), data x ~ N(theta, I), and draws of the posterior N(x / 2, I / 2)."""
    keys = jax.random.split(key, 3)
    theta = jax.random.normal(keys[0], (simulations, DIMENSIONS))
    x = theta + jax.random.normal(keys[1], theta.shape)
    noise = jax.random.normal(keys[2], (simulations, draws, DIMENSIONS))
    return theta, x, jax.block_until_ready(x[:, None] / 2 + jnp.sqrt(jnp.asarray(0.5, x.dtype)) * noise)


def timed(run) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and the result."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = run()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def ours(key, theta, x, draws, curves):
    """The whole of it: report, p-value, bootstrap."""
    report = checks.tarp(key, draws, theta, x)
    report.bootstrap(key, curves)
    return report.pvalue


def peer(theta, draws, curves) -> tuple[float, str]:
    """CPU seconds of one curve and of one bootstrap iteration of the released package, times the number of curves."""
    import tarp

    arrays = (np.asarray(draws).swapaxes(0, 1).copy(), np.asarray(theta).copy())
    once = timed(lambda: tarp.get_tarp_coverage(*arrays, norm=True))[0]
    some = timed(
        lambda: tarp.get_tarp_coverage(*arrays, norm=True, bootstrap=True, num_bootstrap=PEER_CURVES)
    )[0]
    return once, some / PEER_CURVES * curves


def main() -> None:
    """Time both."""
    arguments = common.parser(__doc__).parse_args()
    simulations, draws, curves = (100, 100, 100) if arguments.small else (SIMULATIONS, DRAWS, CURVES)
    theta, x, samples = make(jax.random.key(0), simulations, draws)
    first = timed(lambda: ours(jax.random.key(1), theta, x, samples, curves))
    rest = [timed(lambda k=k: ours(jax.random.key(k), theta, x, samples, curves)) for k in range(2, 12)]
    cpu, wall = (np.asarray([run[i] for run in rest]) for i in (0, 1))
    body = {
        "size": [simulations, draws, DIMENSIONS, curves],
        "first call, CPU s": first[0],
        "CPU s": {"median": np.median(cpu), "least": cpu.min(), "most": cpu.max()},
        "wall s": {"median": np.median(wall), "least": wall.min(), "most": wall.max()},
        "p-values": [run[2] for run in rest],
        "asked": 0.1,
    }
    rows = [["probinfer, after compilation", f"{np.median(cpu):.3f}", f"{cpu.min():.3f} - {cpu.max():.3f}"]]
    rows.append(["probinfer, first call", f"{first[0]:.2f}", ""])
    try:
        once, all_ = peer(theta, samples, curves)
        body["tarp package"] = {"one curve, CPU s": once, f"{curves} curves, CPU s (extrapolated)": all_}
        rows += [
            ["tarp package, one curve without bootstrap", f"{once:.2f}", ""],
            [f"tarp package, {curves} bootstrap curves, extrapolated from {PEER_CURVES}", f"{all_:.0f}", ""],
        ]
    except ImportError as error:
        print(f"the released package is not here ({error}); pip install tarp deprecation tqdm")
    common.print_table(
        f"TARP, {simulations} simulations x {draws} draws x {DIMENSIONS}", ["", "CPU s", "range"], rows
    )
    print(f"asked 0.1 s: {'met' if np.median(cpu) <= 0.1 else 'missed'}")
    if not arguments.small:
        common.write_results("tarp_speed", body, ("tarp",))


if __name__ == "__main__":
    main()
