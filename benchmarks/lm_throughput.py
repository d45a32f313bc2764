"""How many tokens per CPU second do 32 particles generate, compared with ``transformers.generate``?

A Qwen2 of 28 million parameters (8 layers, width 512, 8 query and 2 key heads, 8192 tokens), 32 particles, a prompt of
64 tokens, float32, one thread. The weights are drawn by transformers, saved, and read by ``lm.checkpoints.load``. Two
processes alternate, one of each library, and report their own CPU seconds; the minimum of several rounds counts.

    decode        difference of runs with 48 and with 16 new tokens
    end to end    16 new tokens with the prompt: shared here, a batch of 32 equal prompts there
    resampling    systematic, after every token, weights of log-variance one, the cache forked by its ancestors

transformers gets its best settings: no gradients, eval mode, warm, scaled dot-product attention, a dynamic and a static
cache, of which the faster counts; sampling from all tokens on both sides, and greedy on both sides. Much of the gain
end to end is the shared prompt, not the decoding: read the two columns apart.

    OPENBLAS_NUM_THREADS=1 taskset -c 1 python benchmarks/lm_throughput.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

import common
import numpy as np

NAME = "lm_throughput"
PARTICLES, PROMPT, SHORT, LONG = 32, 64, 16, 48
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
ASKED = {"decode": 1.2, "end to end": 3.0, "resampling": 0.08, "first call": 15.0}


def draw(key, model, tokens, length, steps, room, method):
    """Tokens (steps, N) by inverse cumulative sums; ``way``: "sample", "greedy" or "resample" after every token."""
    import jax
    import jax.numpy as jnp

    from probinfer.lm.models.base import decode
    from probinfer.resampling import in_place, systematic

    hidden, prompt = model.prefill(tokens, length)
    logits = jnp.broadcast_to(model.head(hidden), (PARTICLES, model.vocab_size))

    def step(carry, t):
        logits, cache = carry
        pick_key, weight_key, ancestor_key = jax.random.split(jax.random.fold_in(key, t), 3)
        if method == "resample":
            log_weights = jax.random.normal(weight_key, (PARTICLES,))
            ancestors = in_place(systematic(ancestor_key, log_weights, PARTICLES)[0])
            cache, logits = model.gather(cache, ancestors), logits[ancestors]
        if method == "greedy":
            token = jnp.argmax(logits, axis=1).astype(jnp.int32)
        else:
            sums = jnp.cumsum(jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True)), axis=1)
            u = jax.random.uniform(pick_key, (PARTICLES, 1)) * sums[:, -1:]
            token = jnp.sum(sums <= u, axis=1).astype(jnp.int32)
        return decode(model, prompt, cache, token, jnp.full(PARTICLES, t, jnp.int32)), token

    start = (logits, model.init_cache(PARTICLES, room))
    return jax.lax.scan(step, start, jnp.arange(steps))[1]


def serve_ours(folder):
    """Answer requests (way, new tokens, seed) with CPU seconds and the number of compilations."""
    import jax
    import jax.numpy as jnp

    from probinfer.lm import checkpoints

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    model = checkpoints.load(folder)
    run = jax.jit(draw, static_argnums=(4, 5, 6))

    def answer(method, steps, seed):
        rng = np.random.default_rng(seed)
        size = PROMPT - seed % 7
        tokens = np.pad(rng.integers(0, model.vocab_size, size), (0, PROMPT - size)).astype(np.int32)
        before = len(compiled)
        key, tokens, length = jax.random.key(seed), jnp.asarray(tokens), jnp.asarray(size, jnp.int32)
        start = time.process_time()
        jax.block_until_ready(run(key, model, tokens, length, steps, LONG, method))
        return {"seconds": time.process_time() - start, "compilations": len(compiled) - before}

    def logits(tokens):
        return np.asarray(model.head(model.forward(jnp.asarray(tokens)[None])))[0].tolist()

    serve(answer, logits)


def serve_theirs(folder):
    """Answer requests (way, new tokens, seed) with CPU seconds."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation("sdpa")

    def answer(method, steps, seed):
        torch.manual_seed(seed)
        tokens = torch.randint(0, model.config.vocab_size, (1, PROMPT)).expand(PARTICLES, -1).contiguous()
        options = {"do_sample": False} if "greedy" in method else {"do_sample": True, "top_k": 0}
        options |= {"cache_implementation": "static"} if "static" in method else {}
        start = time.process_time()
        with torch.no_grad():
            generated = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=steps,
                min_new_tokens=steps,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
        assert generated.shape == (PARTICLES, PROMPT + steps)
        return {"seconds": time.process_time() - start, "compilations": 0}

    def logits(tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].numpy().tolist()

    serve(answer, logits)


