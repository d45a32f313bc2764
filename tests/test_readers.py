"""Every file that is read may be damaged, truncated or of somebody who means harm: one error, which names the file.

Each reader is given files with flipped bits, missing ends, values of other types, deep nesting and huge sizes. It may
read them if they are still what they should be; otherwise it raises a ValueError (or that a file is missing) with the
name of the file and what to do. (A part of a store, whose every byte is covered by its checksum, is in test_store.)
"""

import copy
import io
import json
import shutil
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probinfer import gp, lm
from probinfer.core.errors import DamagedFileError
from probinfer.data import table
from probinfer.gp.hyperparameters.fitting import Fit
from probinfer.gp.model.scaling import standardization
from probinfer.lm import checkpoints
from probinfer.lm.models.checkpoints.folder import _check, _files, _tensors
from probinfer.lm.reasoner import files
from tests.lm import folders

X = np.linspace(-1, 1, 6)[:, None]


def write_fit(folder):
    model = gp.Model(gp.kernels.RBF(1.0, jnp.ones(1)), gp.likelihoods.Gaussian(0.1))
    scaling = standardization(X, X[:, 0], outputs=True)
    stacked = jax.tree.map(lambda leaf: leaf[None], model)
    data = jnp.asarray(X), jnp.asarray(X[:, 0])
    fit = Fit(stacked, None, jnp.asarray(-3.0), None, gp.Exact(), scaling, *data, is_point=True)
    fit.save(folder / "fit.npz")


def write_table(folder):
    (folder / "table.csv").write_text('a,"b c",d\n1,2.5,"3"\n-4,5e3,6\n')


def look_at_weights(folder):
    _check(_tensors(_files(folder)), checkpoints.read_config(folder), folder)


# What makes the files, the file that is damaged, and what reads them.
READERS = {
    "fit": (write_fit, "fit.npz", lambda folder: gp.load(folder / "fit.npz")),
    "table": (write_table, "table.csv", lambda folder: table.read_csv(folder / "table.csv")),
    "config": (
        lambda folder: shutil.copytree(folders.RECORDED / "llama_llama3", folder, dirs_exist_ok=True),
        "config.json",
        checkpoints.read_config,
    ),
    "index": (
        lambda folder: shutil.copytree(folders.RECORDED / "qwen3_sharded", folder, dirs_exist_ok=True),
        "model.safetensors.index.json",
        look_at_weights,
    ),
    "weights": (
        lambda folder: shutil.copytree(folders.RECORDED / "qwen2_tied", folder, dirs_exist_ok=True),
        "model.safetensors",
        look_at_weights,
    ),
    "tokenizer": (
        lambda folder: write_tokenizer(folder),
        "tokenizer.json",
        lm.Tokenizer.from_folder,
    ),
    "settings of the tokenizer": (
        lambda folder: write_tokenizer(folder),
        "tokenizer_config.json",
        lm.Tokenizer.from_folder,
    ),
    "end tokens": (
        lambda folder: write_tokenizer(folder),
        "generation_config.json",
        lm.Tokenizer.from_folder,
    ),
}
IN_JSON = [name for name, (_, file, _) in READERS.items() if file.endswith(".json")]


def write_tokenizer(folder):
    made = folders.lettered(folder / "made", chat="{{ messages[0]['content'] }}")
    for path in made.iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, folder / path.name)
    shutil.rmtree(made)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1], "pad_token_id": 0}')


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def find(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
            READERS[name][0](made[name])
        return made[name]

    return find


def ends_in_one_error(name, folder, content):
    """Read a file of this content: it is read, or one error names it."""
    file, read = folder / READERS[name][1], READERS[name][2]
    whole = file.read_bytes()
    file.write_bytes(content)
    started = time.process_time()
    try:
        said = said_by(lambda: read(folder))
    finally:
        file.write_bytes(whole)
    assert said is None or file.name in said or folder.name in said
    assert said is None or len(said) < 3000
    assert time.process_time() - started < 20  # a thousand times what it takes


def said_by(read):
    """The words of the one error that reading may end in, None for none."""
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


def fuzz(num):
    return settings(
        max_examples=num,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def damaged(content):
    """Contents with a few bytes changed, cut off, put in, or repeated."""
    place = st.integers(0, len(content) - 1)

    def flip(places):
        changed = bytearray(content)
        for where, bit in places:
            changed[where] ^= 1 << bit
        return bytes(changed)

    flips = st.lists(st.tuples(place, st.integers(0, 7)), min_size=1, max_size=4).map(flip)
    cuts = place.map(lambda end: content[:end])
    inserted = st.tuples(place, st.binary(min_size=1, max_size=9)).map(
        lambda pair: content[: pair[0]] + pair[1] + content[pair[0] :]
    )
    left_out = st.tuples(place, place).map(lambda ends: content[: min(ends)] + content[max(ends) :])
    return flips | cuts | inserted | left_out | st.binary(max_size=40)


STRANGE = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 3, 10**30, -(2**63), 2**40, 1e308, float("nan"), float("inf")),
        *("", "text", "9" * 5000, "../../etc/passwd", "/etc/hostname", "\0"),
        *([], [0], [-1], [[1]], ["full_attention"], {}, {"a": [None]}),
    ]
)


