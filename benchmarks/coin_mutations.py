"""Which check detects which fault of a coin sampler? Faults in its direction, metric, density and length.

The library's own SVGD at its defaults, 150 steps from draws of the prior, with one wrapper that does something wrong
(``mutations/coin_faults.py``). Each repetition draws new data sets and new starts; a cell is the share of repetitions
in which the check says that something is wrong at level 0.05. The first rows have no fault: particles are not
independent draws (they repel each other) and end with somewhat too small variances, so some checks reject them.

Rank checks see 100 data sets with 63 particles each; discrepancies 200 particles at one data set (KSD and the Stein
identity beside the density, the others beside 200 exact draws). C2ST and joint tests are left out: the first is slow,
and particles that do not depend on a previous state are no Markov chain.

Required: each fault detected by some check with the lower 95 % end of its power at least 0.90, where only checks count
that do not reject the clouds without a fault.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import common
import jax
from mutations.checks import GROUPS, run_group
from mutations.coin_faults import COIN_FAULTS, COIN_NULLS
from mutations.faults import Procedure
from mutations.settings import COINS, COINS_SMALL, MutationSettings
from mutations.table import heat_map, judge, markdown, sizes_above

NAME = "coin_mutations"
USED = ("ranks", "distances")
CHECKS = tuple(name for group in USED for name in GROUPS[group])


def count(group: str, procedure: Procedure, settings: MutationSettings) -> dict[str, tuple[int, int]]:
    """Return the numbers of rejections and of repetitions of each check of a group."""
    seed = jax.random.fold_in(jax.random.key(settings.seed), zlib.crc32(f"{procedure.name}/{group}".encode()))
    total = settings.null_repetitions if procedure in COIN_NULLS else settings.repetitions
    repetitions_done = [run_group(group, key, procedure, settings) for key in jax.random.split(seed, total)]
    return {
        check: (sum(repetition[check] for repetition in repetitions_done), total) for check in GROUPS[group]
    }


def row_of(
    procedure: Procedure, settings: MutationSettings, stored: Path | None
) -> dict[str, tuple[int, int]]:
    """Return all cells of a procedure; those stored in its file are not computed again."""
    row = json.loads(stored.read_text()) if stored and stored.exists() else {}
    for group in USED:
        if not set(GROUPS[group]) <= set(row):
            row.update(count(group, procedure, settings))
            if stored:
                stored.write_text(json.dumps(row))
    jax.clear_caches()
    print(procedure.name, {check: f"{a}/{n}" for check, (a, n) in row.items()}, flush=True)
    return row


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--keep", type=Path, help="folder of finished rows, with which a killed run continues"
    )
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    settings = COINS_SMALL if arguments.small else COINS
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    counts = {}
    for procedure in (*COIN_NULLS, *COIN_FAULTS):
        stored = arguments.keep and arguments.keep / f"{procedure.name}.json"
        counts[procedure.name] = row_of(procedure, settings, stored)
    show(counts, settings, write=not arguments.small)


def show(counts: dict, settings: MutationSettings, *, write: bool) -> None:
    """Print the table and the verdicts; write the numbers and the plot."""
    procedures = (*COIN_NULLS, *COIN_FAULTS)
    names = [item.name for item in procedures]
    rows = [
        [name, *(f"{100 * counts[name][c][0] / counts[name][c][1]:.0f}" for c in CHECKS)] for name in names
    ]
    common.print_table("rejected, per cent", ["", *CHECKS], rows)
    accused = sizes_above(counts, settings.level, COIN_NULLS, CHECKS)  # they reject clouds without a fault
    trusted = [check for check in CHECKS if not any(item.startswith(f"{check} (") for item in accused)]
    rows_of_trusted = {name: {check: row[check] for check in trusted} for name, row in counts.items()}
    verdict = judge(rows_of_trusted, settings.level, (), COIN_FAULTS, trusted)
    verdict["reject clouds without a fault"] = accused
    print(json.dumps(verdict, indent=1))
    if write:
        body = {
            "settings": settings._asdict(),
            "procedures": {item.name: item.description for item in procedures},
            "rejected, of": counts,
            "verdict": verdict,
            "markdown": markdown(counts, names, CHECKS).splitlines(),
        }
        common.write_results(NAME, body)
        fig, axes = common.figure(width=9, height=6)
        heat_map(axes, counts, names, CHECKS, (len(COIN_NULLS),))
        title = f"Rejected at level 0.05, per cent of repetitions (first {len(COIN_NULLS)} rows: no fault)"
        axes.set_title(title, fontsize=10)
        common.save_figure(fig, NAME)


if __name__ == "__main__":
    main()