def serve(answer, logits):
    """Read requests, one JSON list a line, until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        reply = logits(request[1]) if request[0] == "logits" else answer(*request)
        print(json.dumps(reply), flush=True)


class Worker:
    """A process of one library with one thread."""

    def __init__(self, side, folder):
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        env = os.environ | {"XLA_FLAGS": flags, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, "--serve", side, str(folder)]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *request):
        """Send one request and wait for its answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a worker stopped; see its output above")
        return json.loads(line)

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def save_model(folder):
    """Save a model of transformers with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES))
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def measure(rounds):
    """Measure the minimum CPU seconds by library, method and length, and the times of the first calls."""
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_model(folder)
        sides = {side: Worker(side, folder) for side in ("ours", "theirs")}
        methods = {
            "ours": ("sample", "greedy", "resample"),
            "theirs": ("sample", "greedy", "sample static", "greedy static"),
        }
        tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], PROMPT).tolist()
        ours, theirs = (np.asarray(sides[side].ask("logits", tokens)) for side in ("ours", "theirs"))
        todo = [(side, method, n) for side in sides for method in methods[side] for n in (SHORT, LONG)]
        first = {case: sides[case[0]].ask(*case[1:], 0) for case in todo}
        seconds: dict = {case: [] for case in todo}
        compilations = 0
        for turn in range(rounds):
            for case in todo:
                reply = sides[case[0]].ask(*case[1:], turn + 1)
                seconds[case].append(reply["seconds"])
                compilations += reply["compilations"]
        for worker in sides.values():
            worker.close()
    return {
        "parameters": parameters,
        "difference": float(abs(ours - theirs).max()),
        "first": {" ".join(map(str, case)): reply["seconds"] for case, reply in first.items()},
        "compilations": compilations,
        "seconds": {" ".join(map(str, case)): times for case, times in seconds.items()},
    }


def judge(measured):
    """Return tokens per CPU second, and the ratios to be compared with the required ones."""
    min_seconds = {name: min(times) for name, times in measured["seconds"].items()}

    def rates(side, method):
        short, long = min_seconds[f"{side} {method} {SHORT}"], min_seconds[f"{side} {method} {LONG}"]
        return PARTICLES * (LONG - SHORT) / (long - short), PARTICLES * SHORT / short

    table = {
        f"{side} {method}": rates(side, method)
        for side, methods in (
            ("ours", ("sample", "greedy", "resample")),
            ("theirs", ("sample", "greedy", "sample static", "greedy static")),
        )
        for method in methods
    }

    def best(method, column):
        return max(table[f"theirs {method}"][column], table[f"theirs {method} static"][column])

    ratios = {
        f"{quantity}, {method}": table[f"ours {method}"][column] / best(method, column)
        for column, quantity in enumerate(("decode", "end to end"))
        for method in ("sample", "greedy")
    }
    ratios["resampling"] = table["ours sample"][0] / table["ours resample"][0] - 1
    ratios["first call"] = max(s for name, s in measured["first"].items() if name.startswith("ours"))
    return table, ratios


def main():
    """Run the comparison and print it."""
    args = common.parser(__doc__).parse_args()
    measured = measure(1 if args.small else 7)
    table, ratios = judge(measured)
    rows = [[name, *(f"{value:.0f}" for value in values)] for name, values in table.items()]
    common.print_table("tokens a CPU second", ["", "decode", "end to end, 16 new"], rows)
    rows = [[name, f"{value:.3g}", str(ASKED.get(name.split(",")[0], ""))] for name, value in ratios.items()]
    rows.append(["compilations for other prompts", str(measured["compilations"]), "0"])
    rows.append(["largest difference of logits", f"{measured['difference']:.1e}", "1e-4"])
    common.print_table("ratios, ours / transformers; costs", ["", "measured", "asked"], rows)
    if not args.small:
        body = {"tokens_per_cpu_second": table, "ratios": ratios, "asked": ASKED, "runs": measured}
        common.write_results(NAME, body, ("flax", "torch", "transformers", "safetensors"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        {"ours": serve_ours, "theirs": serve_theirs}[sys.argv[2]](sys.argv[3])
    else:
        main()
