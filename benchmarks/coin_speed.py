"""What does a step of coin SVGD cost, compared with the matrix products that it needs?

A full step (scores, bandwidth, geometry, direction, bet) against the bare products X Xᵀ, K G and K X of its sizes, in
float32, and against steps of ``blackjax.svgd`` and of NumPyro's ``SVGD`` with their own default kernels and bandwidths.
CPU time of the process, the least of several repeats, each of many steps: run it on one core, without flags:

    env -u XLA_FLAGS OPENBLAS_NUM_THREADS=1 taskset -c 1 python benchmarks/coin_speed.py

Memory: the largest resident size of a fresh process that takes three steps with 20 000 particles in 50 dimensions,
above that after the imports; compiling is part of it, so the same with 200 particles stands beside it, and the same
with 100 000. Required: at most
1.7 times the products for N = 1000 and d = 50, 0.6 times for N = 4000 and d = 2, 400 MB.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import blackjax
import common
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

import probinfer as pi
from probinfer import coin
from probinfer.core.binding import LogDensity
from probinfer.running.driver import record_nothing

NAME = "coin_speed"
SIZES = (("correlated normal", 1000, 50), ("two modes", 4000, 2), ("correlated normal", 100, 50))
LARGE = (200, 20_000, 100_000)
WIDE = 50
WARM = 70  # steps before the clock starts: past the early bandwidths


def log_correlated(precision, x):
    """A normal."""
    return -0.5 * x @ precision @ x


def log_modes(center, x):
    """Two modes."""
    return jnp.logaddexp(-jnp.sum((x - center) ** 2), -jnp.sum((x + center) ** 2))


def density(name: str, dims: int) -> LogDensity:
    """The target."""
    if name == "two modes":
        return LogDensity(log_modes, jnp.array([2.0, -2.0], jnp.float32))
    gaps = abs(np.arange(dims)[:, None] - np.arange(dims)[None])
    return LogDensity(log_correlated, jnp.asarray(np.linalg.inv(0.8**gaps), jnp.float32))


@jax.jit
def products(X, G, K):
    """Compute the matrix products that each step needs."""
    return X @ X.T, K @ G, K @ X


def microseconds(call, per_call: int, repeats: int) -> float:
    """Return the minimum CPU time of a step, after a first call that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(call())
        times.append((time.process_time() - start) / per_call)
    return 1e6 * min(times)


def floor(N: int, d: int, repeats: int) -> float:
    """Measure the matrix products alone."""
    X, G = jax.random.normal(jax.random.key(0), (2, N, d), jnp.float32)
    K = jnp.exp(-jax.random.uniform(jax.random.key(1), (N, N), jnp.float32))
    return microseconds(lambda: [products(X, G, K) for _ in range(5)], 5, repeats)


def start(N: int, d: int):
    """Return particles from a normal."""
    return jnp.asarray(np.random.default_rng(3).normal(size=(N, d)), jnp.float32)


def ours(name: str, N: int, d: int, steps: int, repeats: int) -> float:
    """A step of ``coin.svgd`` inside ``pi.run``."""
    algorithm, key = coin.svgd(density(name, d)), jax.random.key(0)
    state, _ = pi.run(key, algorithm, algorithm.init(start(N, d)), WARM, collect=record_nothing)
    return microseconds(
        lambda: pi.run(key, algorithm, state, steps, collect=record_nothing)[0].positions, steps, repeats
    )


def of_blackjax(name: str, N: int, d: int, steps: int, repeats: int) -> float:
    """A step of blackjax, its default kernel and median heuristic, with Adam, in a compiled loop."""
    algorithm = blackjax.svgd(jax.grad(density(name, d)), optax.adam(0.1))
    state = algorithm.init(start(N, d))
    loop = jax.jit(lambda state: jax.lax.fori_loop(0, steps, lambda _, s: algorithm.step(s), state))
    return microseconds(lambda: loop(state).particles, steps, repeats)


