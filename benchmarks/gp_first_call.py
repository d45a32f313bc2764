"""How long does a newcomer wait for the first fit of a Gaussian process, and is the second one free of compilation?

Question: process-CPU seconds of the first hyperparameter fit in a fresh Python process (tracing, compilation and the
optimization itself; importing the library is reported apart), and XLA compilations of a second fit of the same shape
on other data.

Protocol: synthetic regression, n = 500, d = 8, squared exponential with one lengthscale a column and Gaussian noise,
float64, all hyperparameters start at 1, one thread. Ours is ``gp.fit`` with its defaults on standardized data (what a
user calls: several starts, the best one kept) and, beside it, with a single start. The peer is GPJax on the same
standardized data: ``fit_scipy`` (the optimizer its regression guide uses), ``fit`` with Adam at 0.01 and its default of
100 steps (the example in its reference), and ``fit_lbfgs``. Every repeat is a new process; libraries alternate. The
negative log evidence reached is shown, because a fast fit may stop too early.

Criterion: our minimum over the repeats is at most that of GPJax's ``fit_scipy``, and our second fit compiles nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

LIBRARIES = (
    "probinfer fit",
    "probinfer fit, one start",
    "gpjax fit_scipy",
    "gpjax fit (Adam, 100 steps)",
    "gpjax fit_lbfgs",
)
REFERENCE = "gpjax fit_scipy"


def make_data(seed: int, num: int, dims: int):
    """A smooth function of some columns with noise, standardized."""
    import numpy as np

    rng = np.random.default_rng(seed)
    X = rng.normal(size=(num, dims))
    y = np.sin(2 * X[:, 0]) + 0.5 * X[:, 1] ** 2 - X[:, 2] * X[:, 3] + 0.3 * rng.normal(size=num)
    return (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()


class Compilations:
    """Counts XLA compilations, in JAX whichever library asks for them."""

    def __init__(self):
        import jax

        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"


def probinfer_fit(num_starts):
    import jax
    import jax.numpy as jnp

    from probinfer import gp

    def fit(X, y, key):
        model = gp.Model(
            gp.kernels.RBF(variance=1.0, lengthscale=jnp.ones(X.shape[1])), gp.likelihoods.Gaussian(1.0)
        )
        learn = gp.ML2() if num_starts is None else gp.ML2(num_restarts=num_starts)
        fit = gp.fit(jax.random.key(key), model, X, y, learn=learn, progress=False)
        # Outputs are standardized to rounding, so the evidence is in the same units as the peer's.
        return -float(fit.log_evidence)

    return fit


def gpjax_fit(kind):
    import gpjax as gpx
    import jax.numpy as jnp
    import optax

    def negative(posterior, data):
        return -gpx.objectives.conjugate_mll(posterior, data)

    def fit(X, y, key):
        data = gpx.Dataset(X=jnp.asarray(X), y=jnp.asarray(y)[:, None])
        kernel = gpx.kernels.RBF(lengthscale=jnp.ones(X.shape[1]), variance=jnp.asarray(1.0))
        prior = gpx.gps.Prior(mean_function=gpx.mean_functions.Zero(), kernel=kernel)
        posterior = prior * gpx.likelihoods.Gaussian(obs_stddev=jnp.asarray(1.0))
        call = {"model": posterior, "objective": negative, "train_data": data}
        if kind == "fit_scipy":
            fitted, _ = gpx.fit_scipy(**call, verbose=False)
        elif kind == "fit_lbfgs":
            fitted, _ = gpx.fit_lbfgs(**call)
        else:
            fitted, _ = gpx.fit(**call, optim=optax.adam(0.01), verbose=False)
        return float(negative(fitted, data))

    return fit


def child(library: str, num: int, dims: int) -> None:
    """Import, fit twice, and print the costs as one line of JSON."""
    start = time.process_time()
    if library.startswith("probinfer"):
        fit = probinfer_fit(1 if library.endswith("one start") else None)
    else:
        fit = gpjax_fit(library.split()[1])
    imported = time.process_time() - start
    compilations = Compilations()
    result = {"import": imported}
    for name, seed in (("first", 1), ("second", 2)):
        X, y = make_data(seed, num, dims)
        before, start = compilations.count, time.process_time()
        value = fit(X, y, seed)
        result |= {
            name: time.process_time() - start,
            f"{name} compilations": compilations.count - before,
            f"{name} value": value,
        }
    print(json.dumps(result))


def measure(library: str, num: int, dims: int) -> dict:
    """Run one child in a new process."""
    command = [sys.executable, __file__, "--child", library, str(num), str(dims)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{library} failed:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def report(results: dict, settings: dict) -> None:
    """Print the table, write the JSON and the plot."""
    import common
    import numpy as np

    columns = ("import", "first", "second")
    rows, summary = [], {}
    for library, runs in results.items():
        low = {name: min(run[name] for run in runs) for name in columns}
        high = {name: max(run[name] for run in runs) for name in columns}
        compilations = max(run["second compilations"] for run in runs)
        value = float(np.median([run["first value"] for run in runs]))
        summary[library] = {"min": low, "max": high, "second compilations": compilations, "value": value}
        cells = [f"{low[name]:.2f} - {high[name]:.2f}" for name in columns]
        rows.append([library, *cells, str(runs[0]["first compilations"]), str(compilations), f"{value:.3f}"])
    header = ["", "import", "first fit", "second fit", "XLA compilations", "of the second", "-log evidence"]
    common.print_table(f"CPU seconds, n = {settings['n']}, d = {settings['d']}, min - max", header, rows)
    ours, peer = summary["probinfer fit"], summary[REFERENCE]
    verdict = {
        "ratio of first fits (ours / GPJax fit_scipy)": ours["min"]["first"] / peer["min"]["first"],
        "second fit compiles": ours["second compilations"],
    }
    print(verdict)
    if not settings["small"]:
        body = {"settings": settings, "verdict": verdict, "summary": summary, "runs": results}
        common.write_results("gp_first_call", body, packages=("gpjax", "equinox"))
        plot(summary)


def plot(summary: dict) -> None:
    """Plot the times of import, first and second fit of each library."""
    import common

    figure, axis = common.figure(width=7.5, height=3.2)
    names = list(summary)[::-1]
    for shift, (column, color) in enumerate((("second", "C1"), ("first", "C0"), ("import", "0.7"))):
        positions = [row + 0.26 * (shift - 1) for row in range(len(names))]
        low = [summary[name]["min"][column] for name in names]
        ranges = [summary[name]["max"][column] - value for name, value in zip(names, low, strict=True)]
        label = column if column == "import" else f"{column} fit"
        axis.barh(positions, low, 0.24, xerr=[[0] * len(low), ranges], color=color, label=label)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("process-CPU seconds (bar: minimum over processes, line: up to the maximum)")
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    common.save_figure(figure, "gp_first_call")


def main() -> None:
    import common

    parser = common.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=4, help="fresh processes a library")
    arguments = parser.parse_args()
    num, dims, repeats = (100, 8, 2) if arguments.small else (500, 8, arguments.repeats)
    results: dict = {library: [] for library in LIBRARIES}
    for repeat in range(repeats):
        for library in LIBRARIES:
            results[library].append(measure(library, num, dims))
            print(f"repeat {repeat + 1}: {library}: {results[library][-1]}", flush=True)
    report(results, {"n": num, "d": dims, "processes": repeats, "small": arguments.small})


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("JAX_ENABLE_X64", "1")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    if "--child" in sys.argv:
        library, num, dims = sys.argv[2:]
        child(library, int(num), int(dims))
    else:
        main()
