"""How far from the evidence of a classifier are Laplace, VI, the hybrid and EP, and where are their maxima?

Question: hyperparameters are learned where the approximate log evidence is largest. Figure 1 of Li, John and Solin
(2023) shows its surface for ionosphere by eye; here each method is compared with annealed importance sampling (AIS)
with intervals.

Protocol: as theirs (isotropic Matern-5/2, probit, 80 % of ionosphere with the row number, log lengthscale and log
magnitude sigma in [-1, 5], 21 x 21 points; variance = sigma²), fold 0 of ``li2023.py``. Laplace, EP and VI start from
no sites at every point (VI with 64 quadrature nodes and at most 100 updates); the hybrid is EP's energy at VI's
sites. AIS (``tests/reference/ais.py``) at every second point of both axes and at each method's maximum: it starts from
EP's Gaussian, which changes its variance and not its expectation, 48 runs (96 at the maxima), as many temperatures as a
pilot run asks for, up to 1500 (6000); 95 % intervals by the delta method. A point is trusted where the effective number
of runs is a quarter of all or more. The published AIS starts from the prior (3 runs of 8000 temperatures).

Checks of AIS: twice the temperatures; another Gaussian to start from, VI's at VI's maximum and half of EP's sites at
EP's; and the published way, from the prior.
Explanation of EP's error: the third and fourth cumulants of the tilted densities, which EP leaves out
(``tests/reference/ep_correction.py``).

Criterion: the maxima, each method minus AIS there and over the grid, and whether EP is inside the interval at its
maximum; where it is not, whether EP with the correction is.

References:
    Li, John and Solin (2023), Improving Hyperparameter Learning under Approximate Inference in Gaussian Process Models;
    Neal (2001); Murray, Adams and MacKay (2010); Opper, Paquet and Winther (2013).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the reference implementations are part of the tests

import common
import jax
import jax.numpy as jnp
import numpy as np
from evidence_surface_plot import place, plot
from li2023 import Fold, folds, start_model
from scipy import special

from probinfer import gp
from probinfer.core.status import Status
from probinfer.gp.approximation.objectives import Objective, energy
from tests.reference import ais
from tests.reference.ep_correction import ep_correction

INFERENCE = {"Laplace": gp.Laplace(), "VI": gp.VI(num_nodes=64, max_updates=100), "EP": gp.EP()}
METHODS = ("Laplace", "VI", "Hybrid", "EP")
LOW, HIGH, NUM, STRIDE = -1.0, 5.0, 21, 2
RUNS, MAX_STEPS = 48, 1500
RUNS_AT_MAXIMA, MAX_STEPS_AT_MAXIMA = 96, 6000
PILOT_STEPS, PILOT_RUNS, WANTED_VARIANCE = 200, 16, 0.2  # of log w: a half-width of about 0.13 nats
TRUSTED = 0.25  # of the runs must be effective


@jax.jit
def surface(inference, X, y, points):
    """Log evidence, EP's energy at the same sites, status, updates and sites at each (log lengthscale, log sigma)."""

    def one(point):
        model = model_at(point)
        condition_result = inference.condition(model, X, y)
        sites = jnp.stack([condition_result.sites.lam1, condition_result.sites.lam2])
        crossed = energy(Objective(1.0, 32), model, X, y, sites)
        return (
            condition_result.log_evidence,
            crossed,
            condition_result.status,
            condition_result.num_iterations,
            sites,
        )

    return jax.lax.map(one, points)


def model_at(point):
    kernel = gp.kernels.Matern52(jnp.exp(2 * point[1]), jnp.exp(point[0]))
    return gp.Model(kernel, start_model().likelihood)


def evaluate(fold: Fold, points: np.ndarray) -> dict[str, dict]:
    """Evaluate all methods at all points."""
    surfaces = {}
    for name, inference in INFERENCE.items():
        start = time.process_time()
        data = jnp.asarray(fold.X), jnp.asarray(fold.y), jnp.asarray(points)
        parts = [np.asarray(part) for part in surface(inference, *data)]
        keys = ("log evidence", "energy", "status", "updates", "sites")
        surfaces[name] = dict(zip(keys, parts, strict=True)) | {"seconds": time.process_time() - start}
        print(f"{name}: {surfaces[name]['seconds']:.0f} CPU s", flush=True)
    surfaces["Hybrid"] = surfaces["VI"] | {"log evidence": surfaces["VI"]["energy"], "seconds": 0.0}
    return surfaces


