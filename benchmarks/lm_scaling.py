"""Does resampling help? Accuracy of the bundled reasoner against the budget, for each method.

300 problems of 3 to 7 steps, 3 seeds, the trained reward model. Greedy; majority, best-of-N (last score, product of the
factors), weighted best-of-N from one pool of 64 independent solutions a problem and seed; beam search and DVTS (each by
its best text and by a weighted vote), particle filter (odds, and likelihoods) and particle Gibbs at N = 1, 4, 16, 64;
particle Gibbs with N texts in all: passes of max(2, N / 4) particles. Then every method at N = 16 on 100 problems, and
the same with two degraded reward models. Budgets: samples, tokens (drawn, and read again by particle Gibbs), reward
calls. Intervals: paired bootstrap over problems, 95 %.

Results of each piece are kept in site-data/lm_scaling, so that a run goes on where it was ended; ``--full`` adds N =
256 and 1000 problems. `benchmarks/lm_scaling_report.py` makes the tables and the picture.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import common
import jax
import lm_scaling_report as report
import numpy as np
from degraded import degrade, noise_for_auc

from probinfer import lm
from probinfer.lm import selectors
from probinfer.lm.reasoner import load
from probinfer.lm.rewards.calibration import auc as auc_of
from probinfer.running.progress import task

NAME = "lm_scaling"
STORE = Path(__file__).parent.parent / "site-data" / NAME
STEP = lm.until("\n", max_tokens=8)  # a line takes 6
SETTINGS = {"answer": load.answer, "max_tokens": 64, "max_steps": 9, "progress": False}
LADDER = (1, 4, 16, 64)
POOL = ("majority", "best of N", "best of N, product", "weighted best of N")


def gibbs(n: int, kind=lm.ParticleGibbs, **settings):
    """N texts in all: passes of max(2, N / 4) particles, the first one included."""
    particles = max(2, n // 4)
    return kind(particles, max(n // particles - 1, 1), step=STEP, **settings)


def curves(n: int) -> dict:
    """Return the methods of the curves that do not use the pool."""
    methods = {
        "beam search": lm.BeamSearch(n, step=STEP),
        "DVTS": lm.DVTS(n, step=STEP),
        "particle filter": lm.ParticleFilter(n, step=STEP),
    }
    if n == 1:
        methods["greedy"] = lm.Greedy(step=STEP)
    else:
        methods |= {"particle Gibbs": gibbs(n), "filter, likelihood": lm.ParticleFilter(n, step=STEP)}
    return methods


def others(n: int) -> dict:
    """The rest of the methods: published filter, entropic, nested, tempered, other meanings of the score."""
    return {
        "greedy": lm.Greedy(step=STEP),
        "published filter": lm.ParticleFilter(n, "always", step=STEP, resampling="multinomial"),
        "entropic filter": lm.ParticleFilter(n, "entropic", step=STEP),
        "nested": lm.NestedSMC(n // 4, 4, step=STEP),
        "Gibbs without ancestors": gibbs(n, ancestor_sampling=False),
        "parallel tempering": lm.ParallelTempering(2, 1, powers=(1.0, 0.5, 0.25), step=STEP),
        "filter, twist": lm.ParticleFilter(n, step=STEP),
    }


MEANING = {"filter, likelihood": "likelihood", "filter, twist": "twist"}


def chosen(name: str, result: lm.Answers) -> tuple[str | None, float]:
    """The answer of a method, and the score of the text that stands for it."""
    answer = result.best
    indices = [i for i, a in enumerate(result.extracted) if a == answer]
    best = max(indices, key=lambda i: result.log_scores[i]) if indices else int(np.argmax(result.log_scores))
    return answer, float(np.exp(result.log_scores[best]))


def by_length(problems) -> list:
    """Sort problems by length, because the problems of a batch wait for each other."""
    return sorted(problems, key=lambda problem: len(problem.operations))


def run(model, problems, reward, method, seed: int) -> list:
    """Return the answers to all problems, in batches of equal size."""
    fits = [n for n in range(1, len(problems) + 1) if len(problems) % n == 0 and n * method.num_rows <= 320]
    batch = max(fits, default=1)
    prompts = [problem.prompt for problem in problems]
    return lm.infer(jax.random.key(seed), model, prompts, reward, method, batch=batch, **SETTINGS)


def judged(name: str, problems, results) -> list[dict]:
    """One row a problem: right or not, the score of what was chosen, costs."""
    rows = []
    for problem, result in zip(problems, results, strict=True):
        answer, score = chosen(name, result)
        cost = result.ledger
        top = result.extracted[int(np.argmax(result.log_scores))]
        vote = selectors.weighted_vote(result.extracted, np.exp(result.log_scores)).answer
        rows.append(
            {
                "right": answer == str(problem.answer),
                "top": top == str(problem.answer),
                "vote": vote == str(problem.answer),
                "score": score,
                "samples": cost.samples,
                "tokens": cost.generated + cost.rescored,
                "calls": cost.reward_calls,
            }
        )
    return rows


def from_pool(problems, results, n: int) -> dict[str, list[dict]]:
    """Sampling baselines from the first N of the pool."""
    rows: dict[str, list[dict]] = {name: [] for name in POOL}
    for problem, result in zip(problems, results, strict=True):
        answers, last = result.extracted[:n], result.log_scores[:n]
        product = result.log_potential[:n]
        choices = {
            "majority": selectors.majority(answers).answer,
            "best of N": selectors.argmax(answers, last).answer,
            "best of N, product": selectors.argmax(answers, product).answer,
            "weighted best of N": selectors.weighted_vote(answers, np.exp(last)).answer,
        }
        steps = (result.step_lengths[:, :n] > 0).sum()
        for name, answer in choices.items():
            weights = [np.exp(s) for a, s in zip(answers, last, strict=True) if a == answer]
            row = {
                "right": answer == str(problem.answer),
                "score": float(max(weights, default=0)),
                "samples": n,
            }
            row["tokens"] = int(sum(map(len, result.tokens[:n])))
            row["calls"] = 0 if name == "majority" else int(steps if "product" in name else n)
            rows[name].append(row)
    return rows


def piece(path: Path, work) -> dict:
    """Compute one part of the results, or read it if it is stored."""
    if path.exists():
        return json.loads(path.read_text())
    started = time.process_time()
    record = {"rows": work(), "seconds": time.process_time() - started}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return record


def degraded(model) -> tuple[dict, float]:
    """Two worse rewards: noise that brings the AUC of finished texts to .7 and to .6, in part passed on along the text.

    That of the trained reward comes second (texts of 3 to 7 steps, from 60 problems of their own).
    """
    tune = load.problems(7, 60, split="validation")
    results = run(model, tune, model.reward, lm.MajorityVote(8, step=STEP), 99)
    logits, labels = [], []
    for problem, result in zip(tune, results, strict=True):
        scores = np.asarray(result.log_scores)
        logits += list(scores - np.log(-np.expm1(np.minimum(scores, -1e-7))))
        labels += [answer == str(problem.answer) for answer in result.extracted]
    logits, labels = np.array(logits), np.array(labels)
    noises = {auc: noise_for_auc(logits, labels, auc) for auc in (0.7, 0.6)}
    worse = {f"AUC {auc}": degrade(model.reward, noise, persistence=0.5) for auc, noise in noises.items()}
    return worse, auc_of(logits, labels)[0]


def main() -> None:
    arguments = common.parser(__doc__)
    arguments.add_argument("--full", action="store_true", help="1000 problems, N to 256")
    arguments.add_argument("--again", action="store_true", help="forget earlier pieces")
    args = arguments.parse_args()
    num, seeds = (12, 1) if args.small else (1000, 3) if args.full else (300, 3)
    ladder = (1, 4) if args.small else (*LADDER, 256) if args.full else LADDER
    store = STORE / ("small" if args.small else "full" if args.full else "standard")
    if args.again or args.small:
        for old in store.glob("*.json"):
            old.unlink()
    model = lm.reasoner()
    problems = load.problems(2026, num)
    few = by_length(problems[: min(100, num)])
    problems = by_length(problems)
    worse, trained = degraded(model)
    parts, results = plan(model, problems, few, ladder, seeds, worse), {}
    with task(NAME, len(parts), None) as line:
        for i, (name, work) in enumerate(parts.items()):
            results[name] = piece(store / f"{name}.json", work)
            line.update(i + 1, note=name)
    report_data = report.gather(results, ladder, seeds)
    report_data["AUC of the trained reward"] = trained
    report.show(report_data)
    if not args.small:
        common.write_results(
            NAME, {"problems": num, "seeds": seeds, "ladder": ladder, **report.finite(report_data)}
        )
        report.picture(NAME, report_data)


def plan(model, problems, few, ladder, seeds: int, worse: dict) -> dict:
    """Return the name of each part of the results, and the function that computes it."""
    parts: dict = {}
    reward = model.reward
    for seed in range(seeds):
        majority = lm.MajorityVote(max(ladder), step=STEP)

        def pool(seed=seed, majority=majority):
            results = run(model, problems, reward, majority, seed)
            return {str(n): from_pool(problems, results, n) for n in ladder}

        parts[f"pool-{seed}"] = pool
        for n in ladder:
            for name, method in curves(n).items():

                def one(name=name, method=method, seed=seed):
                    meant = lm.rewards.from_score(reward, meaning=MEANING.get(name, "odds"))
                    return judged(name, problems, run(model, problems, meant, method, seed))

                parts[f"{name}-{n}-{seed}"] = one
    n = 16 if max(ladder) >= 16 else 4
    for label, score in {"trained": reward, **worse}.items():

        def pooled(score=score):
            return {str(n): from_pool(few, run(model, few, score, lm.MajorityVote(n, step=STEP), 0), n)}

        parts[f"all-{label}-pool"] = pooled
        for name, method in {**curves(n), **others(n)}.items():

            def of(name=name, method=method, score=score):
                meaning = MEANING.get(name, "odds")
                return judged(
                    name, few, run(model, few, lm.rewards.from_score(score, meaning=meaning), method, 0)
                )

            parts[f"all-{label}-{name}"] = of
    return parts


if __name__ == "__main__":
    main()
