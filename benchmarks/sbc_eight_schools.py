"""How long does simulation-based calibration of eight schools take, for each method of running many data sets?

Question: the time of a whole calibration, from nothing compiled to the verdict on the ranks, of this library's default
(``mcmc.posterior_sampler`` by ``run_many``) and of its other modes, beside blackjax's NUTS on the same model run one
data set after another (``lax.map``) and vectorized over the data sets (``vmap``).

Protocol: mu ~ N(0, 5), tau ~ half-Cauchy(5), z ~ N(0, 1)^8, y ~ N(mu + tau z, sigma), eight known sigma, sampled
in (mu, log tau, z). 1000 simulated data sets, one chain each from a draw of the prior, 500 + 500 transitions, target
acceptance 0.8, diagonal metric by window adaptation. Each way runs in a process of its own, so that each compiles all
it needs; simulation of the data and imports are not timed. Timed are inference (compilation included) and the rank
checks of its draws: every scalar, log prior, log likelihood, log joint and 20 random projections, with Holm's
correction. Wall time and process CPU time are given; on a busy machine the latter says more. ESS (bulk, the smaller of
mu and log tau) is computed for all by the same code, untimed; its median and 5 % quantile are over data sets. Gradients
are counted after warm-up for blackjax, and with warm-up for ours.

Criterion: the default takes at most 1/4 of the time of sequential NUTS and 1/9 of that of vectorized NUTS in the same
run, with a median ESS of at least 0.8 of that of NUTS, and passes every rank check.

``--only NAME ...`` runs some of the ways and takes the others from the results that are there.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import blackjax
import common
import jax
import jax.numpy as jnp
import numpy as np

import probinfer as pi
from probinfer import checks, mcmc
from probinfer.inference import diagnostics

NAME = "sbc_eight_schools"
SIGMA = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
SEQUENTIAL, VECTORISED, DEFAULT = "blackjax NUTS, lax.map", "blackjax NUTS, vmap", "HMC (default)"
OURS = {  # name -> settings of posterior_sampler, mode of run_many
    DEFAULT: ({}, "auto"),
    "HMC, map": ({}, "map"),
    "NUTS depth 5, queue": ({"algorithm": "nuts"}, "queue"),
    "NUTS depth 5, map": ({"algorithm": "nuts"}, "map"),
    "NUTS depth 5, vmap": ({"algorithm": "nuts"}, "vmap"),
    "NUTS depth 10, queue": ({"algorithm": "nuts", "max_depth": 10}, "queue"),
}
WAYS = (SEQUENTIAL, VECTORISED, *OURS)


def log_prior(theta):
    """Log prior of (mu, log tau, z), with the Jacobian."""
    tau = jnp.exp(theta["log_tau"])
    log_tau_density = jnp.log(2 / (5 * jnp.pi)) - jnp.log1p((tau / 5) ** 2) + theta["log_tau"]
    normals = (theta["mu"] / 5) ** 2 + jnp.sum(theta["z"] ** 2)
    return log_tau_density - 0.5 * normals - 4.5 * jnp.log(2 * jnp.pi) - jnp.log(5.0)


def log_likelihood(theta, y):
    sigma = jnp.asarray(SIGMA, y.dtype)
    residual = (y - theta["mu"] - jnp.exp(theta["log_tau"]) * theta["z"]) / sigma
    return -0.5 * jnp.sum(residual**2) - jnp.sum(jnp.log(sigma)) - 4 * jnp.log(2 * jnp.pi)


def log_joint(theta, y):
    return log_prior(theta) + log_likelihood(theta, y)


def prior_draw(key, _):
    key_mu, key_tau, key_z = jax.random.split(key, 3)
    log_tau = jnp.log(5 * jnp.abs(jax.random.cauchy(key_tau)))
    return {"mu": 5 * jax.random.normal(key_mu), "log_tau": log_tau, "z": jax.random.normal(key_z, (8,))}


def simulate(key):
    key_theta, key_y = jax.random.split(key)
    theta = prior_draw(key_theta, None)
    noise = jnp.asarray(SIGMA, theta["mu"].dtype) * jax.random.normal(key_y, (8,))
    return theta, theta["mu"] + jnp.exp(theta["log_tau"]) * theta["z"] + noise


def blackjax_nuts(transitions: int, key, y):
    """Window adaptation and draws, as in the documentation of blackjax."""
    key_start, key_warmup, key_draws = jax.random.split(key, 3)
    logdensity_fn = partial(log_joint, y=y)
    adaptation = blackjax.window_adaptation(
        blackjax.nuts, logdensity_fn, adaptation_info_fn=lambda *_: None, target_acceptance_rate=0.8
    )
    (state, parameters), _ = adaptation.run(key_warmup, prior_draw(key_start, None), transitions)
    kernel = blackjax.nuts(logdensity_fn, **parameters)

    def draw(state, key):
        state, info = kernel.step(key, state)
        return state, (state.position, info.num_integration_steps, info.is_divergent)

    _, (positions, steps, divergent) = jax.lax.scan(draw, state, jax.random.split(key_draws, transitions))
    return positions, jnp.sum(steps), jnp.sum(divergent)


def run_blackjax(vectorized: bool, keys, y, transitions: int):
    """Return draws and statistics of all data sets by blackjax; gradients are counted after warm-up only."""
    sample_one = partial(blackjax_nuts, transitions)
    many = (
        jax.vmap(sample_one)
        if vectorized
        else lambda keys, y: jax.lax.map(lambda pair: sample_one(*pair), (keys, y))
    )
    draws, steps, divergences = jax.block_until_ready(jax.jit(many)(keys, y))
    return draws, {
        "gradients a draw": float(np.mean(steps)) / transitions,
        "divergences": int(np.sum(divergences)),
        "mode": "vmap" if vectorized else "map",
    }


def run_ours(settings: dict, mode: str, keys, y, transitions: int):
    """Return draws and statistics of all data sets by this library; gradients include those of warm-up."""
    sampler = mcmc.posterior_sampler(
        log_joint, prior_draw, num_warmup=transitions, num_draws=transitions, **settings
    )
    many = pi.run_many(sampler, keys, y, mode=mode, progress=False)
    return many.draws, {
        "gradients a draw": float(np.mean(many.work)) / (2 * transitions),
        "divergences": int(many.divergences.sum()),
        "capped": float(np.mean(many.info.num_capped)) / transitions,
        "failed": int(many.failed.sum()),
        "mode": many.mode,
    }


def judge(draws, theta, y):
    """Run the rank checks."""
    table = checks.rank_table(
        jax.random.key(3), draws, theta, y, log_prior_fn=log_prior, log_likelihood_fn=log_likelihood
    )
    return checks.uniformity(table)


def worker(method: str, num: int, transitions: int, path: str) -> None:
    """Run one method and write its measurements."""
    theta, y = jax.jit(jax.vmap(simulate))(jax.random.split(jax.random.key(0), num))
    keys = jax.random.split(jax.random.key(1), num)
    jax.block_until_ready(y)
    run = partial(run_ours, *OURS[method]) if method in OURS else partial(run_blackjax, method == VECTORISED)
    wall, cpu = time.perf_counter(), time.process_time()
    draws, accounts = run(keys, y, transitions)
    inference = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    report = judge(draws, theta, y)
    total = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    sizes = np.asarray(jax.lax.map(ess_of, (jnp.asarray(draws["mu"]), jnp.asarray(draws["log_tau"]))))
    record = accounts | {
        "total": total,
        "inference": inference,
        "ess": [float(np.median(sizes)), float(np.quantile(sizes, 0.05))],
        "passed": report.passed,
        "verdict": report.verdict,
        "pvalues": report.pvalues,
        "raw pvalues": report.raw_pvalues,
        "thin": report.ranks.thin,
        "peak memory MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "load": os.getloadavg()[0],
        "device": jax.devices()[0].device_kind,
    }
    Path(path).write_text(json.dumps(record), encoding="utf-8")


def ess_of(pair):
    """Bulk ESS of one data set, the smaller of the two."""
    return jnp.min(diagnostics.ess(jnp.stack(pair, axis=-1)[None]))


def measure(method: str, num: int, transitions: int) -> dict:
    """Run one method in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "record.json")
        command = [sys.executable, __file__, "--worker", method, "--data-sets", str(num)]
        subprocess.run([*command, "--transitions", str(transitions), "--path", path], check=True)
        return json.loads(Path(path).read_text(encoding="utf-8"))


