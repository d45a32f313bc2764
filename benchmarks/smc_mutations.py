"""Which check detects which fault of a particle method? Faults planted in particles, resampling and references.

The library's own particle filter, particle Gibbs and tempered SMC, each with one wrapper around its resampling scheme,
model or path that does something wrong (``mutations/cloud_faults.py``). Each repetition draws new data sets and new
randomness; a cell is the share of repetitions in which the check says that something is wrong at level 0.05. The first
rows have no fault: there the share is the size of the check. A dash: the check does not take the method.

Models: a random walk of four steps observed with noise, normal or cut at 1.5 standard deviations, so that particles
die (its evidence by quadrature); for tempering the Gaussian model in five dimensions of ``mutations/models.py``.

Checks: *law of the scheme*: do the offspring of each of eight particles, two of them dead, weigh on average what it
weighed (1000 resamplings, Holm); *evidence*: at one simulated data set, t-tests of E[Zhat / Z] = 1 and, in reverse from
exact posterior draws, of E[Z / Zhat] = P(Zhat > 0), 1000 runs, Holm; *sandwich*: the same runs, do the bounds of
``checks.evidence_sandwich`` contradict each other, which needs no exact value; the ranks of 31 draws at 300 simulated
data sets (512 particles of the filter; 248 of tempered SMC, the last of every chain of eight); joint tests of particle
Gibbs with four particles, 300 lanes of 15 transitions (ancestor sampling is not reversible: by the ends of the chains
alone). For a fault of one side of an evidence the other is the library's own.

Required: no size whose 99 % interval (Clopper-Pearson, Bonferroni over the checks) lies above 0.05; each fault detected
by some check with the lower 95 % end of its power at least 0.90.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import common
import jax
from mutations.cloud_checks import CLOUD_CHECKS, groups_of, run_cloud_group
from mutations.cloud_faults import CLOUD_FAULTS, CLOUD_NULLS
from mutations.clouds import Cloud
from mutations.settings import CLOUDS, CLOUDS_SMALL, MutationSettings
from mutations.table import heat_map, judge, markdown

NAME = "smc_mutations"


def repetitions(group: str, cloud: Cloud, settings: MutationSettings) -> int:
    """Return the number of repetitions of a group of checks on a method."""
    if cloud not in CLOUD_NULLS:
        return settings.repetitions * (1 if cloud.reversible else 3)  # one test of two, a power nearer to 0.9
    return settings.other_null_repetitions if group == "ranks" else settings.null_repetitions


def count(group: str, cloud: Cloud, settings: MutationSettings) -> dict[str, tuple[int, int]]:
    """Return the numbers of rejections and of repetitions of each check of a group."""
    seed = jax.random.fold_in(jax.random.key(settings.seed), zlib.crc32(f"{cloud.name}/{group}".encode()))
    total = repetitions(group, cloud, settings)
    repetitions_done = [run_cloud_group(group, key, cloud, settings) for key in jax.random.split(seed, total)]
    return {
        check: (sum(repetition[check] for repetition in repetitions_done), total)
        for check in groups_of(cloud)[group]
    }


def row_of(cloud: Cloud, settings: MutationSettings, stored: Path | None) -> dict[str, tuple[int, int]]:
    """Return all cells of a method; those stored in its file are not computed again."""
    row = json.loads(stored.read_text()) if stored and stored.exists() else {}
    for group, names in groups_of(cloud).items():
        if not set(names) <= set(row):
            row.update(count(group, cloud, settings))
            if stored:
                stored.write_text(json.dumps(row))
    jax.clear_caches()
    print(cloud.name, {check: f"{a}/{n}" for check, (a, n) in row.items()}, flush=True)
    return row


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--keep", type=Path, help="folder of finished methods, with which a killed run continues"
    )
    parser.add_argument("--only", nargs="+", help="methods, by their names; writes nothing but to --keep")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    settings = CLOUDS_SMALL if arguments.small else CLOUDS
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    counts = {}
    for cloud in (*CLOUD_NULLS, *CLOUD_FAULTS):
        if not arguments.only or cloud.name in arguments.only:
            stored = arguments.keep and arguments.keep / f"{cloud.name}.json"
            counts[cloud.name] = row_of(cloud, settings, stored)
    if not arguments.only:
        show(counts, settings, write=not arguments.small)


def show(counts: dict, settings: MutationSettings, *, write: bool) -> None:
    """Print the table and the verdicts; write the numbers and the plot."""
    methods = (*CLOUD_NULLS, *CLOUD_FAULTS)
    names = [item.name for item in methods]
    cells = {name: {c: f"{100 * a / n:.0f}" for c, (a, n) in counts[name].items()} for name in names}
    rows = [[name, *(cells[name].get(check, "-") for check in CLOUD_CHECKS)] for name in names]
    common.print_table("rejected, per cent", ["", *CLOUD_CHECKS], rows)
    verdict = judge(counts, settings.level, CLOUD_NULLS, CLOUD_FAULTS, CLOUD_CHECKS)
    print(json.dumps(verdict, indent=1))
    if write:
        body = {
            "settings": settings._asdict(),
            "methods": {item.name: item.description for item in methods},
            "rejected, of": {name: counts[name] for name in names},
            "verdict": verdict,
            "markdown": markdown(counts, names, CLOUD_CHECKS).splitlines(),
        }
        common.write_results(NAME, body)
        fig, axes = common.figure(width=9, height=7)
        heat_map(axes, counts, names, CLOUD_CHECKS, (len(CLOUD_NULLS),))
        title = f"Rejected at level 0.05, per cent of repetitions (first {len(CLOUD_NULLS)} rows: no fault)"
        axes.set_title(title, fontsize=10)
        common.save_figure(fig, NAME)


if __name__ == "__main__":
    main()
