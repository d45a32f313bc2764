"""Which check detects which fault? Planted faults of posteriors and transitions against every check of the library.

Each repetition draws new data sets and new draws; a cell is the share of repetitions in which the check says that
something is wrong at level 0.05. The first rows have no fault: there the share is the size of the check. Sizes and
seeds stand in ``mutations/settings.py``, one for all faults; the faults are in ``mutations/faults.py``.

Models: a Gaussian with a correlated posterior in five dimensions, two rates of Poisson counts on the log scale, ten
latent values of a Gaussian process under a probit likelihood. Rank checks see 300 data sets with 63 draws each;
discrepancies 200 draws at one data set (KSD and the Stein identity beside the density, the others beside 200 exact
draws); joint tests 300 lanes of 15 transitions, where a sampler without a chain is a transition that ignores its state.

Required: no size whose 99 % interval (Clopper-Pearson, Bonferroni over the checks) lies above 0.05; each fault detected
by some check with the lower 95 % end of its power at least 0.90.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import common
import jax
from mutations.checks import CHECKS, GROUPS, run_group
from mutations.faults import APPROXIMATIONS, FAULTS, NULLS, Procedure
from mutations.settings import FULL, SMALL, MutationSettings
from mutations.table import heat_map, judge, markdown


def repetitions(group: str, procedure: Procedure, settings: MutationSettings) -> int:
    """Return the number of repetitions of a group of checks on a procedure."""
    if procedure not in NULLS:
        return settings.slow_repetitions if group == "classifier" else settings.repetitions
    if procedure is not NULLS[0]:
        return settings.other_null_repetitions
    if group == "ranks":
        return settings.null_repetitions
    return settings.null_repetitions // 2 if group == "joint" else settings.slow_null_repetitions


def count(group: str, procedure: Procedure, settings: MutationSettings) -> dict[str, tuple[int, int]]:
    """Return the numbers of rejections and of repetitions of each check of a group."""
    seed = jax.random.fold_in(jax.random.key(settings.seed), zlib.crc32(f"{procedure.name}/{group}".encode()))
    total = repetitions(group, procedure, settings)
    repetitions_done = [run_group(group, key, procedure, settings) for key in jax.random.split(seed, total)]
    return {
        check: (sum(repetition[check] for repetition in repetitions_done), total) for check in GROUPS[group]
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--quick", dest="small", action="store_true", help="the same as --small")
    parser.add_argument("--keep", type=Path, help="file of finished cells, with which a killed run continues")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    settings = SMALL if arguments.small else FULL
    stored = json.loads(arguments.keep.read_text()) if arguments.keep and arguments.keep.exists() else {}
    for procedure in (*NULLS, *APPROXIMATIONS, *FAULTS):
        row = stored.setdefault(procedure.name, {})
        for group, names in GROUPS.items():
            if not set(names) <= set(row):
                row.update(count(group, procedure, settings))
                if arguments.keep:
                    arguments.keep.write_text(json.dumps(stored))
        print(procedure.name, {check: f"{a}/{n}" for check, (a, n) in row.items()}, flush=True)
    show(stored, settings, write=not arguments.small)


def show(counts: dict, settings: MutationSettings, *, write: bool) -> None:
    """Print the table and the verdicts; write the numbers and the plot."""
    rows = [[name, *(f"{100 * row[c][0] / row[c][1]:.0f}" for c in CHECKS)] for name, row in counts.items()]
    common.print_table("rejected, per cent", ["", *CHECKS], rows)
    verdict = judge(counts, settings.level)
    print(json.dumps(verdict, indent=1))
    if write:
        descriptions = {
            procedure.name: procedure.description for procedure in (*NULLS, *APPROXIMATIONS, *FAULTS)
        }
        common.write_results(
            "check_mutations",
            {
                "settings": settings._asdict(),
                "procedures": descriptions,
                "rejected, of": counts,
                "verdict": verdict,
                "markdown": markdown(counts).splitlines(),
            },
            packages=("flax",),
        )
        fig, axes = common.figure(width=10, height=7)
        heat_map(axes, counts)
        axes.set_title(
            "Rejected at level 0.05, per cent of repetitions (first three rows: no fault)", fontsize=10
        )
        common.save_figure(fig, "check_mutations")


if __name__ == "__main__":
    main()