def row(name: str, record: dict) -> list[str]:
    """Return one row of the table."""
    capped = record.get("capped")
    return [
        name,
        record["mode"],
        f"{record['total']['wall']:.1f}",
        f"{record['total']['cpu']:.1f}",
        f"{record['total']['cpu'] - record['inference']['cpu']:.1f}",
        f"{record['ess'][0]:.0f} ({record['ess'][1]:.0f})",
        f"{record['gradients a draw']:.1f}",
        str(record["divergences"]),
        "" if capped is None else f"{capped:.2%}",
        str(record.get("failed", "")),
        f"{record['peak memory MB']:.0f}",
        f"{min(record['pvalues'].values()):.2g}",
        {True: "pass", False: "FAIL", None: "cannot tell"}[record["passed"]],
    ]


HEADER = [
    "",
    "mode",
    "wall s",
    "CPU s",
    "of it ranks",
    "ESS median (5 %)",
    "gradients / transition",
    "divergent",
]
HEADER += ["capped", "failed", "peak MB", "least p (Holm)", "ranks"]


def ratios(records: dict) -> dict:
    """Return the required and the measured ratios, by both clocks."""
    ours = records[DEFAULT]
    result = {}
    for peer, required in ((SEQUENTIAL, 1 / 4), (VECTORISED, 1 / 9)):
        if peer in records:
            for clock in ("wall", "cpu"):
                share = ours["total"][clock] / records[peer]["total"][clock]
                result[f"time / {peer} ({clock})"] = {
                    "value": share,
                    "asked": required,
                    "met": share <= required,
                }
            share = ours["ess"][0] / records[peer]["ess"][0]
            result[f"ESS / {peer}"] = {"value": share, "asked": 0.8, "met": share >= 0.8}
    return result


