"""Tables and plot of lm_scaling: intervals by paired bootstrap, budgets at equal accuracy."""

from __future__ import annotations

import common
import numpy as np

CHIEF = "particle filter"
SEARCHES = ("beam search", "DVTS")  # by their best text, and by a vote of the texts weighted by their scores
DRAWS = 2000


def gather(results: dict, ladder, seeds: int) -> dict:
    """Curves, differences to the filter, ratios of budgets, and the table of all methods at one N."""
    cells: dict = {}
    for seed in range(seeds):
        for n, methods in results[f"pool-{seed}"]["rows"].items():
            for name, rows in methods.items():
                cells.setdefault((name, int(n)), []).append(rows)
        for key, result in results.items():
            name, *rest = key.rsplit("-", 2)
            if len(rest) == 2 and rest[1] == str(seed) and not key.startswith(("pool", "all-")):
                cells.setdefault((name, int(rest[0])), []).append(result["rows"])
                if name in SEARCHES:
                    voted = [row | {"right": row["vote"], "score": np.nan} for row in result["rows"]]
                    cells.setdefault((f"{name}, vote", int(rest[0])), []).append(voted)
    names = sorted({name for name, _ in cells})
    weights = np.random.default_rng(0).multinomial(
        (num := len(cells[CHIEF, ladder[0]][0])), np.full(num, 1 / num), size=DRAWS
    )
    right = {
        cell: np.mean([[row["right"] for row in rows] for rows in result], axis=0)
        for cell, result in cells.items()
    }
    boot = {cell: weights @ values / num for cell, values in right.items()}
    curves = []
    for (name, n), values in sorted(right.items(), key=lambda item: (item[0][0], item[0][1])):
        rows = [row for one in cells[name, n] for row in one]
        entry = {
            "method": name,
            "N": n,
            "accuracy": float(values.mean()),
            "interval": _interval(boot[name, n]),
        }
        entry |= {
            key: float(np.mean([row[key] for row in rows])) for key in ("samples", "tokens", "calls", "score")
        }
        if "top" in rows[0]:
            entry["accuracy of the best score"] = float(np.mean([row["top"] for row in rows]))
        if (CHIEF, n) in boot and name != CHIEF:
            entry["filter less this"] = float(right[CHIEF, n].mean() - values.mean())
            entry["its interval"] = _interval(boot[CHIEF, n] - boot[name, n])
        curves.append(entry)
    ratios = [_ratio(name, ladder, right, boot) for name in names if name != CHIEF]
    seconds = sum(result["seconds"] for result in results.values())
    return {"curves": curves, "ratios": ratios, "all at one N": _table(results), "CPU seconds": seconds}


def _interval(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.percentile(values, [2.5, 97.5], method="nearest")]


def _budget(level: np.ndarray, ladder, curve: np.ndarray) -> np.ndarray:
    """The N at which the filter has an accuracy, on a line in log N; the curve made monotone. Infinite if nowhere."""
    curve = np.maximum.accumulate(curve, axis=-1)
    logs = np.log(ladder)
    budgets = np.full(level.shape, np.inf)
    for i, (value, row) in enumerate(zip(level, curve, strict=True)):
        if value <= row[0]:
            budgets[i] = ladder[0]
        elif value <= row[-1]:
            j = int(np.searchsorted(row, value))
            share = (value - row[j - 1]) / (row[j] - row[j - 1])
            budgets[i] = np.exp(logs[j - 1] + share * (logs[j] - logs[j - 1]))
    return budgets


