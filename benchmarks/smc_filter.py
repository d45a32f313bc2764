"""What does a particle filter cost, and how precise is it, compared with blackjax, cuthbert and particles?

Question: CPU time of a bootstrap particle filter a particle and step, after compilation, and the error of its log
evidence against the Kalman filter, for this library and its peers in one run.

Model: x_0 ~ N(0, 1), x_t = .9 x_{t-1} + .5 e_t, y_t = x_t + .7 v_t, float64. Every filter draws from the transition and
weighs by the density of the observation, with systematic resampling. Two protocols: resampling at every step, as
blackjax's SMC step always does, and below an effective sample size of N / 2. Ours appears twice: as a model of one
particle (``smc.FeynmanKac``, a key for each particle, as cuthbert and blackjax have it) and as a model of all particles
at once (``smc.BatchedFeynmanKac``, one call of the generator, as the package ``particles`` has it). No history is
kept. blackjax's step keeps no evidence: the running sum of its normalizing constants is taken.

Timed: process CPU time, the median of several calls after a first one. Error: root mean square of log Z hat minus the
Kalman filter's log evidence over seeds.

``--million`` adds N = 10^6, T = 100 with the peak memory of a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from probinfer import resampling, smc

NAME = "smc_filter"
RHO, NOISE, ERROR = 0.9, 0.5, 0.7
SIZES, STEPS, SEEDS = (1000, 10_000, 100_000), (100, 1000), 50


def observations(num_steps: int) -> np.ndarray:
    """Return simulated data (T,)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(), np.empty(num_steps)
    for t in range(num_steps):
        x = x if t == 0 else RHO * x + NOISE * rng.normal()
        y[t] = x + ERROR * rng.normal()
    return y


def kalman(y: np.ndarray) -> float:
    """Return the log evidence."""
    mean, variance, total = 0.0, 1.0, 0.0
    for t, value in enumerate(y):
        if t:
            mean, variance = RHO * mean, RHO**2 * variance + NOISE**2
        innovation_variance = variance + ERROR**2
        total -= 0.5 * (np.log(2 * np.pi * innovation_variance) + (value - mean) ** 2 / innovation_variance)
        gain = variance / innovation_variance
        mean, variance = mean + gain * (value - mean), (1 - gain) * variance
    return float(total)


def log_density(y, x):
    """Of an observation."""
    return -0.5 * ((y - x) / ERROR) ** 2 - jnp.log(ERROR * jnp.sqrt(2 * jnp.pi))


# Ours, one particle


def start(key):
    """x_0."""
    return jax.random.normal(key)


def move(key, x, t):
    """x_t given x_{t-1}."""
    return RHO * x + NOISE * jax.random.normal(key, (), x.dtype)


def fit(y, x_previous, x, t):
    """Log potential."""
    return log_density(y[t], x)


# Ours, all particles


def start_all(y, key, num, reference=None):
    """x_0 of all, weighed."""
    x = jax.random.normal(key, (num,))
    return x, log_density(y[0], x)


def extend_all(y, key, x, t, reference=None):
    """x_t of all, weighed."""
    x = RHO * x + NOISE * jax.random.normal(key, x.shape, x.dtype)
    return x, log_density(y[t], x)


def ours(batched: bool, adaptive: bool, y, num: int):
    """A function of a key."""
    y = jnp.asarray(y)
    if batched:
        model = smc.BatchedFeynmanKac(Partial(start_all, y), Partial(extend_all, y))
    else:
        model = smc.FeynmanKac(start, move, Partial(fit, y))
    scheme = resampling.adaptive("systematic", None if adaptive else resampling.always())
    return lambda seed: float(
        smc.particle_filter(
            jax.random.key(seed), model, len(y), num, resampling=scheme, store="none"
        ).log_evidence
    )


def blackjax_filter(y, num: int):
    """Run the generic step, which resamples at each time, in a scan."""
    import blackjax.smc.base as base
    from blackjax.smc import resampling as schemes

    y = jnp.asarray(y)

    @jax.jit
    def run(key):
        key_start, key_steps = jax.random.split(key)
        x = jax.vmap(start)(jax.random.split(key_start, num))
        log_weights = log_density(y[0], x)
        total = jax.nn.logsumexp(log_weights)
        state = base.SMCState(x, jnp.exp(log_weights - total), {})

        def step(state, inputs):
            key, value = inputs
            state, info = base.step(
                key,
                state,
                lambda keys, x, _: (jax.vmap(move, (0, 0, None))(keys, x, 0), None),
                partial(log_density, value),
                schemes.systematic,
            )
            return state, info.log_likelihood_increment

        keys = jax.random.split(key_steps, len(y) - 1)
        _, increments = jax.lax.scan(step, state, (keys, y[1:]))
        return total - jnp.log(num) + jnp.sum(increments)

    return lambda seed: float(run(jax.random.key(seed)))


