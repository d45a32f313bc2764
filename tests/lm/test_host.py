"""Python functions as scores: values against plain calls, faults contained and counted, workers that come and go."""

import gc
import math
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.lm import tokens
from probinfer.lm.models.base import Context
from probinfer.lm.rewards.base import View
from probinfer.lm.rewards.host import workers
from probinfer.lm.rewards.host.function_score import HostScore

WORDS = tokens.Vocabulary(("a", "b", "c", "."), eos=".")


def views(texts, prompt="ab", active=None, step=None):
    """A view of particles with these texts."""
    rows = [WORDS.encode(text) for text in texts]
    width = max(map(len, rows))
    array = jnp.asarray([np.pad(row, (0, width - len(row)), constant_values=2) for row in rows], jnp.int32)
    length = jnp.asarray([len(row) for row in rows], jnp.int32)
    padded = np.pad(WORDS.encode(prompt), (0, 4 - len(prompt)), constant_values=2)
    context = Context(jnp.asarray(padded, jnp.int32), jnp.int32(len(prompt)))
    on = jnp.ones(len(rows), bool) if active is None else jnp.asarray(active)
    no = jnp.zeros(len(rows), bool)
    return View(context, array, length, array, length, on, no, no, jnp.zeros(len(rows)), jnp.int32(0))


@jax.jit
def score(host, view):
    return host.step(host.init(view.context, view.tokens.shape[0]), view)[1]


def ask(host, texts, **options):
    return np.asarray(score(host, views(texts, **options)))


def count_letters(prompt, text):
    return (text.count("a") + len(prompt)) / 10


@pytest.mark.f32
def test_values_are_those_of_the_function(dtype):
    host = HostScore(count_letters, WORDS, workers=0)
    texts = ["a", "abca", "bcb.", ".", "aaaaaaaa"]
    values = ask(host, texts)
    expected = [count_letters("ab", text.removesuffix(".")) for text in texts]
    assert values.dtype == dtype
    np.testing.assert_allclose(1 / (1 + np.exp(-values)), expected, rtol=1e-6)
    assert values[-1] == np.inf, "probability one"
    assert host.scale == "logit"
    assert ask(HostScore(lambda prompt, text: 0, WORDS, workers=0), ["a"]).tolist() == [-np.inf]


@pytest.mark.parametrize(("scale", "kind"), [("logit", "logit"), ("log", "log")])
def test_other_scales_pass_numbers_on(scale, kind):
    answers = {"a": -2.5, "b": -math.inf, "c": np.float32(0.5), "aa": np.array(3), "ab": True}
    host = HostScore(lambda prompt, text: answers[text], WORDS, scale=scale, workers=0)
    assert host.scale == kind
    assert ask(host, list(answers)).tolist() == [-2.5, -np.inf, 0.5, 3.0, 1.0]
    assert not host.faults.counts


def faulty(prompt, text):
    match text:
        case "a":
            raise ValueError("no a, please")
        case "b":
            import time

            time.sleep(60)
        case "c":
            import os

            os._exit(3)
        case "ab":
            return "0.5"
        case "ac":
            return float("nan")
        case "ba":
            return 1.5
        case "bb":
            raise SystemExit
        case "bc":
            return None
    print("what a function prints disturbs nobody")
    return 0.5


FAULTS = {
    "a": "exception",
    "b": "time-out",
    "c": "crash",
    "ab": "not a number",
    "ac": "NaN",
    "ba": "out of range",
    "bb": "exception",
    "bc": "not a number",
}


def test_each_fault_costs_its_particle_and_is_counted():
    host = HostScore(pickled_by_value(faulty), WORDS, timeout=1.5, workers=2)
    values = ask(host, [*FAULTS, "ca", "cb", "cc"])
    assert values.tolist() == [-np.inf] * 8 + [0.0] * 3
    expected = {kind: list(FAULTS.values()).count(kind) for kind in FAULTS.values()}
    assert host.faults.counts == expected
    assert host.faults.num_scored == host.faults.num_calls == 11
    assert "ValueError: no a, please" in host.faults.first
    assert "worker.py" not in host.faults.first
    assert str(host.faults).startswith("8 of 11 scores lost: 2 by exception")
    assert ask(host, ["ccc", "cca"]).tolist() == [0.0, 0.0], "the workers were replaced"
    host.reset()
    assert str(host.faults) == "no faults in 0 scores (0 calls)"
    host.close()
    assert ask(host, ["caa"]).tolist() == [0.0], "workers come back after a close"
    host.close()


def pickled_by_value(fn):
    """A copy that cloudpickle sends as code, as it does with functions of notebooks."""
    import types

    return types.FunctionType(
        fn.__code__, {"__builtins__": __builtins__, "__name__": "__main__"}, fn.__name__
    )