def _ratio(name: str, ladder, right: dict, boot: dict) -> dict:
    """Budgets at equal accuracy, over that of the filter; the least N on the ladder, on a line in log N.

    At the best accuracy that the method has, and at those that the filter has with 4 and with 16 texts. Infinite where
    the method does not come so far.
    """
    sizes = [n for n in ladder if (name, n) in right]
    curves = {
        "other": np.stack([boot[name, n] for n in sizes], axis=1),
        "chief": np.stack([boot[CHIEF, n] for n in ladder], axis=1),
    }
    points = {
        "other": np.array([[right[name, n].mean() for n in sizes]]),
        "chief": np.array([[right[CHIEF, n].mean() for n in ladder]]),
    }

    def ratio(accuracies: dict, level: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return _budget(level, sizes, accuracies["other"]) / _budget(level, ladder, accuracies["chief"])

    best = points["other"].max(axis=1)
    entry = {
        "method": name,
        "at accuracy": float(best[0]),
        "budget ratio": float(ratio(points, best)[0]),
        "interval": _interval(ratio(curves, curves["other"].max(axis=1))),
    }
    for n in (4, 16):
        if n in ladder:
            column = ladder.index(n)
            draws = _budget(curves["chief"][:, column], sizes, curves["other"]) / n
            point = _budget(points["chief"][:, column], sizes, points["other"]) / n
            entry[f"for the filter at {n}"] = float(point[0])
            entry[f"interval at {n}"] = _interval(draws)
    return entry


def finite(found):
    """The results with None for what is infinite, as JSON has no word for it."""
    if isinstance(found, dict):
        return {key: finite(value) for key, value in found.items()}
    if isinstance(found, list):
        return [finite(value) for value in found]
    return None if isinstance(found, float) and not np.isfinite(found) else found


def _table(results: dict) -> list[dict]:
    """Return the results of each method at one N, with each reward."""
    rows_found = []
    for key, part in results.items():
        if not key.startswith("all-"):
            continue
        _, label, name = key.split("-", 2)
        groups = {name: part["rows"]}
        if name == "pool":
            groups = {method: rows for methods in part["rows"].values() for method, rows in methods.items()}
        for method, rows in groups.items():
            right = np.array([row["right"] for row in rows], float)
            draws = np.random.default_rng(0).multinomial(
                len(right), np.full(len(right), 1 / len(right)), DRAWS
            )
            entry = {"reward": label, "method": method, "accuracy": float(right.mean())}
            entry["interval"] = _interval(draws @ right / len(right))
            entry |= {key: float(np.mean([row[key] for row in rows])) for key in ("tokens", "calls", "score")}
            rows_found.append(entry)
    return rows_found


def markdown(report: dict) -> str:
    """Accuracy by method and N in per cent, in bold what no method clearly beats: the README shows it."""
    curves = [c for c in report["curves"] if c["method"] != "greedy"]
    sizes = sorted({c["N"] for c in curves})
    by = {(c["method"], c["N"]): c for c in curves}
    min_accuracy = {n: max(c["interval"][0] for c in curves if c["N"] == n) for n in sizes}
    names = sorted({c["method"] for c in curves}, key=lambda name: -by[name, sizes[-1]]["accuracy"])
    rows = ["| method | " + " | ".join(map(str, sizes)) + " |", "|" + "---|" * (len(sizes) + 1)]
    for name in names:
        cells = []
        for n in sizes:
            value = by.get((name, n))
            text = "" if value is None else f"{100 * value['accuracy']:.0f}"
            cells.append(f"**{text}**" if value and value["accuracy"] >= min_accuracy[n] and n > 1 else text)
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def show(report: dict) -> None:
    """Print the tables."""
    header = [
        "method",
        "N",
        "accuracy",
        "95 %",
        "filter less this",
        "95 %",
        "tokens",
        "reward calls",
        "score of choice",
    ]
    rows = [
        [
            c["method"],
            str(c["N"]),
            f"{c['accuracy']:.3f}",
            _range(c["interval"]),
            f"{c['filter less this']:+.3f}" if "filter less this" in c else "",
            _range(c["its interval"]) if "its interval" in c else "",
            f"{c['tokens']:.0f}",
            f"{c['calls']:.0f}",
            f"{c['score']:.2f}",
        ]
        for c in report["curves"]
    ]
    common.print_table("Accuracy against the budget", header, rows)
    levels = [n for n in (4, 16) if f"for the filter at {n}" in report["ratios"][0]]
    rows = [
        [r["method"], f"{r['at accuracy']:.3f}", f"{r['budget ratio']:.2g}", _range(r["interval"])]
        + [
            text
            for n in levels
            for text in (f"{r[f'for the filter at {n}']:.2g}", _range(r[f"interval at {n}"]))
        ]
        for r in report["ratios"]
    ]
    common.print_table(
        "Budget of a method over that of the filter: at the method's best accuracy, and at the filter's with 4 and 16 "
        "texts (inf: not reached on the ladder)",
        ["method", "its best", "ratio", "95 %"]
        + [text for n in levels for text in (f"at filter {n}", "95 %")],
        rows,
    )
    rows = [
        [
            t["reward"],
            t["method"],
            f"{t['accuracy']:.3f}",
            _range(t["interval"]),
            f"{t['tokens']:.0f}",
            f"{t['score']:.2f}",
        ]
        for t in report["all at one N"]
    ]
    common.print_table(
        "Every method at one N", ["reward", "method", "accuracy", "95 %", "tokens", "score of choice"], rows
    )
    print(f"AUC of the trained reward on finished texts: {report['AUC of the trained reward']:.3f}")
    print(f"{report['CPU seconds'] / 60:.1f} CPU minutes")


def _range(interval: list[float]) -> str:
    return f"{interval[0]:.3g} to {interval[1]:.3g}"


def picture(name: str, report: dict) -> None:
    """Accuracy against samples and tokens, and against the score of what was chosen; bars for the filter only."""
    names = sorted({c["method"] for c in report["curves"]})
    others = [method for method in names if method not in (CHIEF, "greedy")]
    fig, axes = common.figure(18, 4.6, columns=4)
    for method in names:
        rows = [c for c in report["curves"] if c["method"] == method]
        accuracy = np.array([c["accuracy"] for c in rows])
        if method == "greedy":
            axes[0].axhline(accuracy[0], color="0.5", ls=":", lw=1, label="greedy")
            continue
        style: dict = {"color": "black", "lw": 2.5, "zorder": 3}
        if method != CHIEF:
            number = others.index(method)
            style = {"color": f"C{number % 10}", "lw": 1.2, "ls": "-" if number < 10 else "--"}
        axes[0].plot([c["N"] for c in rows], accuracy, marker="o", ms=4, label=method, **style)
        axes[1].plot([c["tokens"] for c in rows], accuracy, marker="o", ms=4, **style)
        axes[2].plot([c["score"] for c in rows], accuracy, marker="o", ms=4, **style)
        if method == CHIEF:
            half_widths = np.abs(np.array([c["interval"] for c in rows]).T - accuracy)
            axes[0].errorbar([c["N"] for c in rows], accuracy, half_widths, capsize=3, **style)
    for axis, label in zip(axes[:3], ("samples N", "tokens", "score of the chosen text"), strict=True):
        axis.set_xlabel(label)
        axis.set_ylabel("accuracy")
    axes[0].set_xscale("log")
    axes[0].set_xticks(sorted({c["N"] for c in report["curves"]}), sorted({c["N"] for c in report["curves"]}))
    axes[0].minorticks_off()
    axes[1].set_xscale("log")
    low, high = axes[2].get_xlim()
    axes[2].plot([low, high], [low, high], color="0.7", lw=1, zorder=0)
    axes[2].set_title("right and down as N grows: the reward is hacked", fontsize=9)
    axes[3].axis("off")
    axes[3].legend(*axes[0].get_legend_handles_labels(), loc="center left", frameon=False)
    common.save_figure(fig, name)