def places(value, path=()):
    """The paths to all values inside of a JSON value, the whole of it included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:60]:
        yield from places(inner, (*path, key))


def replaced(content):
    """The JSON texts with one or two values replaced by strange ones, or left out, or wrapped a thousand times."""
    value = json.loads(content)
    paths = list(places(value))

    def change(changes):
        root = [json.loads(content)]
        for path, new in changes:
            *way, last = (0, *path)
            where = root
            try:
                for key in way:
                    where = where[key]
                where[last] = copy.deepcopy(new)
            except (KeyError, IndexError, TypeError):  # the first change took the place of the second
                continue
        return json.dumps(root[0]).encode()

    def wrap(pair):
        marked = change([(pair[0], "the mark")])
        depth = pair[1]
        return marked.replace(b'"the mark"', b"[" * depth + b"]" * depth).replace(b"\0", b"")

    changes = st.lists(st.tuples(st.sampled_from(paths), STRANGE), min_size=1, max_size=2)
    deep = st.tuples(st.sampled_from(paths), st.sampled_from([50, 900, 200_000]))
    return changes.map(change) | deep.map(wrap)


def check_bytes(name, folder_of, num):
    folder = folder_of(name)
    content = (folder / READERS[name][1]).read_bytes()

    @fuzz(num)
    @given(damaged(content))
    def run(changed):
        ends_in_one_error(name, folder, changed)

    READERS[name][2](folder)
    run()


def check_values(name, folder_of, num):
    folder = folder_of(name)

    @fuzz(num)
    @given(replaced((folder / READERS[name][1]).read_text()))
    def run(changed):
        ends_in_one_error(name, folder, changed)

    run()


@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes(name, folder_of):
    check_bytes(name, folder_of, 60)


@pytest.mark.parametrize("name", IN_JSON)
def test_strange_values(name, folder_of):
    check_values(name, folder_of, 80)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes_at_length(name, folder_of):
    check_bytes(name, folder_of, 3000)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_JSON)
def test_strange_values_at_length(name, folder_of):
    check_values(name, folder_of, 3000)


# Fits


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def as_npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_every_place_of_a_fit(folder_of):
    """Every 7th byte flipped and every 11th length: a fit that is read is the one that was written."""
    folder = folder_of("fit")
    path, content = folder / "fit.npz", (folder / "fit.npz").read_bytes()
    before = jax.tree.leaves(gp.load(path))
    try:
        for i in range(0, len(content), 7):
            path.write_bytes(content[:i] + bytes([content[i] ^ (1 << i % 8)]) + content[i + 1 :])
            found = []
            said = said_by(lambda found=found: found.extend(jax.tree.leaves(gp.load(path))))
            assert said is None or "fit.npz" in said
            if said is None:
                jax.tree.map(np.testing.assert_array_equal, found, before)
        for end in range(0, len(content), 11):
            path.write_bytes(content[:end])
            with pytest.raises(DamagedFileError, match=r"fit\.npz.*fit again"):
                gp.load(path)
    finally:
        path.write_bytes(content)


def test_a_fit_cannot_claim_more_than_its_bytes(folder_of, tmp_path):
    content = members(folder_of("fit") / "fit.npz")
    pack(tmp_path / "packed.npz", {**content, "a0.npy": bytes(2**26)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(DamagedFileError, match=r"packed\.npz.*more than its own size"):
        gp.load(tmp_path / "packed.npz")
    header = as_npy(np.zeros((2, 3))).replace(b"(2, 3)", b"(2**40,)".ljust(6))
    for shape in (b"(9**9, )", b"(999999999999, )"):
        header = as_npy(np.zeros(2)).replace(b"(2,), }" + b" " * (len(shape) - 4), shape + b", }")
        pack(tmp_path / "huge.npz", {**content, "a0.npy": header})
        with pytest.raises(DamagedFileError, match=r"huge\.npz"):
            gp.load(tmp_path / "huge.npz")
    pack(tmp_path / "objects.npz", {**content, "a0.npy": as_npy(np.array([{}], object))})
    with pytest.raises(DamagedFileError, match=r"objects\.npz"):
        gp.load(tmp_path / "objects.npz")


@fuzz(80)
@given(data=st.data())
def test_the_structure_of_a_fit(folder_of, tmp_path_factory, data):
    """The description is whole by its checksum and says strange things."""
    content = members(folder_of("fit") / "fit.npz")
    text = np.load(io.BytesIO(content["structure.npy"])).tobytes()
    changed = data.draw(replaced(text))
    path = tmp_path_factory.getbasetemp() / "strange.npz"
    pack(path, {**content, "structure.npy": as_npy(np.frombuffer(changed, np.uint8))})
    said = said_by(lambda: gp.load(path))
    assert said is None or "strange.npz" in said


# Tables


def test_cells_that_are_too_long(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,2\n3," + "4" * 200_000 + "\n")
    with pytest.raises(table.TableError, match=r"table\.csv, line 3: field larger.*correct or remove it"):
        table.read_csv(path)
    path.write_text('a,b\n1,"2\n' + "3,4\n" * 60_000)
    with pytest.raises(table.TableError, match=r"a quote is not closed"):
        table.read_csv(path)


def test_wide_tables_take_linear_time(tmp_path):
    """20 000 columns by 3 rows: the quadratic way took a minute."""
    path = tmp_path / "wide.csv"
    names = [f"column{i}" for i in range(20_000)]
    path.write_text("\n".join([",".join(names), *[",".join(["1.5"] * 20_000)] * 3]))
    started = time.process_time()
    assert table.read_csv(path, drop=tuple(names[:9000])).values.shape == (3, 11_000)
    assert time.process_time() - started < 5
    path.write_text(",".join([*names, "column7"]) + "\n1")
    with pytest.raises(table.TableError, match="column7"):
        table.read_csv(path)


# Checkpoints of language models


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/a/model.safetensors", "a/b.safetensors", "x.bin", 3, None]
)
def test_an_index_cannot_point_outside(folder_of, tmp_path, name):
    folder = tmp_path / "inside"
    shutil.copytree(folder_of("index"), folder)
    for path in folder.glob("*.safetensors"):
        shutil.copy(path, tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": name}})
    )
    with pytest.raises(ValueError, match=r"index\.json names .*plain names"):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 10**40}, "vocab_size"),
        ({"quantization_config": "gptq"}, "quantized"),
        ({"rope_parameters": "linear"}, "object"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "2"}}, "factor"),
        ({"architectures": 3}, "architectures"),
        ({"layer_types": 3}, None),
    ],
)
def test_strange_configurations(folder_of, tmp_path, entries, said):
    folder = tmp_path / "model"
    shutil.copytree(folder_of("config"), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    if said is None:  # of no meaning for this family
        checkpoints.read_config(folder)
        return
    with pytest.raises(ValueError, match=rf"config\.json.*{said}"):
        checkpoints.read_config(folder)


def test_a_damaged_reward_model_is_named(tmp_path):
    folder = folders.reasoner(tmp_path / "reasoner")
    path = folder / "reward" / "model.safetensors"
    files.read_reward(folder)
    content = path.read_bytes()
    for change in (content[:100], b"", content[:8] + b"[" * 200 + content[208:]):
        path.write_bytes(change)
        with pytest.raises(DamagedFileError, match=r"reward/model\.safetensors.*copy it again"):
            files.read_reward(folder)
    path.write_bytes(content)
    config = folder / "reward" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 32}))
    with pytest.raises(DamagedFileError, match=r"model\.safetensors: the tensors"):
        files.read_reward(folder)


def test_files_that_are_not_there_are_named(tmp_path):
    for read in (
        lambda: gp.load(tmp_path / "fit.npz"),
        lambda: checkpoints.read_config(Path(tmp_path) / "nothing"),
        lambda: files.read_reward(tmp_path),
    ):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            read()