def gram(X: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Matern-5/2 in NumPy."""
    squared = np.sum((X[:, None] - X[None]) ** 2, -1)
    r = np.sqrt(5 * squared) / np.exp(point[0])
    return np.exp(2 * point[1]) * (1 + r + r**2 / 3) * np.exp(-r)


class Reference:
    """AIS and EP's correction on one fold."""

    def __init__(self, fold: Fold):
        self.X, self.sign, self.zero = fold.X, 2 * fold.y - 1, np.zeros(len(fold.y))

    def log_density(self, f):
        """Log p(y | f) of each latent value."""
        return special.log_ndtr(self.sign * f)

    def estimate(self, seed, point, sites, runs, max_steps, factor=1) -> dict:
        """AIS from the Gaussian with these sites; ``factor`` times the temperatures that a pilot run asks for."""
        rng, K = np.random.default_rng([20261121, *seed]), gram(self.X, point)
        sites = sites[0], np.maximum(sites[1], 0)

        def run(steps, runs):
            ladder = ais.power_ladder(steps)
            return ais.annealed(rng, K, self.zero, self.log_density, ladder, runs, sites)[0]

        pilot = run(PILOT_STEPS, PILOT_RUNS).var(ddof=1)
        steps = factor * int(np.clip(PILOT_STEPS * pilot / WANTED_VARIANCE, PILOT_STEPS, max_steps))
        return self._result(point, run(steps, runs), steps)

    def from_prior(self, seed, point, runs, steps) -> dict:
        """AIS as published: from the prior."""
        rng, K = np.random.default_rng([20261121, *seed]), gram(self.X, point)
        ladder = ais.power_ladder(steps, 4.0)
        weights, _ = ais.annealed(rng, K, self.zero, self.log_density, ladder, runs)
        return self._result(point, weights, steps)

    def correction(self, point, sites) -> float:
        """Return the correction of EP, to second order in the third and fourth cumulants."""

        def log_density(i, f):
            return special.log_ndtr(self.sign[i] * f)

        return sum(ep_correction(gram(self.X, point), self.zero, log_density, *sites))

    def _result(self, point, weights, steps):
        summary_of_runs = ais.summarize(weights)
        return summary_of_runs._asdict() | {
            "point": np.asarray(point).tolist(),
            "steps": steps,
            "runs": len(weights),
            "trusted": summary_of_runs.ess >= TRUSTED * len(weights),
        }


def sample_grid(reference, surfaces, points, chosen, small) -> list[dict]:
    """Run AIS and the correction at the chosen points."""
    records = []
    for index in chosen:
        sites = surfaces["EP"]["sites"][index]
        row = reference.estimate((0, index), points[index], sites, RUNS, 200 if small else MAX_STEPS)
        row |= {"index": int(index), "correction": reference.correction(points[index], sites)}
        records.append(row)
    return records


def sample_maxima(reference, surfaces, points, maxima_index, small) -> dict[str, dict]:
    """AIS with more runs at each maximum, checks of it at some, and EP's correction, by number of the point."""
    max_steps, prior_steps = (200, 200) if small else (MAX_STEPS_AT_MAXIMA, 8000)
    records: dict[str, dict] = {}
    for index in dict.fromkeys(maxima_index.values()):
        sites, point = surfaces["EP"]["sites"][index], points[index]
        row = reference.estimate((1, index), point, sites, RUNS_AT_MAXIMA, max_steps)
        records[str(index)] = row | {
            "index": int(index),
            "correction": reference.correction(point, sites),
            "checks": {},
        }

    def again(name, number, sites, factor=1):
        index = maxima_index[name]
        return reference.estimate((number, index), points[index], sites, RUNS, max_steps, factor)

    ep, vi = (surfaces[name]["sites"][maxima_index[name]] for name in ("EP", "VI"))
    records[str(maxima_index["EP"])]["checks"] = {
        "twice the temperatures": again("EP", 2, ep, 2),
        "from half of EP's sites": again("EP", 3, ep / 2),
        "from the prior": reference.from_prior(
            (4, maxima_index["EP"]), points[maxima_index["EP"]], 16, prior_steps
        ),
    }
    records[str(maxima_index["VI"])]["checks"] |= {"from VI's Gaussian": again("VI", 5, vi, 2)}
    return records


def gaps(surfaces, name, rows):
    """Return the differences of a method from AIS, and the half-widths, for rows of AIS."""
    values = np.array([surfaces[name.split(" +")[0]]["log evidence"][row["index"]] for row in rows])
    if name.endswith("correction"):
        values = values + np.array([row["correction"] for row in rows])
    return values - [row["log_evidence"] for row in rows], np.array([row["half_width"] for row in rows])


def summary(surfaces, name, rows) -> dict:
    """Over the trusted points of the grid where the method converged."""
    status = surfaces[name.split(" +")[0]]["status"]
    used = [row for row in rows if row["trusted"] and status[row["index"]] == Status.OK]
    if not used:
        return {"points": 0}
    gap, half = gaps(surfaces, name, used)
    ratio = np.abs(gap) / half
    return {
        "points": len(used),
        "median gap": float(np.median(gap)),
        "median |gap|": float(np.median(np.abs(gap))),
        "max |gap|": float(np.abs(gap).max()),
        "at": used[int(np.abs(gap).argmax())]["point"],
        "median |gap| in half-widths": float(np.median(ratio)),
        "max |gap| in half-widths": float(ratio.max()),
        "inside the interval": float(np.mean(ratio <= 1)),
    }


NAMES = (*METHODS, "EP + correction")


def report(surfaces, points, maxima_index, rows, maxima) -> dict:
    """Print the tables; return the conclusions."""
    at_maximum = {key: maxima[str(maxima_index[key])] for key in ("EP", "AIS")}
    header = ["", "maximum", "at (log l, log sigma)", "minus AIS at EP's max", "at AIS's max"]
    header += ["median gap", "median |gap|", "largest |gap|", "median/half-width", "inside", "points"]
    header += [f"not converged, of {len(points)}", "CPU s"]
    table, summaries = [], {}
    for name in NAMES:
        base = name.split(" +")[0]
        total = summaries[name] = summary(surfaces, name, rows)
        bad = int(np.sum(surfaces[base]["status"] != Status.OK))
        best = maxima_index[base]
        differences = []
        for row in at_maximum.values():
            gap, half = gaps(surfaces, name, [row])
            failed = surfaces[base]["status"][row["index"]] != Status.OK
            differences.append(f"{gap[0]:+.2f} ± {half[0]:.2f}{' (not converged)' if failed else ''}")
        is_base = name == base
        table.append(
            [
                name,
                f"{surfaces[base]['log evidence'][best]:.2f}" if is_base else "",
                place(points[best]) if is_base else "",
                *differences,
                *(
                    f"{total[key]:.2f}"
                    for key in (
                        "median gap",
                        "median |gap|",
                        "max |gap|",
                        "median |gap| in half-widths",
                        "inside the interval",
                    )
                    if key in total
                ),
                str(total["points"]),
                str(bad) if is_base else "",
                f"{surfaces[base]['seconds']:.0f}" if is_base else "",
            ]
        )
    common.print_table("log evidence in nats; gaps are method minus AIS where AIS is trusted", header, table)
    header = ["", "at", "log evidence", "half-width", "effective of runs", "temperatures"]
    lines = [line(f"AIS at the maximum of {key}", maxima[str(index)]) for key, index in maxima_index.items()]
    for index in dict.fromkeys(maxima_index.values()):
        checks = maxima[str(index)]["checks"]
        lines += [line(f"  again there: {check}", row) for check, row in checks.items()]
    common.print_table("AIS and its checks", header, lines)
    return summaries


def line(name, row):
    numbers = f"{row['log_evidence']:.2f}", f"{row['half_width']:.2f}"
    return [name, place(row["point"]), *numbers, f"{row['ess']:.1f} of {row['runs']}", str(row["steps"])]


def pooled(row) -> tuple[float, float]:
    """Pool a row and its checks, which are independent runs, into one estimate and half-width, if trusted."""
    used = [row, *(check for check in row["checks"].values() if check["trusted"])]
    precision = np.array([1 / run["half_width"] ** 2 for run in used])
    value = precision @ [run["log_evidence"] for run in used] / precision.sum()
    return float(value), float(1 / np.sqrt(precision.sum()))


def outside(gap, half) -> str:
    return "inside the interval" if abs(gap) <= half else f"{abs(gap) - half:.2f} nats outside the interval"


def verdict(surfaces, points, maxima_index, rows, maxima) -> str:
    """Return whether EP lies inside the interval of AIS, why not, and where AIS is not trusted."""
    row = maxima[str(maxima_index["EP"])]
    value, half = pooled(row)
    gap = surfaces["EP"]["log evidence"][maxima_index["EP"]] - value
    rest = gap + row["correction"]
    sentences = (
        f"At EP's maximum {place(row['point'])} all trusted runs of AIS give {value:.2f} ± {half:.2f}. "
    )
    sentences += (
        f"EP is {gap:+.2f} from it, {outside(gap, half)}; the third and fourth cumulants that EP leaves out "
    )
    sentences += (
        f"give {row['correction']:+.2f}, and EP with them is {rest:+.2f} from AIS, {outside(rest, half)}. "
    )
    ridge = surfaces["EP"]["log evidence"].reshape(int(np.sqrt(len(points))), -1).max(1)
    first = points[:: len(ridge), 1][np.argmax(ridge > ridge.max() - 0.5)]
    sentences += f"EP's ridge is within 0.5 nats of its maximum from log sigma = {first:.1f} on. "
    doubtful = [r for r in rows if not r["trusted"]]
    sentences += f"AIS is not trusted at {len(doubtful)} of {len(rows)} points"
    if doubtful:
        low = min(r["point"][1] for r in doubtful)
        far = max(r["point"][0] for r in doubtful)
        sentences += (
            f", all with log sigma >= {low:.1f} and log l <= {far:.1f}: there the likelihood is a step, the posterior "
            "the corner of an orthant, and the sampler's ellipses leave it everywhere but near their start"
        )
    return sentences + "."


def main() -> None:
    small = common.parser(__doc__).parse_args().small
    fold = folds("ionosphere")[0]
    num, stride = (NUM, STRIDE) if not small else (5, 2)
    if small:
        fold = Fold(fold.X[:60], fold.y[:60], fold.X_test, fold.y_test)
    ticks = np.linspace(LOW, HIGH, num)
    points = np.array([(lengthscale, sigma) for sigma in ticks for lengthscale in ticks])
    found = evaluate(fold, points)
    chosen = [i * num + j for i in range(0, num, stride) for j in range(0, num, stride)]
    reference, start = Reference(fold), time.process_time()
    rows = sample_grid(reference, found, points, chosen, small)
    print(f"AIS on the grid: {time.process_time() - start:.0f} CPU s", flush=True)
    maxima_index = {name: int(np.argmax(found[name]["log evidence"])) for name in METHODS}
    maxima_index["AIS"] = max((r for r in rows if r["trusted"]), key=lambda r: r["log_evidence"])["index"]
    maxima = sample_maxima(reference, found, points, maxima_index, small)
    summaries = report(found, points, maxima_index, rows, maxima)
    conclusion = verdict(found, points, maxima_index, rows, maxima)
    print(conclusion)
    if small:
        return
    surfaces = {
        name: {key: part[key] for key in ("log evidence", "status", "updates", "seconds")}
        for name, part in found.items()
    }
    settings = {"points": points, "runs": RUNS, "runs at maxima": RUNS_AT_MAXIMA, "trusted": TRUSTED}
    body: dict = {"settings": settings, "verdict": conclusion, "summary": summaries, "maxima": maxima_index}
    body |= {"at the maxima": maxima, "AIS": rows, "surfaces": surfaces}
    common.write_results("gp_evidence_surface", body)
    plot(found, {name: gaps(found, name, rows)[0] for name in NAMES}, rows, points, maxima_index)


if __name__ == "__main__":
    main()