def plot(records: dict) -> None:
    """Plot the time of each method, and its ESS per second."""
    figure, (left, right) = common.figure(width=9.5, height=3.4, columns=2)
    names = list(records)
    colors = ["0.6" if name not in OURS else "C0" for name in names]
    for axis, values, label in (
        (
            left,
            [records[name]["total"]["cpu"] for name in names],
            "CPU seconds, compilation and ranks included",
        ),
        (
            right,
            [records[name]["ess"][0] / records[name]["total"]["cpu"] for name in names],
            "median ESS of a data set per CPU second",
        ),
    ):
        axis.barh(range(len(names)), values, 0.65, color=colors)
        for position, value in enumerate(values):
            axis.text(value, position, f" {value:.3g}", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names if axis is left else [""] * len(names))
        axis.invert_yaxis()
        axis.set_xlabel(label)
    common.save_figure(figure, NAME + suffix())


def suffix() -> str:
    return "_x64" if jax.config.jax_enable_x64 else ""


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=WAYS, metavar="NAME", help=f"some of {', '.join(WAYS)}")
    parser.add_argument("--data-sets", type=int, default=1000)
    parser.add_argument("--transitions", type=int, default=500, help="of warm-up, and of draws")
    parser.add_argument("--worker", choices=WAYS, help="run one way and write its record to --path")
    parser.add_argument("--path")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.data_sets, arguments.transitions, arguments.path)
        return
    num, transitions = (40, 60) if arguments.small else (arguments.data_sets, arguments.transitions)
    settings = {"data sets": num, "transitions": transitions}
    old = {} if arguments.small else common.read_results(NAME + suffix())
    records = dict(old.get("records", {})) if old.get("settings") == settings else {}
    for method in arguments.only or WAYS:
        records[method] = measure(method, num, transitions)
        print(f"{method}: {records[method]['total']}, {records[method]['verdict']}", flush=True)
    records = {method: records[method] for method in WAYS if method in records}
    title = f"eight schools, {num} data sets, {transitions} + {transitions} transitions"
    common.print_table(title, HEADER, [row(name, record) for name, record in records.items()])
    result = ratios(records) if DEFAULT in records else {}
    for name, value in result.items():
        verdict = "met" if value["met"] else "NOT met"
        print(f"{name}: {value['value']:.3f} (asked {value['asked']:.3f}: {verdict})")
    if not arguments.small:
        common.write_results(NAME + suffix(), {"settings": settings, "ratios": result, "records": records})
        plot(records)


if __name__ == "__main__":
    main()
