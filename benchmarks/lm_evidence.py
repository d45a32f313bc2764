"""Do bounds on the log evidence of prompts contain the exact value, and how fast does their gap close?

Tabular models (6 tokens, texts of 6, order 2; truth by enumeration) with likelihoods and twists, and a problem of the
bundled reasoner with its reward model (the likelihood to the power .5: else rejection finds too few exact draws).
Lower bound: mean of the log estimates of filters. Upper bound: that of conditional filters around exact draws, by
rejection. 64 runs of each kind, N = 2, 8, 32; standard errors. The truth of the reasoner is unknown: the mean of 8
filters of 1024 particles stands for it.
"""

from __future__ import annotations

from functools import partial

import common
import jax
import numpy as np

from probinfer import lm
from probinfer.core.types import pytree
from probinfer.running.progress import task

NAME = "lm_evidence"
LADDER = (2, 8, 32)


@pytree
class Hashed(lm.rewards.Score):
    """A logit for each prefix, from a hash of its tokens."""

    table: object
    scale = "logit"

    def step(self, state, view):
        """Look the prefix up."""

        def mix(carry, xs):
            token, j = xs
            return jax.numpy.where(
                j < view.length, (carry * 7 + token + 1) % self.table.shape[0], carry
            ), None

        start = jax.numpy.zeros_like(view.length)
        slots, _ = jax.lax.scan(mix, start, (view.tokens.T, jax.numpy.arange(view.tokens.shape[1])))
        return state, self.table[slots]


def tabular(meaning: str) -> dict:
    """Return a model that can be enumerated, and its exact log evidence."""
    network = lm.Tabular.random(jax.random.key(1), 6, order=2)
    model = lm.Model(network, lm.Vocabulary(("a", "b", "c", "d", ";", "."), eos="."))
    table = jax.numpy.asarray(np.random.default_rng(0).normal(size=211) * 2)
    reward = lm.rewards.from_score(Hashed(table), meaning=meaning)
    settings = {"max_tokens": 6}
    exact = lm.infer(
        jax.random.key(0), model, "ab", reward, lm.Exact(), answer=lm.answers.text, progress=False, **settings
    )
    return {
        "name": f"tabular, {meaning}",
        "args": (model, "ab", reward),
        "step": lm.every(1),
        "settings": settings,
        "truth": exact.log_evidence,
    }


def reasoning(meaning: str, power: float) -> dict:
    """Return a problem of the reasoner with three operations."""
    model = lm.reasoner()
    problem = lm.reasoner.problems(11, 1, steps=(3, 3))[0]
    reward = lm.rewards.from_model(model.reward, meaning=meaning) * power
    settings, step = {"max_tokens": 32, "max_steps": 5}, lm.until("\n", max_tokens=8)
    many = lm.ParticleFilter(1024, step=step)
    runs = lm.infer(
        jax.random.key(1),
        model,
        [problem.prompt] * 8,
        reward,
        many,
        answer=lm.answers.text,
        progress=False,
        **settings,
    )
    truth = float(np.logaddexp.reduce([run.log_evidence for run in runs]) - np.log(8))
    return {
        "name": f"reasoner, {meaning}" + (f" to the power {power}" if power != 1 else ""),
        "args": (model, problem.prompt, reward),
        "step": step,
        "settings": settings,
        "truth": truth,
    }


def bounded(case: dict, ladder, repeats: int) -> list[dict]:
    """Return both bounds of one case, by filters of N particles."""
    filters = [lm.ParticleFilter(num, step=case["step"]) for num in ladder]
    bounds_of_filters = lm.evidence_bounds(
        jax.random.key(0), *case["args"], filters, num_repeats=repeats, **case["settings"]
    )
    rows = []
    for num, bounds in zip(ladder, bounds_of_filters, strict=True):
        low, high = bounds.lower - 3 * bounds.lower_error, bounds.upper + 3 * bounds.upper_error
        rows.append(
            {
                "case": case["name"],
                "N": num,
                "truth": case["truth"],
                "lower": bounds.lower,
                "lower error": bounds.lower_error,
                "upper": bounds.upper,
                "upper error": bounds.upper_error,
                "gap": bounds.gap,
                "acceptance": bounds.acceptance,
                "inside": bool(low <= case["truth"] <= high),
            }
        )
    return rows


def main() -> None:
    args = common.parser(__doc__).parse_args()
    repeats, ladder = (8, LADDER[:2]) if args.small else (64, LADDER)
    makers = [partial(tabular, "likelihood"), partial(tabular, "twist")]
    makers += [partial(reasoning, "twist", 1.0), partial(reasoning, "likelihood", 0.5)]
    rows: list[dict] = []
    with task(NAME, len(makers), None) as line:
        for i, maker in enumerate(makers):
            case = maker()
            line.update(i, note=case["name"])
            rows += bounded(case, ladder, repeats)
    report(rows, repeats, args.small)


def report(rows, repeats: int, small: bool) -> None:
    """Print the table and write the results."""
    header = ["case", "N", "lower", "truth", "upper", "gap", "inside"]
    cells = [
        [
            row["case"],
            str(row["N"]),
            f"{row['lower']:.3f} ± {row['lower error']:.3f}",
            f"{row['truth']:.3f}",
            f"{row['upper']:.3f} ± {row['upper error']:.3f}",
            f"{row['gap']:.3f}",
            "yes" if row["inside"] else "NO",
        ]
        for row in rows
    ]
    common.print_table("Log evidence from both sides (inside: to 3 standard errors)", header, cells)
    if not small:
        common.write_results(NAME, {"repeats": repeats, "rows": rows})


if __name__ == "__main__":
    main()
