"""Do the simultaneous bands of ranks have their nominal coverage, and are the p-values valid?

Uniform ranks among L draws, S = 100 and 1000 simulations, 20 000 repetitions each: how often does the whole empirical
distribution function stay within the 95 % band, against the probability that the dynamic programme computed
for it (at least 0.95; counts are whole numbers, so it may be more), and how often is the p-value at most 0.05. Exact
(Clopper-Pearson) 99.9 % intervals. Beside it, what a band of pointwise 95 % intervals does, which is what a
plot with "the 95 % interval" usually shows.

Required: simultaneous coverage of 95 % up to Monte Carlo error at S = 100 and 1000.
"""

from __future__ import annotations

import common
import numpy as np
from scipy import stats

from probinfer import checks

REPETITIONS = 20_000
CASES = [(100, 19), (100, 99), (1000, 19), (1000, 99), (1000, 999)]


def interval(hits: int, total: int) -> list[float]:
    """Clopper-Pearson, 99.9 %."""
    ends = stats.binomtest(int(hits), total).proportion_ci(0.999, method="exact")
    return [float(ends.low), float(ends.high)]


def coverage(rng, simulations: int, draws: int, repetitions: int) -> dict:
    """Return how often a sample of uniform ranks stays within its band."""
    band = checks.ecdf_band(simulations, draws + 1)
    shares = band.edges / (draws + 1)
    pointwise = stats.binom.interval(0.95, simulations, shares)
    inside = pointwise_inside = small = 0
    for number in range(repetitions):
        ranks = np.sort(rng.integers(draws + 1, size=simulations))
        counts = np.searchsorted(ranks, band.edges)
        stays = np.all(
            (counts >= band.lower * simulations - 1e-9) & (counts <= band.upper * simulations + 1e-9)
        )
        inside += stays
        pointwise_inside += np.all((counts >= pointwise[0]) & (counts <= pointwise[1]))
        if number < repetitions // 10:
            small += (checks.ecdf_pvalue(ranks, draws + 1) <= 0.05) == stays
    return {
        "simulations": simulations,
        "draws": draws,
        "inside": inside / repetitions,
        "interval": interval(inside, repetitions),
        "computed": band.coverage,
        "pointwise bands": pointwise_inside / repetitions,
        "p-values that contradict the band": int(small),
    }


def main() -> None:
    """Print the table."""
    arguments = common.parser(__doc__).parse_args()
    rng = np.random.default_rng(20261121)
    repetitions = 200 if arguments.small else REPETITIONS
    cases = CASES[:2] if arguments.small else CASES
    measured = [coverage(rng, simulations, draws, repetitions) for simulations, draws in cases]
    rows = [
        [
            f"{row['simulations']} x {row['draws']}",
            f"{row['inside']:.4f}",
            "{:.4f} - {:.4f}".format(*row["interval"]),
            f"{row['computed']:.4f}",
            f"{row['pointwise bands']:.3f}",
            str(row["p-values that contradict the band"]),
        ]
        for row in measured
    ]
    header = ["simulations x draws", "inside", "99.9 %", "computed", "pointwise bands", "contradictions"]
    common.print_table(f"Simultaneous 95 % bands, {repetitions} repetitions", header, rows)
    met = all(row["interval"][0] <= row["computed"] <= row["interval"][1] for row in measured)
    met = met and all(row["computed"] >= 0.95 - 1e-12 for row in measured)
    print(f"asked, 95 % up to Monte Carlo error: {'met' if met else 'missed'}")
    if not arguments.small:
        common.write_results("rank_bands", {"repetitions": repetitions, "cases": measured})


if __name__ == "__main__":
    main()
