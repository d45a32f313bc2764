"""How much memory and time do the discrepancies take on 50 000 draws?

Each check runs in a process of its own on 50 000 draws in 10 dimensions (two-sample checks: 50 000 in each sample,
100 000 pooled), with its default number of permutations or bootstraps. Peak memory is that of the process (resident,
imports, compiler and data included), beside the peak of a process that makes the same draws and checks nothing. Asked:
at most 1 GB. A matrix of all pairs would take 20 GB for one sample and 80 GB for two, in float64.

The draws are correct, so the p-values should be uniform.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time

import common
import jax
import jax.numpy as jnp

from probinfer import checks

NAME, DIMENSIONS, LIMIT = "checks_memory", 10, 1024.0


def log_density(x):
    """A standard normal."""
    return -0.5 * jnp.sum(x * x)


CHECKS = {
    "nothing": lambda key, a, b: None,
    "KSD": lambda key, a, b: checks.ksd(a, log_density, key=key).pvalue,
    "Stein identity": lambda key, a, b: checks.stein_identity(a, log_density).pvalue,
    "MMD": lambda key, a, b: checks.mmd(a, b, key=key).pvalue,
    "energy distance": lambda key, a, b: checks.energy_distance(a, b, key=key).pvalue,
    "sliced Wasserstein": lambda key, a, b: checks.sliced_wasserstein(a, b, key=key).pvalue,
    "C2ST": lambda key, a, b: checks.c2st(key, a, b).pvalue,
}


def worker(name: str, num: int) -> None:
    """Run one check and print its time and memory as JSON."""
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.block_until_ready(jax.random.normal(key, (num, DIMENSIONS))) for key in keys[:2])
    wall, cpu = time.perf_counter(), time.process_time()
    pvalue = CHECKS[name](keys[2], a, b)
    record = {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak memory MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "p-value": None if pvalue is None else float(pvalue),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(record))


def measure(name: str, num: int) -> dict:
    """Run one check in a separate process."""
    command = [sys.executable, __file__, "--worker", name, "--draws", str(num)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all checks."""
    parser = common.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="NAME")
    parser.add_argument("--draws", type=int, default=50_000)
    parser.add_argument("--worker", choices=CHECKS, help="run one check and print its record")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.draws)
        return
    num = 500 if arguments.small else arguments.draws
    old = {} if arguments.small else common.read_results(NAME)
    records = dict(old.get("records", {})) if old.get("draws") == num else {}
    for name in arguments.only or CHECKS:
        records[name] = measure(name, num)
        print(name, records[name], flush=True)
    rows = [
        [
            name,
            f"{record['peak memory MB']:.0f}",
            f"{record['cpu']:.1f}",
            "" if record["p-value"] is None else f"{record['p-value']:.3f}",
            "met" if record["peak memory MB"] <= LIMIT else "MISSED",
        ]
        for name, record in records.items()
    ]
    header = ["", "peak MB", "CPU s, compilation included", "p-value", f"at most {LIMIT:.0f} MB"]
    common.print_table(f"{num} draws in {DIMENSIONS} dimensions", header, rows)
    if not arguments.small:
        common.write_results(NAME, {"draws": num, "asked MB": LIMIT, "records": records})


if __name__ == "__main__":
    main()
