"""Train the bundled reasoner and its process reward model, and write them into the package with a report.

Language model: next-token prediction on solutions of chained arithmetic modulo 11, 3 to 7 steps, fresh problems at each
step, stopped at the first evaluation at which at least 36 % of 300 validation problems are solved by greedy decoding.
Reward model: the same transformer with a value head, trained on rollouts at temperature 1 labelled by the checker (its
trunk on right solutions too), and stopped at the first evaluation with an AUC of at least 0.94 on rollouts of 300
validation problems.
Problems of training, validation, reward model and evaluation are disjoint.

The report: greedy accuracy on 2000 evaluation problems by number of steps with Clopper-Pearson intervals at 95 %; AUC
of the reward model on rollouts of 2000 evaluation problems, in all, by step, and on the steps at which the first error
may happen (all before is right), with intervals of 1000 bootstrap draws of problems; its calibration; the noise that
degrades it to an AUC of 0.85 and of 0.70; what it chooses among 16 rollouts of each of 200 problems; CPU minutes.

    taskset -c 1 python benchmarks/reasoner_train.py                  # minutes; again after an interruption: goes on
    python benchmarks/reasoner_train.py --folder /tmp/mine --seed 1   # another reasoner, elsewhere

The weights are those of the package up to rounding on the same kind of processor; elsewhere rounding may move the step
at which training stops, and the criterion holds all the same.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
from degraded import noise_for_auc
from scipy import stats

import probinfer as pi
from probinfer.app.reasoner_training.language_model import Settings, train
from probinfer.app.reasoner_training.optimizer import Plan, Trace
from probinfer.app.reasoner_training.reward_model import RewardSettings, auc, judge, train_reward
from probinfer.app.reasoner_training.sampled_solutions import Rollouts, accuracy, rollouts
from probinfer.lm.reasoner import encoding, files
from probinfer.lm.reasoner.task import Problems, draw

NAME = "reasoner_train"
PACKAGED = Path(pi.__file__).parent / "lm" / "reasoner" / "weights"
SMALL = (
    Settings(width=32, heads=2, kv_heads=1, feed_forward=64, num_validation=40, plan=Plan(20, 3e-3)),
    RewardSettings(num_problems=200, num_validation=40, plan=Plan(10, 1e-3)),
)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=PACKAGED, help="where the weights go")
    parser.add_argument(
        "--checkpoints", type=Path, help="kept while training; default: in the temporary folder"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as elsewhere:
        folder = Path(elsewhere) if args.small else args.folder
        report = run(args, folder)
    show(report)
    if not args.small and folder == PACKAGED:
        common.write_results(NAME, report, ("flax", "safetensors", "tokenizers"))


def run(args: Any, folder: Path) -> dict[str, Any]:
    """Train both models (or go on), write them, and judge what was written."""
    settings, reward_settings = SMALL if args.small else (Settings(), RewardSettings())
    settings = dataclasses.replace(settings, seed=args.seed)
    reward_settings = dataclasses.replace(reward_settings, seed=args.seed)
    kept = args.checkpoints or Path(tempfile.gettempdir()) / f"reasoner_train_{args.seed}"
    kept = folder / "checkpoints" if args.small else kept
    begin = time.process_time()
    model, trace = train(
        settings, checkpoint=pi.Checkpoint(kept / "model", every=50), progress="language model"
    )
    files.write_model(folder, model)
    reward, reward_trace = train_reward(
        model, reward_settings, checkpoint=pi.Checkpoint(kept / "reward", every=100), progress="reward model"
    )
    files.write_reward(folder, reward)
    minutes = (time.process_time() - begin) / 60
    num = 50 if args.small else 2000
    report = {
        "settings": dataclasses.asdict(settings),
        "reward settings": dataclasses.asdict(reward_settings),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*.safetensors")),
        "CPU minutes": {"this process, resumed parts not counted": minutes, **_minutes(trace, reward_trace)},
        "iterations": {"language model": len(trace.loss), "reward model": len(reward_trace.loss)},
        "reward validation": [
            [i + 1, score] for i, score in enumerate(reward_trace.score) if np.isfinite(score)
        ],
        "loss": {"language model": trace.loss[::10], "reward model": reward_trace.loss[::10]},
        "validation": [[i + 1, score] for i, score in enumerate(trace.score) if np.isfinite(score)],
        **judgement(files.read_model(folder), files.read_reward(folder), num),
    }
    shutil.rmtree(kept)
    return report


def _minutes(trace: Trace, reward_trace: Trace) -> dict[str, float]:
    return {
        "language model": float(trace.cpu.sum() / 60),
        "reward model, without rollouts": float(reward_trace.cpu.sum() / 60),
    }


def judgement(model: Any, reward: Any, num: int) -> dict[str, Any]:
    """Accuracy and AUC on evaluation problems."""
    problems = draw((0, 9), num)
    solved = accuracy(model, problems) > 0
    found = rollouts(jax.random.key(1), model, problems)
    logits, ends = judge(reward, problems, found)
    return {
        "greedy": by_steps(solved, problems),
        "temperature 1": by_steps(_whole(found), problems),
        "answer right at temperature 1": proportion(found.answer),
        "reward": reward_figures(logits, ends, found),
        "of 16": of_many(model, reward, draw((0, 10), num // 10)),
    }


def of_many(model: Any, reward: Any, problems: Problems, many: int = 16) -> dict[str, list[float]]:
    """What the reward model is good for within a problem: answers chosen among 16 rollouts."""
    repeated = Problems(*(np.repeat(leaf, many, axis=0) for leaf in problems))
    found = rollouts(jax.random.key(2), model, repeated)
    logits, ends = judge(reward, repeated, found)
    right = found.answer.reshape(-1, many)
    last = np.take_along_axis(logits, found.length[:, None] - 1, axis=1).reshape(-1, many)
    total = np.where(ends, -np.logaddexp(0, -logits), 0).sum(axis=1).reshape(-1, many)
    votes = encoding.answers(found.tokens, found.length).reshape(-1, many)[..., None] == np.arange(11)
    truth = encoding.values(problems)[:, -1]
    rows = np.arange(len(right))
    return {
        "one of them right": proportion(right.any(axis=1)),
        "majority": proportion(votes.sum(axis=1).argmax(axis=1) == truth),
        "best last score": proportion(right[rows, last.argmax(axis=1)]),
        "best product of scores": proportion(right[rows, total.argmax(axis=1)]),
    }


def _whole(found: Rollouts) -> np.ndarray:
    """Whether every step and the end are right."""
    return np.array([row[length - 1] for row, length in zip(found.right, found.length, strict=True)])


def by_steps(right: np.ndarray, problems: Problems) -> dict[str, Any]:
    counts = problems.num_steps
    return {"all": proportion(right), **{str(n): proportion(right[counts == n]) for n in np.unique(counts)}}


def proportion(right: np.ndarray) -> list[float]:
    """Frequency, and its exact interval at 95 %."""
    interval = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="exact")
    return [float(right.mean()), interval.low, interval.high]


def reward_figures(logits: np.ndarray, ends: np.ndarray, found: Rollouts) -> dict[str, Any]:
    """AUC with intervals; Brier score and expected calibration error at the ends of steps."""
    step = np.cumsum(ends, axis=1) - ends
    last = np.maximum.accumulate(np.where(ends, np.arange(ends.shape[1]), -1), axis=1)
    before = np.concatenate([np.full((len(ends), 1), -1), last[:, :-1]], axis=1)
    alive = ends & ((before < 0) | np.take_along_axis(found.right, np.maximum(before, 0), axis=1))
    answer = ends & (found.tokens == encoding.END)
    parts = {"all": ends, "first error": alive, "answer": answer}
    parts |= {f"step {t + 1}": ends & (step == t) & ~answer for t in range(7)}
    at, labels = logits[ends], found.right[ends]
    chance = 1 / (1 + np.exp(-at))
    edges = np.linspace(0, 1, 11)[1:-1]
    bins = np.digitize(chance, edges)
    gaps = [
        abs(chance[bins == b].mean() - labels[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)
    ]
    return {
        "AUC": {name: interval(logits, found.right, where) for name, where in parts.items()},
        "right": float(labels.mean()),
        "Brier": float(np.mean((chance - labels) ** 2)),
        "ECE": float(sum(gaps)),
        "noise for an AUC of": {str(wanted): noise(at, labels, wanted) for wanted in (0.85, 0.7)},
    }


def noise(logits: np.ndarray, labels: np.ndarray, wanted: float) -> float:
    """As ``noise_for_auc``; NaN where all are right or all are wrong, as after no training to speak of."""
    return noise_for_auc(logits, labels, wanted) if 0 < labels.mean() < 1 else float("nan")


def interval(logits: np.ndarray, right: np.ndarray, where: np.ndarray, draws: int = 1000) -> list[float]:
    """AUC and its 95 % interval over problems."""
    rng, rows = np.random.default_rng(0), np.flatnonzero(where.any(axis=1))
    counts = where.sum(axis=1)
    if not 0 < right[where].mean() < 1:
        return [float("nan")] * 3
    values, labels, starts = logits[where], right[where], np.concatenate([[0], np.cumsum(counts)])
    found = []
    for _ in range(draws):
        chosen = rng.choice(rows, len(rows))
        index = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in chosen])
        found.append(auc(values[index], labels[index]))
    return [auc(values, labels), *np.nanquantile(found, [0.025, 0.975])]


def show(report: dict[str, Any]) -> None:
    def line(name: str, figures: list[float]) -> list[str]:
        return [name, *(f"{figure:.3f}" for figure in figures)]

    header = ["", "", "from", "to"]
    rows = [line(f"{name} steps", row) for name, row in report["greedy"].items()]
    common.print_table("Greedy accuracy", header, rows)
    rows = [line(f"{name} steps", row) for name, row in report["temperature 1"].items()]
    common.print_table("Accuracy at temperature 1", header, rows)
    rows = [line(name, row) for name, row in report["reward"]["AUC"].items()]
    common.print_table("AUC of the reward model", header, rows)
    rows = [line(name, row) for name, row in report["of 16"].items()]
    common.print_table("Right answers, of 16 rollouts at temperature 1", header, rows)
    rest = {name: report[name] for name in ("parameters", "bytes", "CPU minutes", "iterations")}
    rest |= {name: report["reward"][name] for name in ("right", "Brier", "ECE", "noise for an AUC of")}
    print(json.dumps(rest, indent=1))


if __name__ == "__main__":
    main()