def test_faults_in_this_process_too():
    host = HostScore(faulty, WORDS, workers=0)
    assert ask(host, ["a", "ab", "ac", "ba", "bc", "cc"]).tolist() == [-np.inf] * 5 + [0.0]
    assert host.faults.counts == {"exception": 1, "not a number": 2, "NaN": 1, "out of range": 1}
    infinite = HostScore(lambda prompt, text: np.inf, WORDS, scale="log", workers=0)
    assert ask(infinite, ["a"]).tolist() == [-np.inf]
    assert infinite.faults.counts == {"out of range": 1}


def test_a_function_that_the_worker_cannot_load_is_a_fault():
    class Bomb:
        def __reduce__(self):
            return (int, ("no number",))

        def __call__(self, prompt, text):
            return 1.0

    host = HostScore(Bomb(), WORDS, workers=1)
    assert ask(host, ["a", "b"]).tolist() == [-np.inf, -np.inf]
    assert host.faults.counts == {"not loaded": 2}
    assert "invalid literal" in host.faults.first
    host.close()


def test_equal_texts_are_asked_once_and_answers_are_remembered():
    calls = []

    def fn(prompt, text):
        calls.append(text)
        return 0.5

    host = HostScore(fn, WORDS, workers=0, memory=3)
    ask(host, ["a", "b", "a", "a", "a."])
    assert calls == ["a", "b"]
    ask(host, ["b", "c"])
    assert calls == ["a", "b", "c"]
    ask(host, ["b", "a"], prompt="c")
    assert calls == ["a", "b", "c", "b", "a"], "another prompt is another question"
    ask(host, ["c"])
    assert len(calls) == 5
    ask(host, ["a"])
    assert len(calls) == 6, "the longest unused answer was forgotten"
    assert host.faults.num_calls == 6
    assert host.faults.num_scored == 11


def test_inactive_particles_are_not_asked():
    asked = []
    host = HostScore(lambda prompt, text: asked.append(text) or 0.75, WORDS, workers=0)
    values = ask(host, ["a", "b", "c"], active=[True, False, True])
    assert asked == ["a", "c"]
    np.testing.assert_allclose(values, [np.log(3), 0, np.log(3)], rtol=1e-6)


def test_several_prompts_are_served_at_once():
    seen = []

    def fn(prompt, text):
        seen.append(threading.get_ident())
        return len(prompt) / 10 if "a" in text else len(text) / 10

    host = HostScore(fn, WORDS, workers=0)
    many = [views(["ab", "c"], prompt=p) for p in ("a", "ab", "abc")]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
    single = np.stack([score(host, view) for view in many])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda view: score(host, view)))(stacked), single)
    nested = jax.tree.map(lambda leaf: leaf[None], stacked)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(lambda view: score(host, view)))(nested)[0], single)
    shared = many[0]._replace(tokens=stacked.tokens, length=stacked.length)
    axes = jax.tree.map(lambda _: None, many[0])._replace(tokens=0, length=0)
    again = jax.vmap(lambda view: score(host, view), in_axes=(axes,))(shared)
    np.testing.assert_array_equal(again, np.stack([single[0]] * 3))


def test_steps_follow_their_particle():
    told = []

    def fn(prompt, steps):
        told.append((prompt, steps))
        return 0.5

    host = HostScore(fn, WORDS, workers=0, takes="steps", max_steps=3)

    step = jax.jit(host.step)

    def advance(state, view):
        return jax.block_until_ready(step(state, view))[0]

    state = host.init(views(["a", "b"]).context, 2)
    state = advance(state, views(["a", "bb"]))
    state = host.gather(state, jnp.array([1, 1]))
    state = advance(state, views(["bbc", "bba"]))
    state = advance(state, views(["bbcaa", "bba"], active=[True, False]))
    assert told == [
        ("ab", ["a"]),
        ("ab", ["bb"]),
        ("ab", ["bb", "c"]),
        ("ab", ["bb", "a"]),
        ("ab", ["bb", "c", "aa"]),
    ]
    state = advance(state, views(["bbcaab", "bbaab"]))
    assert told[-2:] == [("ab", ["bb", "c", "aab"]), ("ab", ["bb", "a", "ab"])], "joined to the last step"


def test_the_time_limit_starts_with_the_call():
    def slow(prompt, text):
        import time

        time.sleep(0.15)
        return 0.5

    host = HostScore(slow, WORDS, workers=1, timeout=0.6)
    ask(host, ["a", "b", "c", "aa", "bb"])  # 0.75 s in a queue of one worker
    assert not host.faults.counts, str(host.faults)
    host.close()


