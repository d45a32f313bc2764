"""Train the bundled reasoner and its process reward model, and write them into the package with a report.

Language model: next-token prediction on solutions of chained arithmetic modulo 11, 3 to 7 steps, new problems at each
step, stopped at the first evaluation at which at least 36 % of 300 validation problems are solved by greedy decoding.
Reward model: the same transformer with a value head, trained on rollouts at temperature 1 labeled by the checker (its
trunk also on correct solutions), and stopped at the first evaluation with an AUC of at least 0.94 on rollouts of 300
validation problems.
Problems of training, validation, reward model and evaluation are disjoint.

The report: greedy accuracy on 2000 evaluation problems by number of steps with Clopper-Pearson intervals at 95 %; AUC
of the reward model on rollouts of 2000 evaluation problems, overall, by step, and on the steps at which the first
error may occur (all previous steps are correct), with intervals of 1000 bootstrap draws of problems; its calibration;
the noise that degrades it to an AUC of 0.85 and of 0.70; its choices among 16 rollouts of each of 200 problems; CPU
minutes.

    taskset -c 1 python benchmarks/reasoner_train.py                  # minutes; an interrupted run resumes
    python benchmarks/reasoner_train.py --folder /tmp/mine --seed 1   # another reasoner, in another folder

On the same kind of processor, the weights equal those of the package up to rounding. On another processor, rounding may
change the step at which training stops; the stopping criterion holds there too.
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
from probinfer.app.reasoner_training.language_model import LanguageModelSettings, train
from probinfer.app.reasoner_training.optimizer import TrainingPlan, TrainingTrace
from probinfer.app.reasoner_training.reward_model import (
    RewardModelSettings,
    auc,
    score_rollouts,
    train_reward,
)
from probinfer.app.reasoner_training.sampled_solutions import Rollouts, accuracy, draw_rollouts
from probinfer.lm.reasoner import encoding, files
from probinfer.lm.reasoner.task import Problems, draw

NAME = "reasoner_train"
PACKAGED = Path(pi.__file__).parent / "lm" / "reasoner" / "weights"
SMALL = (
    LanguageModelSettings(
        width=32, heads=2, kv_heads=1, feed_forward=64, num_validation=40, plan=TrainingPlan(20, 3e-3)
    ),
    RewardModelSettings(num_problems=200, num_validation=40, plan=TrainingPlan(10, 1e-3)),
)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=PACKAGED, help="output folder of the weights")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        help="folder of the checkpoints of the training; default: in the temporary folder",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if args.small else args.folder
        report = run(args, folder)
    show(report)
    if not args.small and folder == PACKAGED:
        common.write_results(NAME, report, ("flax", "safetensors", "tokenizers"))


def run(args: Any, folder: Path) -> dict[str, Any]:
    """Train both models (or resume), write them, and evaluate the written files."""
    settings, reward_settings = SMALL if args.small else (LanguageModelSettings(), RewardModelSettings())
    settings = dataclasses.replace(settings, seed=args.seed)
    reward_settings = dataclasses.replace(reward_settings, seed=args.seed)
    checkpoints = args.checkpoints or Path(tempfile.gettempdir()) / f"reasoner_train_{args.seed}"
    checkpoints = folder / "checkpoints" if args.small else checkpoints
    start = time.process_time()
    model, trace = train(
        settings, checkpoint=pi.Checkpoint(checkpoints / "model", every=50), progress="language model"
    )
    files.write_model(folder, model)
    reward, reward_trace = train_reward(
        model,
        reward_settings,
        checkpoint=pi.Checkpoint(checkpoints / "reward", every=100),
        progress="reward model",
    )
    files.write_reward(folder, reward)
    minutes = (time.process_time() - start) / 60
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
    shutil.rmtree(checkpoints)
    return report


def _minutes(trace: TrainingTrace, reward_trace: TrainingTrace) -> dict[str, float]:
    return {
        "language model": float(trace.cpu.sum() / 60),
        "reward model, without rollouts": float(reward_trace.cpu.sum() / 60),
    }


def judgement(model: Any, reward: Any, num: int) -> dict[str, Any]:
    """Accuracy and AUC on evaluation problems."""
    problems = draw((0, 9), num)
    solved = accuracy(model, problems) > 0
    rollouts = draw_rollouts(jax.random.key(1), model, problems)
    logits, ends = score_rollouts(reward, problems, rollouts)
    return {
        "greedy": by_steps(solved, problems),
        "temperature 1": by_steps(is_solved(rollouts), problems),
        "answer right at temperature 1": proportion(rollouts.is_answer_correct),
        "reward": reward_figures(logits, ends, rollouts),
        "of 16": of_many(model, reward, draw((0, 10), num // 10)),
    }


def of_many(model: Any, reward: Any, problems: Problems, num_rollouts: int = 16) -> dict[str, list[float]]:
    """Evaluate answers chosen by the reward model among 16 rollouts of each problem."""
    repeated = Problems(*(np.repeat(leaf, num_rollouts, axis=0) for leaf in problems))
    rollouts = draw_rollouts(jax.random.key(2), model, repeated)
    logits, ends = score_rollouts(reward, repeated, rollouts)
    is_correct = rollouts.is_answer_correct.reshape(-1, num_rollouts)
    last = np.take_along_axis(logits, rollouts.length[:, None] - 1, axis=1).reshape(-1, num_rollouts)
    total = np.where(ends, -np.logaddexp(0, -logits), 0).sum(axis=1).reshape(-1, num_rollouts)
    votes = encoding.answers(rollouts.tokens, rollouts.length).reshape(-1, num_rollouts)[
        ..., None
    ] == np.arange(11)
    answers = encoding.values(problems)[:, -1]
    rows = np.arange(len(is_correct))
    return {
        "one of them right": proportion(is_correct.any(axis=1)),
        "majority": proportion(votes.sum(axis=1).argmax(axis=1) == answers),
        "best last score": proportion(is_correct[rows, last.argmax(axis=1)]),
        "best product of scores": proportion(is_correct[rows, total.argmax(axis=1)]),
    }


def is_solved(rollouts: Rollouts) -> np.ndarray:
    """Whether each step and the end are correct."""
    return np.array(
        [row[length - 1] for row, length in zip(rollouts.is_correct, rollouts.length, strict=True)]
    )


def by_steps(is_correct: np.ndarray, problems: Problems) -> dict[str, Any]:
    counts = problems.num_steps
    return {
        "all": proportion(is_correct),
        **{str(n): proportion(is_correct[counts == n]) for n in np.unique(counts)},
    }


def proportion(is_correct: np.ndarray) -> list[float]:
    """Return a frequency and its exact 95 % interval."""
    interval = stats.binomtest(int(is_correct.sum()), len(is_correct)).proportion_ci(method="exact")
    return [float(is_correct.mean()), interval.low, interval.high]


def reward_figures(logits: np.ndarray, ends: np.ndarray, rollouts: Rollouts) -> dict[str, Any]:
    """Return AUC with intervals, Brier score and expected calibration error at the ends of steps."""
    step = np.cumsum(ends, axis=1) - ends
    last = np.maximum.accumulate(np.where(ends, np.arange(ends.shape[1]), -1), axis=1)
    previous_end = np.concatenate([np.full((len(ends), 1), -1), last[:, :-1]], axis=1)
    correct_before = ends & (
        (previous_end < 0) | np.take_along_axis(rollouts.is_correct, np.maximum(previous_end, 0), axis=1)
    )
    answer = ends & (rollouts.tokens == encoding.END)
    parts = {"all": ends, "first error": correct_before, "answer": answer}
    parts |= {f"step {t + 1}": ends & (step == t) & ~answer for t in range(7)}
    values, labels = logits[ends], rollouts.is_correct[ends]
    probability = 1 / (1 + np.exp(-values))
    edges = np.linspace(0, 1, 11)[1:-1]
    bins = np.digitize(probability, edges)
    calibration_gaps = [
        abs(probability[bins == b].mean() - labels[bins == b].mean()) * (bins == b).mean()
        for b in np.unique(bins)
    ]
    return {
        "AUC": {name: interval(logits, rollouts.is_correct, mask) for name, mask in parts.items()},
        "right": float(labels.mean()),
        "Brier": float(np.mean((probability - labels) ** 2)),
        "ECE": float(sum(calibration_gaps)),
        "noise for an AUC of": {str(target): noise(values, labels, target) for target in (0.85, 0.7)},
    }


def noise(logits: np.ndarray, labels: np.ndarray, target: float) -> float:
    """As ``noise_for_auc``; NaN if all labels are equal, as after very short training."""
    return noise_for_auc(logits, labels, target) if 0 < labels.mean() < 1 else float("nan")


def interval(logits: np.ndarray, is_correct: np.ndarray, mask: np.ndarray, draws: int = 1000) -> list[float]:
    """Return the AUC and its 95 % bootstrap interval over problems."""
    rng, rows = np.random.default_rng(0), np.flatnonzero(mask.any(axis=1))
    counts = mask.sum(axis=1)
    if not 0 < is_correct[mask].mean() < 1:
        return [float("nan")] * 3
    values, labels, starts = logits[mask], is_correct[mask], np.concatenate([[0], np.cumsum(counts)])
    aucs = []
    for _ in range(draws):
        chosen = rng.choice(rows, len(rows))
        index = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in chosen])
        aucs.append(auc(values[index], labels[index]))
    return [auc(values, labels), *np.nanquantile(aucs, [0.025, 0.975])]


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
