"""What does it cost to identify a function with its dependencies? CPU milliseconds, for a program and for a store.

A function is read each time it is handed in (``probinfer.core.identity``), so the price is paid at every call of the
library, compiled or not. Each row is the median of ten readings of the same function.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import common
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd

from probinfer import targets
from probinfer.core.binding import Bound
from probinfer.running import fingerprint

__all__ = ["main"]


def _small(x: Any) -> Any:
    return -0.5 * jnp.sum(x**2)


class _Study:
    def __init__(self, y: Any):
        self.y = y

    def density(self, x: Any) -> Any:
        return _small(x - jnp.mean(self.y))


def _closure(value: Any) -> Callable:
    return lambda x: _small(x - np.mean(value))


def _model(y: Any) -> None:
    m = numpyro.sample("m", dist.Normal(0.0, 10.0))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


def _milliseconds(call: Callable[[], Any], times: int = 10) -> float:
    call()
    durations = []
    for _ in range(times):
        start = time.process_time()
        call()
        durations.append(time.process_time() - start)
    return 1e3 * float(np.median(durations))


def main(size: int = 10**6) -> None:
    """Run the benchmark, print the table, and write the results."""
    numbers = np.random.default_rng(0).normal(size=size)
    functions = {
        "a function and a helper": functools.partial(_small),
        "a bound method": _Study(np.ones(3)).density,
        f"a closure over {size} numbers, NumPy": _closure(numbers),
        f"a closure over {size} numbers, JAX": _closure(jnp.asarray(numbers)),
        f"a closure over {size} numbers, pandas": _closure(pd.DataFrame({"y": numbers})),
        f"a closure over {size} numbers, a list": _closure(numbers.tolist()),
    }
    rows = [
        {
            "function": name,
            "for a program": _milliseconds(functools.partial(Bound, fn)),
            "for a store": _milliseconds(functools.partial(fingerprint.digest, fn)),
        }
        for name, fn in functions.items()
    ]
    target = _milliseconds(lambda: targets.from_numpyro(_model, numbers[:100]), times=5)
    shown = [[row["function"], f"{row['for a program']:.2f}", f"{row['for a store']:.2f}"] for row in rows]
    shown.append(["targets.from_numpyro of a small model", f"{target:.2f}", ""])
    common.print_table("CPU milliseconds", ["what is handed in", "for a program", "for a store"], shown)
    if size == 10**6:
        common.write_results("identity", {"milliseconds": rows, "from_numpyro": target})


if __name__ == "__main__":
    main(10**4 if common.parser(__doc__).parse_args().small else 10**6)