def cuthbert_filter(adaptive: bool, y, num: int):
    """Cuthbert's particle filter."""
    from cuthbert.smc import particle_filter
    from cuthbertlib.resampling import adaptive as adaptations
    from cuthbertlib.resampling import systematic

    y = jnp.asarray(y)
    scheme = systematic.resampling
    scheme = adaptations.ess_decorator(scheme, 0.5) if adaptive else scheme

    def init_sample(key):
        return jax.random.normal(key)

    # Its first state carries no observation: x_0 ~ N(0, 1) takes step one without moving.
    def propagate(key, x, inputs):
        moved = RHO * x + NOISE * jax.random.normal(key, (), x.dtype)
        return jnp.where(inputs["first"], x, moved)

    def potential(x_previous, x, inputs):
        return log_density(inputs["y"], x)

    filter_obj = particle_filter.build_filter(init_sample, propagate, potential, num, scheme)
    inputs = {"y": y, "first": jnp.arange(len(y)) == 0}

    @jax.jit
    def run(key):  # its own loop keeps every state; here only the last one is kept
        key_start, key_steps = jax.random.split(key)
        state = filter_obj.init_prepare(key=key_start)
        state = state._replace(model_inputs=jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), inputs))

        def step(state, given):
            following = filter_obj.filter_prepare(given[0], key=given[1])
            return filter_obj.filter_combine(state, following), None

        state, _ = jax.lax.scan(step, state, (inputs, jax.random.split(key_steps, len(y))))
        return state.log_normalizing_constant

    return lambda seed: float(run(jax.random.key(seed)))


def particles_filter(adaptive: bool, y, num: int):
    """The package particles (NumPy and Numba)."""
    import particles
    from particles import distributions as dists
    from particles import state_space_models as ssm

    class Model(ssm.StateSpaceModel):
        def PX0(self):
            return dists.Normal(loc=0.0, scale=1.0)

        def PX(self, t, xp):
            return dists.Normal(loc=RHO * xp, scale=NOISE)

        def PY(self, t, xp, x):
            return dists.Normal(loc=x, scale=ERROR)

    fk = ssm.Bootstrap(ssm=Model(), data=y)
    threshold = 0.5 if adaptive else 1.0

    def run(seed):
        np.random.seed(seed)  # noqa: NPY002 -- the package draws from the global generator
        filter_run = particles.SMC(fk=fk, N=num, resampling="systematic", ESSrmin=threshold, collect="off")
        filter_run.run()
        return float(filter_run.logLt)

    return run


WAYS = {
    "probinfer, one particle": (partial(ours, False), True),
    "probinfer, all particles": (partial(ours, True), True),
    "blackjax": (lambda adaptive, y, num: blackjax_filter(y, num), False),
    "cuthbert": (cuthbert_filter, True),
    "particles": (particles_filter, True),
}


def timed(run, repetitions: int) -> dict:
    """Return the CPU seconds of the first call, and the median of the others."""
    before = time.process_time()
    run(0)
    first = time.process_time() - before
    rest = []
    for seed in range(1, repetitions + 1):
        before = time.process_time()
        run(seed)
        rest.append(time.process_time() - before)
    return {"first": first, "median": float(np.median(rest)), "least": min(rest), "most": max(rest)}


