import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probinfer as pi
from probinfer.core.algorithms import Algorithm, algorithm
from probinfer.core.status import Status
from probinfer.running import checkpoint, fingerprint
from probinfer.running.checkpoint import Checkpoint


def same(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(plain(x), plain(y)), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(equal)


def plain(leaf) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def everything():
    return {
        "float": jnp.array([0.1, jnp.nan, -jnp.inf]),
        "half": jnp.ones(2, jnp.bfloat16),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 2),
        "empty": jnp.zeros((0, 2)),
        "flag": jnp.array(True),
        "nested": (jnp.int32(3), [jnp.arange(4)], None),
        "name with / and 'quotes'": jnp.ones(()),
    }


@pytest.mark.f32
def test_a_tree_comes_back_bit_for_bit(tmp_path):
    checkpoint.save(tmp_path / "tree", everything())
    back = checkpoint.restore(tmp_path / "tree", everything())
    assert np.isnan(back["float"][1])  # NaN differs from itself
    assert same({**back, "float": back["float"][::2]}, {**everything(), "float": everything()["float"][::2]})


def test_restore_refuses_what_does_not_fit(tmp_path):
    checkpoint.save(tmp_path / "tree", {"a": jnp.ones(3), "b": jnp.zeros(())})
    for like in (
        {"a": jnp.ones(4), "b": jnp.zeros(())},
        {"a": jnp.ones(3)},
        {"a": jnp.ones(3, int), "b": jnp.zeros(())},
    ):
        with pytest.raises(ValueError, match="another structure"):
            checkpoint.restore(tmp_path / "tree", like)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.restore(tmp_path / "nothing", {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="exists"):
        checkpoint.save(tmp_path / "tree", {"a": jnp.ones(3)})


def walk_step(scale, key, state):
    position, key_of_state = state
    move = scale * jax.random.normal(key, position.shape)
    return (position + move, jax.random.fold_in(key_of_state, 1)), {"move": move}


def walk(scale=0.5):
    return algorithm(walk_step, walk_step, jnp.asarray(scale))


def start(num=2):
    return jnp.zeros(num), jax.random.key(5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 12 steps with checkpoints, its folder and its result."""
    where = Checkpoint(tmp_path_factory.mktemp("run") / "run", every=3)
    return where, pi.run(jax.random.key(0), walk(), start(), 12, thin=2, checkpoint=where)


def test_checkpoints_change_no_draw(finished):
    where, result = finished
    assert same(pi.run(jax.random.key(0), walk(), start(), 12, thin=2), result)
    steps = sorted(entry.name for entry in Path(where.path).glob("step_*"))
    assert steps == [f"step_{step:012d}.part" for step in (4, 8, 12)]  # every 3 steps, in whole records


def test_a_finished_run_returns_its_result_again(finished):
    where, result = finished
    again = pi.run(jax.random.key(0), walk(), start(), 12, thin=2, checkpoint=where)
    assert same(again, result)


def test_the_run_continues_from_what_is_there(finished, tmp_path):
    where, result = finished
    partial = tmp_path / "partial"
    partial.mkdir()
    for name in ("about.json", "step_000000000004.part"):
        os.symlink(Path(where.path).absolute() / name, partial / name)
    left = partial / ".step_000000000008.part.17.draft"
    left.touch()
    again = pi.run(jax.random.key(0), walk(), start(), 12, thin=2, checkpoint=Checkpoint(partial, every=4))
    assert same(again, result)
    assert not left.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"key": jax.random.key(1)}, "key is"),
        ({"num_steps": 14}, "num_steps is 12 there and 14 here"),
        ({"thin": 3}, "thin is 2 there and 3 here"),
        ({"algorithm": walk(0.7)}, "algorithm is"),
        ({"algorithm": Algorithm(None, lambda key, state: (state, ()))}, "lambda"),
        ({"state": start(3)}, "state is"),
        ({"collect": pi.record_nothing}, "record_nothing"),
    ],
)
def test_a_checkpoint_of_a_different_run_is_refused(finished, change, said):
    where, _ = finished
    call = {
        "key": jax.random.key(0),
        "algorithm": walk(),
        "state": start(),
        "num_steps": 12,
        "thin": 2,
        **change,
    }
    with pytest.raises(ValueError, match="different run") as caught:
        pi.run(**call, checkpoint=where)
    assert said in str(caught.value)
    assert "choose another path" in str(caught.value)


def test_a_longer_run_is_told_to_start_from_the_state(finished):
    where, _ = finished
    with pytest.raises(
        ValueError, match=r"num_steps is 12 there and 20 here.*num_draws.*from the state it returns"
    ):
        pi.run(jax.random.key(0), walk(), start(), 20, thin=2, checkpoint=where)


def test_steps_without_a_description_are_refused(finished, tmp_path):
    os.symlink(
        Path(finished[0].path).absolute() / "step_000000000004.part", tmp_path / "step_000000000004.part"
    )
    with pytest.raises(ValueError, match=r"no about\.json"):
        checkpoint.claimed(Checkpoint(tmp_path), {}).__enter__()


def fragile_step(key, state):
    return jnp.where(state > 4.5, jnp.nan, state + 1), ()


def test_a_stopped_run_stays_stopped(tmp_path):
    where = Checkpoint(tmp_path, every=4)
    for _ in range(2):
        state, history = pi.run(
            jax.random.key(0), Algorithm(None, fragile_step), jnp.zeros(()), 9, checkpoint=where
        )
        assert state == 5
        assert history.status == Status.NON_FINITE
        assert history.num_steps == 5


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoint("somewhere", every=0)
    assert Checkpoint("somewhere", every=7).child("warmup") == Checkpoint(Path("somewhere/warmup"), every=7)


PROGRAM = """
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np, blackjax
import probinfer as pi
from probinfer.running import checkpoint

folder, kill_at, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
append = checkpoint.append

def append_or_die(store, step, *rest):
    if step == kill_at:  # half of this checkpoint is on disk
        (store.folder / f".step_{step:012d}.part.1.draft").write_bytes(b"probinfer part 1")
        os.kill(os.getpid(), signal.SIGKILL)
    append(store, step, *rest)

checkpoint.append = append_or_die
logdensity_fn = lambda x: -0.5 * jnp.sum(x**2 / jnp.array([1.0, 9.0]))
kernel = blackjax.hmc(logdensity_fn, 0.5, jnp.ones(2), 3)
where = checkpoint.Checkpoint(folder, every=10) if folder != "-" else None
state, history = pi.run(jax.random.key(0), kernel, kernel.init(jnp.ones(2)), 40, checkpoint=where)
np.save(out, history.records[0].position)
"""


def start_process(tmp_path, *args):
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    return subprocess.Popen([sys.executable, str(script), *map(str, args)], stderr=subprocess.PIPE, text=True)


def test_a_killed_run_continues_to_the_same_draws(tmp_path):
    """The process is really killed (SIGKILL), in the middle of a checkpoint; a new one takes over."""
    folder = tmp_path / "run"
    undisturbed = start_process(tmp_path, "-", -1, tmp_path / "undisturbed.npy")
    killed = start_process(tmp_path, folder, 30, tmp_path / "killed.npy")
    assert killed.wait(300) == -signal.SIGKILL
    assert not (tmp_path / "killed.npy").exists()
    assert (folder / "step_000000000020.part").is_file()
    resumed = start_process(tmp_path, folder, -1, tmp_path / "resumed.npy")
    for process in (undisturbed, resumed):
        assert process.wait(300) == 0, process.stderr.read()
    expected = np.load(tmp_path / "undisturbed.npy")
    assert expected.shape == (40, 2)
    np.testing.assert_array_equal(np.load(tmp_path / "resumed.npy"), expected)
    for process in (undisturbed, killed, resumed):
        process.stderr.close()


def closure(scale):
    def step(key, state):
        return state * scale, ()

    return step


def test_a_fingerprint_tells_functions_and_data_apart():
    def as_digest(fn, *args):
        return fingerprint.digest(jax.tree_util.Partial(fn, *args))

    assert as_digest(closure(2.0)) == as_digest(closure(2.0))
    assert as_digest(closure(2.0)) != as_digest(closure(3.0))
    assert as_digest(closure(jnp.ones(2))) != as_digest(closure(jnp.zeros(2)))
    assert as_digest(walk_step, jnp.ones(2)) == as_digest(walk_step, jnp.ones(2))
    assert as_digest(walk_step, jnp.ones(2)) != as_digest(walk_step, jnp.ones(3))
    assert as_digest(lambda key, state: state + 1) != as_digest(lambda key, state: state + 2)
    assert fingerprint.digest({"a": 1.0}) != fingerprint.digest({"b": 1.0})
    assert fingerprint.digest(jax.random.key(0)) != fingerprint.digest(jax.random.key(1))


def test_a_description_survives_json():
    about = fingerprint.describe(jax.random.key(0), {"step": walk().step}, start(), 5, 1)
    assert json.loads(json.dumps(about)) == about
    assert about["functions"] == ["walk_step"]
