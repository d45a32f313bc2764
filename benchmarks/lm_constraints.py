"""What does another schema or pattern cost, with a model of 135 million parameters?

A Llama of 30 layers, width 576, 9 query and 3 key heads and 49152 tokens (the sizes of SmolLM-135M; weights drawn at
random, which costs what trained ones cost), 8 particles, 12 tokens, a prompt of 12 tokens. The first run of a JSON
schema compiles; another schema and two patterns follow. Measured are the CPU time of each run in one process and the
programs that were compiled; beside them a run of the first schema again: what another constraint costs is the
difference. The texts of every run are held against their own constraint.

    OPENBLAS_NUM_THREADS=1 taskset -c 1 python benchmarks/lm_constraints.py
"""

from __future__ import annotations

import itertools
import json
import re
import string
import time

import common
import jax
import numpy as np

from probinfer import lm
from probinfer.lm.models.transformer import Config, Transformer

NAME = "lm_constraints"
PARTICLES, TOKENS, PROMPT = 8, 12, "Name a city: "
SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3}
VOCABULARY = 49_152


def tokens(number: int) -> list[str]:
    """An end, all printable characters, all pairs of letters, and longer words of letters."""
    characters = ["<end>", *string.printable]
    grammar_words = (
        "".join(letters)
        for size in (2, 3, 4)
        for letters in itertools.product(string.ascii_lowercase, repeat=size)
    )
    return characters + list(itertools.islice(grammar_words, number - len(characters)))


CITIES, WEIGHTS = ["Rome", "Oslo", "Lima"], [7, 13, 1000]


def runs() -> dict[str, tuple]:
    """Return the constraints in the order of the runs, each with a function that checks a text."""
    return {
        "first schema": (lm.rewards.json_schema({"enum": CITIES}), lambda text: json.loads(text) in CITIES),
        "first schema again": (
            lm.rewards.json_schema({"enum": CITIES}),
            lambda text: json.loads(text) in CITIES,
        ),
        "another schema": (
            lm.rewards.json_schema({"enum": WEIGHTS}),
            lambda text: json.loads(text) in WEIGHTS,
        ),
        "a pattern": (lm.rewards.regex("[a-f]{1,5}"), lambda text: re.fullmatch("[a-f]{1,5}", text)),
        "another pattern": (lm.rewards.regex("[0-9]{3}-[0-9]"), lambda text: re.fullmatch(r"\d{3}-\d", text)),
    }


class Compiled:
    """Count compilations."""

    def __init__(self):
        self.number, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.number, self.seconds = self.number + 1, self.seconds + duration


def main() -> None:
    """Print the table."""
    arguments = common.parser(__doc__).parse_args()
    number = 2000 if arguments.small else VOCABULARY
    sizes = SIZES | ({"num_layers": 2} if arguments.small else {})
    config = Config(vocab_size=number, tied=True, **sizes)
    network = Transformer.random(jax.random.key(0), config)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(network))
    model = lm.Model(network, lm.Vocabulary(tokens(number), eos="<end>"))
    method = lm.ParticleFilter(PARTICLES, step=lm.every(4))
    compiled, cells = Compiled(), {}
    for index, (name, (constraint, obeys)) in enumerate(runs().items()):
        before, start = (compiled.number, compiled.seconds), time.process_time()
        result = lm.infer(jax.random.key(index), model, PROMPT, constraint, method, max_tokens=TOKENS)
        texts = [text for text, w in zip(result.texts, result.log_weights, strict=True) if np.isfinite(w)]
        cells[name] = {
            "cpu_s": round(time.process_time() - start, 2),
            "programs": compiled.number - before[0],
            "compiling_s": round(compiled.seconds - before[1], 2),
            "alive": len(texts),
            "obeyed": sum(bool(obeys(text)) for text in texts),
        }
        print(name, cells[name], texts[:1], flush=True)
    rows = [[name, *map(str, cell.values())] for name, cell in cells.items()]
    header = ["run", "CPU s", "programs compiled", "of it compiling, s", "texts alive", "obeyed"]
    common.print_table(f"{parameters / 1e6:.0f} million parameters, {PARTICLES} particles", header, rows)
    if not arguments.small:
        settings = {"parameters": parameters, "particles": PARTICLES, "tokens": TOKENS, "vocabulary": number}
        common.write_results(NAME, {"settings": settings, "cells": cells})


if __name__ == "__main__":
    main()