def peak_memory() -> float:
    """Return the peak memory of this process in MB; getrusage may report that of the parent instead."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(row for row in status.read_text(encoding="utf-8").splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def million(num: int, num_steps: int) -> dict:
    """Measure time and peak memory of a large filter."""
    run = ours(True, True, observations(num_steps), num)
    before = peak_memory()
    record = timed(run, 2)
    return record | {
        "peak memory MB": peak_memory(),
        "before it MB": before,
        "nanoseconds": record["median"] / (num * num_steps) * 1e9,
        "particles": num,
        "steps": num_steps,
    }


def measure(sizes, steps, seeds: int, repetitions: int) -> list[dict]:
    """Measure all libraries, sizes, lengths and protocols."""
    records = []
    for num_steps in steps:
        y = observations(num_steps)
        truth = kalman(y)
        for num in sizes:
            if num * num_steps > 2e7:
                continue
            for adaptive in (False, True):
                for name, (make, can_adapt) in WAYS.items():
                    if adaptive and not can_adapt:
                        continue
                    try:
                        run = make(adaptive, y, num)
                        record = timed(run, repetitions)
                    except ImportError as missing:
                        print(f"{name}: {missing}")
                        continue
                    errors = [run(seed) - truth for seed in range(seeds)] if num == min(sizes) else []
                    record |= {
                        "way": name,
                        "steps": num_steps,
                        "particles": num,
                        "resampling": "ESS" if adaptive else "always",
                        "nanoseconds": record["median"] / (num * num_steps) * 1e9,
                        "errors": errors,
                    }
                    records.append(record)
                    print(
                        name,
                        num_steps,
                        num,
                        record["resampling"],
                        f"{record['nanoseconds']:.0f} ns",
                        flush=True,
                    )
    return records


def spread(num_steps: int, sizes, seeds: int) -> list[dict]:
    """Return the variance of the log evidence against N."""
    y = observations(num_steps)
    truth = kalman(y)
    values = []
    for num in sizes:
        run = ours(True, True, y, num)
        errors = np.asarray([run(seed) - truth for seed in range(seeds)])
        values.append(
            {
                "particles": num,
                "steps": num_steps,
                "variance": float(errors.var(ddof=1)),
                "mean of Z hat / Z": float(np.mean(np.exp(errors))),
                "its standard error": float(np.std(np.exp(errors), ddof=1) / np.sqrt(seeds)),
            }
        )
    return values


def plot(records: list[dict], variances: list[dict]) -> None:
    """Plot the cost and the variance against N."""
    figure, (left, right) = common.figure(width=9.5, height=3.6, columns=2)
    shortest = min(r["steps"] for r in records)
    for number, name in enumerate(dict.fromkeys(r["way"] for r in records)):
        rows = [
            r for r in records if r["way"] == name and r["resampling"] == "always" and r["steps"] == shortest
        ]
        left.plot(
            [r["particles"] for r in rows],
            [r["nanoseconds"] for r in rows],
            "o-",
            color=f"C{number}",
            label=name,
        )
    left.set(xscale="log", yscale="log", xlabel="particles", ylabel="nanoseconds a particle and step")
    left.legend(frameon=False, fontsize=8)
    for number, num_steps in enumerate(dict.fromkeys(v["steps"] for v in variances)):
        rows = [v for v in variances if v["steps"] == num_steps]
        right.plot(
            [v["particles"] for v in rows],
            [v["variance"] for v in rows],
            "o-",
            color=f"C{number}",
            label=f"T = {num_steps}",
        )
        first = rows[0]
        right.plot(
            [v["particles"] for v in rows],
            [first["variance"] * first["particles"] / v["particles"] for v in rows],
            "--",
            color=f"C{number}",
            linewidth=0.8,
        )
    right.set(
        xscale="log", yscale="log", xlabel="particles", ylabel="variance of the log evidence (dashed: 1 / N)"
    )
    right.legend(frameon=False, fontsize=8)
    common.save_figure(figure, NAME)


def main() -> None:
    """Run the benchmark, print the tables, and write the results."""
    parser = common.parser(__doc__)
    parser.add_argument("--million", action="store_true", help="N = 10^6, T = 100 too")
    parser.add_argument("--worker", action="store_true", help="run the large filter and print its record")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(million(10**6, 100)))
        return
    sizes, steps = ((100, 300), (10,)) if arguments.small else (SIZES, STEPS)
    records = measure(sizes, steps, 3 if arguments.small else SEEDS, 1 if arguments.small else 5)
    variances = [
        row
        for num_steps in steps
        for row in spread(
            num_steps,
            (50, 200) if arguments.small else (100, 300, 1000, 3000),
            10 if arguments.small else 200,
        )
    ]
    rows = [
        [
            r["way"],
            str(r["steps"]),
            str(r["particles"]),
            r["resampling"],
            f"{r['nanoseconds']:.0f}",
            f"{r['first']:.2f}",
            f"{np.sqrt(np.mean(np.square(r['errors']))):.3f}" if r["errors"] else "",
        ]
        for r in records
    ]
    header = ["", "T", "N", "resampling", "ns a particle and step", "first call, CPU s", "RMS error of log Z"]
    common.print_table("bootstrap particle filter", header, rows)
    header = ["T", "N", "variance of log Z", "mean of Z hat / Z", "+-"]
    rows = [
        [
            str(v["steps"]),
            str(v["particles"]),
            f"{v['variance']:.4f}",
            f"{v['mean of Z hat / Z']:.4f}",
            f"{v['its standard error']:.4f}",
        ]
        for v in variances
    ]
    common.print_table("probinfer, resampling by ESS", header, rows)
    body = {"records": records, "variances": variances}
    if arguments.million:
        done = subprocess.run(
            [sys.executable, __file__, "--worker"], check=True, stdout=subprocess.PIPE, text=True
        )
        body["million"] = json.loads(done.stdout.splitlines()[-1])
        print(body["million"])
    if not arguments.small:
        common.write_results(NAME, body, ("cuthbert", "particles"))
        plot(records, variances)


if __name__ == "__main__":
    main()
