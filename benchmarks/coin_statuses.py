"""Does the status of a coin sampler distinguish correct results from wrong ones?

``coin.SVGD()`` with its defaults, in float64, on targets of ``coin_targets.py`` (exact or stored reference draws, those
of posteriordb among them), Neal's funnel in 2 and 10 dimensions, and two modes far apart with shares of 1/2 and of
0.8. A cloud counts as wrong where a mean is off by more than 0.3 standard deviations, or a mean distance from the mean
by more than a factor of 1.4, in any coordinate. Counted: wrong clouds that are called OK (missed), and right ones that
are called POOR_APPROXIMATION (false alarms).
"""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from coin_targets import DRAWS, TARGETS, Case, exact, log_mixture, random, rows

from probinfer import coin, targets
from probinfer.core.errors import NumericalError
from probinfer.core.status import Status

NAME = "coin_statuses"
SEEDS = 4
CHOSEN = (
    "gauss",
    "rosenbrock",
    "donut",
    "funnel",
    "squiggle",
    "uneven mixture",
    "banana",
    "student t",
    "rotated, d = 10",
    "arK-arK",
    "eight_schools-eight_schools_noncentered",
    "gp_pois_regr-gp_regr",
    "hmm_example-hmm_example",
    "kidiq-kidscore_momhsiq",
    "kilpisjarvi_mod-kilpisjarvi",
    "nes2000-nes",
    "arma-arma11",
)


def log_neal(sd, x):
    """Log variance first, the rest normal of that variance."""
    return -0.5 * (x[0] / sd) ** 2 - 0.5 * jnp.sum(x[1:] ** 2) * jnp.exp(-x[0]) - 0.5 * x[0] * (len(x) - 1)


def neal(dims: int, sd: float) -> Case:
    """The funnel."""
    first = sd * random().normal(size=DRAWS)
    rest = np.exp(first / 2)[:, None] * np.random.default_rng(1).normal(size=(DRAWS, dims - 1))
    return exact(log_neal, np.concatenate([first[:, None], rest], axis=1), sd)


def modes(share: float) -> Case:
    """A mixture of two standard normals at distance 20; ``share`` is the weight of the second."""
    means, shares = np.array([[-10.0, 0.0], [10.0, 0.0]]), np.array([1 - share, share])
    component = random().choice(2, DRAWS, p=shares)
    draws = means[component] + random().normal(size=(DRAWS, 2))
    return exact(log_mixture, draws, means, np.ones(2), np.log(shares))


CASES: dict[str, Any] = {name: TARGETS[name][0] for name in CHOSEN} | {
    "Neal's funnel, d = 2": partial(neal, 2, 3.0),
    "Neal's funnel, d = 10": partial(neal, 10, 3.0),
    "funnel of sd 1.5, d = 10": partial(neal, 10, 1.5),
    "two modes 20 apart": partial(modes, 0.5),
    "the same, shares 0.8 and 0.2": partial(modes, 0.2),
}


def measure(case: Case, seed: int) -> dict[str, Any]:
    """Run once; return the status and the error of the particles."""
    example = jax.tree.map(lambda leaf: leaf[0], case.start(jax.random.key(0), 2))
    target = targets.from_logdensity(case.logdensity_fn, example)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            posterior = coin.SVGD().sample(jax.random.key(seed), target, progress=False)
        except NumericalError as error:
            cpu_seconds = time.process_time() - start
            return {
                "status": "refused",
                "why": str(error),
                "wrong": True,
                "shift": np.nan,
                "width": np.nan,
                "steps": 0,
                "seconds": cpu_seconds,
            }
    table = rows(posterior.unconstrained, 2)[0]
    shift = np.abs(table.mean(0) - case.draws.mean(0)) / case.draws.std(0)
    far = [np.mean(np.abs(x - x.mean(0)), axis=0) for x in (table, case.draws)]
    width = np.exp(np.max(np.abs(np.log(far[0] / far[1]))))
    wrong = bool(shift.max() > 0.3 or width > 1.4)
    return {
        "status": Status(int(posterior.info.status)).name,
        "wrong": wrong,
        "shift": float(shift.max()),
        "width": float(width),
        "steps": int(posterior.info.num_steps),
        "seconds": time.process_time() - start,
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--only", nargs="+", default=list(CASES))
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    seeds = 1 if arguments.small else SEEDS
    records, table = [], []
    for name in arguments.only:
        case = CASES[name]()
        runs = [measure(case, seed) for seed in range(seeds)]
        records += [{"target": name, "seed": seed, **run} for seed, run in enumerate(runs)]
        cells = [f"{run['status']}{' (wrong)' if run['wrong'] else ''}" for run in runs]
        table.append(
            [name, *(f"{max(run[k] for run in runs):.2f}" for k in ("shift", "width")), ", ".join(cells)]
        )
        print(" | ".join(table[-1]), flush=True)
        jax.clear_caches()
    missed = sum(run["wrong"] and run["status"] == "OK" for run in records)
    alarms = sum(not run["wrong"] and run["status"] == "POOR_APPROXIMATION" for run in records)
    wrong = sum(run["wrong"] for run in records)
    answer = (
        f"{missed} of {wrong} wrong clouds are called OK, {alarms} of {len(records) - wrong} right ones are called "
        "POOR_APPROXIMATION"
    )
    common.print_table(__doc__.splitlines()[0], ["target", "shift (sd)", "width (factor)", "status"], table)
    print(answer)
    if not arguments.small:
        common.write_results(
            NAME, {"question": __doc__.splitlines()[0], "answer": answer, "records": records}
        )


if __name__ == "__main__":
    main()