def of_numpyro(name: str, N: int, d: int, steps: int, repeats: int) -> float:
    """A step of NumPyro's SVGD with its radial kernel and Adam, in a compiled loop."""
    from numpyro.contrib.einstein import SVGD, RBFKernel

    log_density = density(name, d)

    def model():
        x = numpyro.sample("x", dist.Normal(jnp.zeros(d, jnp.float32), 1).to_event(1).mask(False))
        numpyro.factor("density", log_density(x))

    method = SVGD(model, numpyro.optim.Adam(0.1), RBFKernel(), num_stein_particles=N)
    state = method.init(jax.random.key(0))
    loop = jax.jit(lambda state: jax.lax.fori_loop(0, steps, lambda _, s: method.update(s)[0], state))
    return microseconds(lambda: jax.tree.leaves(method.get_params(loop(state))), steps, repeats)


def resident(N: int, d: int) -> list[float]:
    """Run three steps in a new process; return MB after the imports, peak MB, and CPU seconds."""
    command = [sys.executable, __file__, "--memory", str(N), str(d)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [float(field) for field in lines[-1].split()]


def megabytes(name: str) -> float:
    """Read a line of the status of this process: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def take_three_steps(N: int, d: int) -> None:
    """Take three steps; print the memory before, its peak, and the CPU time."""
    before, begun = megabytes("VmRSS"), time.process_time()
    algorithm = coin.svgd(density("correlated normal", d))
    state = algorithm.init(start(N, d))
    state, _ = pi.run(jax.random.key(0), algorithm, state, 3, collect=record_nothing)
    jax.block_until_ready(state)
    print(before, megabytes("VmHWM"), time.process_time() - begun)


def row(name: str, N: int, d: int, small: bool) -> dict:
    """Measure all methods at one size."""
    pairs = N * N * max(d, 8)
    steps, repeats = max(3, min(50, int(2e9 / pairs))), 2 if small else 7
    record = {"target": name, "N": N, "d": d, "products": floor(N, d, repeats)}
    record["coin.svgd"] = ours(name, N, d, steps, repeats)
    few = 1 if N > 500 else 10
    record["blackjax.svgd"] = of_blackjax(name, N, d, few, 1 if small or N > 500 else 3)
    if N <= 1000:
        record["NumPyro SVGD"] = of_numpyro(name, N, d, few, 1 if small or N > 500 else 3)
    print(record, flush=True)
    return record


def main() -> None:
    """Run the benchmark, print the tables, and write the results."""
    parser = common.parser(__doc__)
    parser.add_argument("--only-memory", action="store_true", help="measure the memory again, keep the times")
    parser.add_argument(
        "--memory", nargs=2, type=int, help="take three steps of this size and print the memory"
    )
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", False)
    if arguments.memory:
        take_three_steps(*arguments.memory)
        return
    sizes = SIZES[-1:] if arguments.small else SIZES
    if arguments.only_memory:
        records = common.read_results(NAME)["records"]
    else:
        records = [row(*size, arguments.small) for size in sizes]
    memory = {}
    for N in LARGE[:1] if arguments.small else LARGE:
        imported, peak, cpu_seconds = resident(N, WIDE)
        memory[f"{N} particles"] = {
            "after import": imported,
            "most": peak,
            "above import": peak - imported,
            "CPU seconds of three steps, compilation included": cpu_seconds,
        }
    methods = ("coin.svgd", "blackjax.svgd", "NumPyro SVGD")
    rows = [
        [
            f"{r['target']}, N = {r['N']}, d = {r['d']}",
            f"{r['products']:.0f}",
            *[
                f"{r[method]:.0f} ({r[method] / r['products']:.2f} x)" if method in r else ""
                for method in methods
            ],
        ]
        for r in records
    ]
    common.print_table("CPU microseconds a step (times the products)", ["", "products", *methods], rows)
    print("memory in MB:", memory)
    if not arguments.small:
        common.write_results(NAME, {"records": records, "memory in MB": memory})


if __name__ == "__main__":
    main()
