"""What a particle filter over reasoning steps must compute: cached and forked, or prompted anew at every step.

The same run of the filter (bundled reasoner, 16 particles), its tokens counted two ways. Ours reads the prompt once and
every new token once. The published code sends the text of each particle back at every step: prompt and all earlier
tokens are read again by the language model and by the reward model. Tokens of both networks, against the number of
steps; the growth is the exponent of a line in logarithms. Means over 40 problems of each length.
"""

from __future__ import annotations

import common
import jax
import numpy as np

from probinfer import lm

NAME = "lm_reprompting"
NUM = 16


def counted(result: lm.Answers) -> dict:
    """Count the tokens that both designs process in this run, by the language model and by the reward model."""
    prompt = result.ledger.prompt
    steps = result.step_lengths[: result.num_steps]  # (T, N), along the surviving slots
    drawn = result.ledger.generated
    again = np.zeros(steps.shape[1])
    reread = rescored = 0
    for row, ancestors in zip(steps, result.ancestors, strict=False):
        again = again[ancestors]
        active = row > 0
        reread += int(np.sum((prompt + again)[active]) + row.sum())
        again = again + row
        rescored += int(np.sum((prompt + again)[active]))
    return {
        "steps": int(result.num_steps),
        "cached": 2 * prompt + 2 * drawn,
        "masked": result.ledger.masked,
        "prompted anew": reread + rescored,
    }


def main() -> None:
    args = common.parser(__doc__).parse_args()
    num = 4 if args.small else 40
    model, rows = lm.reasoner(), []
    method = lm.ParticleFilter(NUM, step=lm.until("\n", max_tokens=12))
    settings = {"answer": lm.reasoner.answer, "max_tokens": 64, "max_steps": 9, "progress": False}
    for length in range(3, 8):
        problems = lm.reasoner.problems(5, num, steps=(length, length))
        prompts = [problem.prompt for problem in problems]
        results = lm.infer(jax.random.key(length), model, prompts, model.reward, method, batch=10, **settings)
        counts = [counted(result) for result in results]
        mean = {name: float(np.mean([c[name] for c in counts])) for name in counts[0]}
        rows.append({"operations": length, **mean, "ratio": mean["prompted anew"] / mean["cached"]})
    logs = np.log([[row["steps"], row["cached"], row["prompted anew"]] for row in rows])
    growth = {
        name: float(np.polyfit(logs[:, 0], logs[:, i], 1)[0])
        for i, name in ((1, "cached"), (2, "prompted anew"))
    }
    header = ["operations", "steps", "cached", "masked", "prompted anew", "ratio"]
    cells = [
        [f"{row[name]:.3g}" if name == "ratio" else f"{row[name]:.0f}" for name in header] for row in rows
    ]
    common.print_table(f"Tokens read by both networks, {NUM} particles", header, cells)
    print(
        f"growth with the number of steps: cached {growth['cached']:.2f}, prompted anew {growth['prompted anew']:.2f}"
    )
    if not args.small:
        common.write_results(NAME, {"rows": rows, "growth": growth})


if __name__ == "__main__":
    main()
