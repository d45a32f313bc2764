"""Tables, answers and the plot of ``coin_accuracy.py``."""

from __future__ import annotations

from typing import Any

import common
import numpy as np
from coin_energy import paired

__all__ = ["compared", "plot", "show"]

MEASURES = ("raw", "white")
SHARE = 0.1  # of Adam's distance that ours may be above it


def compared(record: dict[str, Any], adams: tuple[str, ...], ours: tuple[str, ...]) -> dict[str, Any]:
    """Add means, and the comparison of each of our rules at each number of steps in each measure."""
    distances = {method: np.asarray(values) for method, values in record["distances"].items()}
    record["means"] = {method: values.mean(axis=0) for method, values in distances.items()}
    record["intervals"] = {method: paired(values) for method, values in distances.items()}
    floor = np.asarray(record["floor"])
    best = np.stack([distances[a] for a in adams])  # (form, seed, step count, measure)
    best_rate = np.argmin(np.nan_to_num(best.mean(axis=1), nan=np.inf), axis=0)
    rival = np.take_along_axis(best, best_rate[None, None], axis=0)[0]
    record["Adam, better form"] = np.array(adams)[best_rate]
    record["against Adam"] = {}
    for method in ours:
        low, high = paired(distances[method] - rival)
        allowed = SHARE * rival.mean(axis=0) + floor
        record["against Adam"][method] = {
            "low": low,
            "high": high,
            "allowed": allowed,
            "met": high <= allowed,
        }
    return record


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """Return the arrays of a record, measured or read from a file."""
    return {
        "means": {k: np.asarray(v) for k, v in record["means"].items()},
        "floor": np.asarray(record["floor"]),
        "answers": {m: {k: np.asarray(v) for k, v in a.items()} for m, a in record["against Adam"].items()},
    }


def table(records: list[dict[str, Any]], steps: tuple[int, ...], step: int, measure: int) -> None:
    """Print the table of one number of steps and one measure."""
    methods = [m for m in records[0]["means"] if all(m in r["means"] for r in records)]
    lines = []
    for record in records:
        error = plain(record)
        values = [error["means"][m][step, measure] for m in methods]
        answers = error["answers"]["default"]
        met = "yes" if answers["met"][step, measure] else "no"
        gap = f"{answers['low'][step, measure]:+.2g} ... {answers['high'][step, measure]:+.2g}"
        name = record["target"] + ("" if record["chosen"] else " *")
        lines.append([name, f"{error['floor'][measure]:.3g}", *[f"{v:.3g}" for v in values], gap, met])
    title = f"energy distance, {MEASURES[measure]}, after {steps[step]} steps (* held out)"
    common.print_table(title, ["target", "i.i.d.", *methods, "default - best Adam", "met"], lines)


def show(records: list[dict[str, Any]], steps: tuple[int, ...]) -> None:
    """Print all tables, and how often our rules are at least as good."""
    if not records:
        return
    for step in range(len(steps)):
        for measure in range(len(MEASURES)):
            table(records, steps, step, measure)
    for method in records[0]["against Adam"]:
        for step, count in enumerate(steps):
            met = np.array([plain(r)["answers"][method]["met"][step] for r in records])
            sentence = ", ".join(
                f"{m} {n} of {len(records)}" for m, n in zip(MEASURES, met.sum(axis=0), strict=True)
            )
            failed = [r["target"] for r, both in zip(records, met, strict=True) if not both.all()]
            print(f"{method}, {count} steps: {sentence}" + (f"; not {', '.join(failed)}" if failed else ""))
    cpu_seconds = sum(sum(record["seconds"].values()) for record in records)
    print(f"CPU: {cpu_seconds / 60:.1f} minutes, compilation included")


def plot(records: list[dict[str, Any]], name: str) -> None:
    """Plot the distances at the last number of steps, relative to the better Adam."""
    figure, axes = common.figure(width=11, height=0.33 * len(records) + 1.6, columns=2)
    labels = [r["target"] + ("" if r["chosen"] else " *") for r in records]
    styles = {"default": "o", "published": "s", "published, med": "D", "raw fuse": "^"}
    for measure, (axis, measure_name) in enumerate(zip(axes, MEASURES, strict=True)):
        rivals, floors = [], []
        for record in records:
            error = plain(record)
            rivals.append(min(error["means"][m][-1, measure] for m in error["means"] if m.startswith("Adam")))
            floors.append(error["floor"][measure])
        rivals = np.maximum(np.array(rivals), 1e-6)
        for number, (method, style) in enumerate(styles.items()):
            values = np.array([plain(r)["means"][method][-1, measure] for r in records])
            values = np.maximum(values, 1e-6)
            axis.plot(values / rivals, np.arange(len(records)), style, color=f"C{number}", label=method, ms=4)
        axis.plot(
            np.array(floors) / rivals, np.arange(len(records)), "|", color="black", label="i.i.d. draws", ms=9
        )
        axis.axvline(1, color="gray", linewidth=0.8)
        axis.set(xscale="log", xlabel=f"energy distance, {measure_name}, over that of Adam at its best rate")
        axis.set_yticks(np.arange(len(records)), labels if measure == 0 else [""] * len(labels), fontsize=8)
        axis.invert_yaxis()
    axes[0].legend(frameon=False, fontsize=7)
    common.save_figure(figure, name)
