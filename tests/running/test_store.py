"""The store: parts that are whole or absent, bound to their run and name, in a folder that one process works on."""

import errno
import os
import resource
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.core.errors import DamagedFileError
from probinfer.running import checkpoint, sealed_files, store
from probinfer.running.checkpoint import Checkpoint

TREE = {"a": np.arange(3.0), "b": (np.zeros((0, 2), np.int32), np.array(True)), "key": jax.random.key(3)}
ABOUT = {"what": "a test", "numbers": [1, 2]}


def open_and_read(folder, like=TREE, name="one", about=ABOUT, **notes):
    with store.opened(folder, about) as it:
        return it.read(name, like, "delete it", **notes)


@pytest.fixture
def folder(tmp_path):
    with store.opened(tmp_path / "run", ABOUT) as it:
        it.write("one", TREE, rows=[0, 3])
    return tmp_path / "run"


@pytest.mark.f32
def test_a_part_comes_back_bit_for_bit(folder):
    back = open_and_read(folder, rows=[0, 3])
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    assert back["key"] == TREE["key"]
    for name in ("a", "b"):
        jax.tree.map(np.testing.assert_array_equal, back[name], TREE[name])
    assert back["b"][0].dtype == np.int32


@pytest.mark.parametrize("name", ["one.part", "about.json"])
def test_every_flipped_byte_and_every_missing_one_is_found(folder, name):
    """A bit of each byte, and every length: nothing about a damaged file is left to chance."""
    file = folder / name
    whole = file.read_bytes()
    leaves, notes = [leaf for leaf, _ in store._leaves(TREE)], {"part": "one", "rows": [0, 3]}
    read = {
        "one.part": lambda: sealed_files.read_part(
            file, leaves, {"run": sealed_files.seal(ABOUT), **notes}, "!"
        ),
        "about.json": lambda: sealed_files.read_json(file, "!"),
    }[name]
    read()
    flipped = [whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :] for i in range(len(whole))]
    for damaged in [*flipped, *(whole[:i] for i in range(len(whole))), whole + b"\0", whole[1:]]:
        file.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=f"{name}.*!$"):
            read()


def test_damage_is_said_where_a_store_is_opened(folder):
    (folder / "about.json").write_text("[" * 100_000)
    with pytest.raises(DamagedFileError, match=r"about\.json is damaged .*delete"):
        open_and_read(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": [0, 2]}, r"rows is \[0, 3\] there and \[0, 2\] here"),
        ({"like": {**TREE, "a": np.arange(2.0)}}, r"0\['a'\] is float64\[3\] there and float64\[2\] here"),
        ({"like": {**TREE, "a": np.arange(3)}}, r"float64\[3\] there and int64\[3\] here"),
        ({"like": {**TREE, "key": jax.random.key_data(TREE["key"])}}, "of a key of"),
        ({"about": {**ABOUT, "what": "else"}}, "different run: what is a test there and else here"),
    ],
)
def test_what_is_whole_and_something_else_is_refused(folder, change, said):
    with pytest.raises(ValueError, match=said):
        open_and_read(folder, **{"rows": [0, 3], **change})


def test_a_part_of_another_name_or_run_is_refused(folder, tmp_path):
    os.rename(folder / "one.part", folder / "two.part")
    with pytest.raises(ValueError, match="part is one there and two here"):
        open_and_read(folder, name="two", rows=[0, 3])
    with store.opened(tmp_path / "other", {"what": "else"}):
        os.rename(folder / "two.part", tmp_path / "other" / "one.part")
    with pytest.raises(ValueError, match="run is"):
        open_and_read(tmp_path / "other", about={"what": "else"}, rows=[0, 3])


def test_a_missing_checkpoint_between_others_is_refused(tmp_path):
    where = Checkpoint(tmp_path / "run")
    cursor, records = jnp.zeros(()), {"x": jnp.arange(4.0)}
    with checkpoint.claimed(where, ABOUT) as it:
        for step in (2, 4):
            checkpoint.append(it, step, cursor, records, (step - 2, step))
    for gone, said in (("step_000000000004", None), ("step_000000000002", "rows is")):
        os.rename(tmp_path / "run" / f"{gone}.part", tmp_path / "kept")
        with checkpoint.claimed(where, ABOUT) as it:
            if said is None:
                _, found, row = checkpoint.resume(it, cursor, records, 1)
                assert row == 2
                assert found["x"][:2].tolist() == [0, 1]
            else:
                with pytest.raises(ValueError, match=f"{said}.*delete it and the later ones"):
                    checkpoint.resume(it, cursor, records, 1)
        os.rename(tmp_path / "kept", tmp_path / "run" / f"{gone}.part")


# One process at a time


def test_a_folder_in_use_is_refused(folder):
    said = f"in use by process {os.getpid()} on .*another path"
    with store.opened(folder, ABOUT), pytest.raises(RuntimeError, match=said):
        open_and_read(folder)
    open_and_read(folder, rows=[0, 3])


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+b")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_the_lock_dies_with_its_process(folder):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder / "lock")], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(RuntimeError, match="in use"):
        open_and_read(folder)
    other.send_signal(signal.SIGKILL)
    other.wait()
    other.stdout.close()
    open_and_read(folder, rows=[0, 3])


def test_a_path_that_cannot_be_a_folder_is_refused(folder):
    with pytest.raises(ValueError, match=r"no folder.*another path"):
        open_and_read(folder / "one.part")


# A full disk


def test_a_file_that_cannot_be_written_leaves_nothing(folder):
    """The system itself refuses: no file may be larger than 4096 bytes."""
    before = sorted(folder.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with store.opened(folder, ABOUT) as it:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(
                OSError, match=r"large\.part could not be written .*no room: free some"
            ) as caught:
                it.write("large", {"a": np.zeros(10_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.errno == errno.EFBIG
        assert sorted(folder.iterdir()) == before
        it.write("large", {"a": np.zeros(10_000)})  # once there is room
    open_and_read(folder, rows=[0, 3])


@pytest.mark.parametrize(
    "interruption", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch, interruption):
    sealed_files.write_json(tmp_path / "file", {"a": 1})

    def fail(handle):
        raise interruption

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(interruption)):
        sealed_files.write_json(tmp_path / "file", {"a": 2})
    assert sealed_files.read_json(tmp_path / "file", "") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