def test_workers_import_no_jax_and_start_quickly():
    def modules(prompt, text):
        import sys

        return float(any(name in sys.modules for name in ("jax", "numpy", "probinfer")))

    host = HostScore(modules, WORDS, workers=1)
    start = time.process_time()
    assert ask(host, ["a"]).tolist() == [-np.inf], "none of them is there"
    assert time.process_time() - start < 5.0
    host.close()


def alive(pid):
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def pid_of(host):
    return host.host.pool._processes[0]._process.pid


def test_workers_end_with_the_score():
    host = HostScore(lambda prompt, text: 0.5, WORDS, workers=1)
    host.step((), views(["a"]))
    pid = pid_of(host)
    assert alive(pid)
    del host
    jax.clear_caches()  # compiled programs hold the score
    gc.collect()
    assert not alive(pid)


SCRIPT = """
import importlib.util, os, sys, cloudpickle
spec = importlib.util.spec_from_file_location("workers", sys.argv[1])
workers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(workers)
def fn(prompt, text):
    import os, time
    print(os.getpid(), os.getppid() == parent, file=open(PIDS, "a"), flush=True)
    time.sleep(60 if text == "hang" else 0)
    return 1.0
parent = os.getpid()
pool = workers.Pool(cloudpickle.dumps(fn), 2, 50.0)
print([reply.value for reply in pool.map([("", "a"), ("", "b")])], flush=True)
pool.map([("", text) for text in sys.argv[2:]])
"""


def start_script(tmp_path, *texts):
    """A plain script, without main guard, that scores two texts and then these."""
    (tmp_path / "script.py").write_text(SCRIPT.replace("PIDS", repr(str(tmp_path / "pids"))))
    path = {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    command = [sys.executable, str(tmp_path / "script.py"), workers.__file__, *texts]
    return subprocess.Popen(command, env={**os.environ, **path}, stdout=subprocess.PIPE, text=True)


def pids_of(tmp_path, num):
    """The workers of a script, once they have been called ``num`` times."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        lines = (tmp_path / "pids").read_text().splitlines() if (tmp_path / "pids").exists() else []
        if len(lines) >= num:
            assert all(line.endswith("True") for line in lines)
            return {int(line.split()[0]) for line in lines}
        time.sleep(0.01)
    raise AssertionError("the script called nothing")


def test_a_script_without_main_guard_ends_with_its_workers(tmp_path):
    process = start_script(tmp_path)
    assert process.communicate(timeout=60)[0] == "[1.0, 1.0]\n"
    assert not any(map(alive, pids_of(tmp_path, 2)))


def test_workers_end_when_their_parent_is_killed_even_in_a_call(tmp_path):
    process = start_script(tmp_path, "hang")
    pids = pids_of(tmp_path, 3)
    process.kill()
    process.communicate()
    assert ended(pids)


def ended(pids):
    """Whether processes end within seconds (they may wait for somebody to collect them)."""
    deadline = time.monotonic() + 10
    while any(alive(pid) and not _is_zombie(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(alive(pid) and not _is_zombie(pid) for pid in pids)


def test_what_a_hung_call_has_started_ends_too(tmp_path):
    note = str(tmp_path / "pid")

    def spawn(prompt, text):
        import subprocess

        child = subprocess.Popen(["sleep", "60"])
        with open(note, "w") as file:
            file.write(str(child.pid))
        child.wait()

    host = HostScore(spawn, WORDS, workers=1, timeout=1.5)
    assert ask(host, ["a"]).tolist() == [-np.inf]
    assert host.faults.counts == {"time-out": 1}
    assert ended([int((tmp_path / "pid").read_text())])


def _is_zombie(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return False


def test_no_retrace_for_equal_shapes(count_compiles):
    host = HostScore(count_letters, WORDS, workers=0)
    ask(host, ["aa", "b"])
    with count_compiles() as compiled:
        ask(host, ["cc", "a"])
    assert compiled.count == 0


def test_settings_are_refused_in_words():
    with pytest.raises(TypeError, match="needs a function of"):
        HostScore(3, WORDS)
    for bad in ({"takes": "tokens"}, {"scale": "percent"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be one of"):
            HostScore(count_letters, WORDS, **bad)
    for bad in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="timeout must be positive seconds"):
            HostScore(count_letters, WORDS, timeout=bad)
    for name, value in (("workers", -1), ("memory", -1), ("max_steps", 0)):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            HostScore(count_letters, WORDS, **{name: value})
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"cannot be sent to a worker process .* or use workers=0"):
        HostScore(lambda prompt, text: lock.locked(), WORDS, workers=1)
