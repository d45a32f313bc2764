"""Checkpoints that transformers wrote, against the logits and the greedy texts that it recorded."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.lm import checkpoints
from probinfer.lm.models.base import decode
from probinfer.lm.models.checkpoints.configs import parse_config
from probinfer.lm.models.transformer import Transformer
from probinfer.lm.models.transformer.rope import frequencies

FOLDER = Path(__file__).parent / "recorded"
NAMES = sorted(path.name for path in FOLDER.iterdir())
NEW, BUCKET, EVERY = 64, 16, 4


def recorded(folder):
    found = np.load(folder / "recorded.npz")
    return [found[f"text{i}"] for i in range(3)], [found[f"logits{i}"] for i in range(3)]


@jax.jit
def whole(model, texts):
    return model.head(model.forward(texts))


@jax.jit
def greedy(model, prompts, lengths, forced, counts):
    """Texts of several prompts at once: after ``counts`` forced tokens the most probable one, 64 times."""

    def one(tokens, length, forced, count):
        hidden, prompt = model.prefill(tokens, length)

        def step(carry, t):
            logits, cache = carry
            token = jnp.where(t < count, forced[jnp.minimum(t, BUCKET - 1)], jnp.argmax(logits, -1))
            token = token.astype(jnp.int32)
            logits, cache = decode(model, prompt, cache, token, jnp.full(1, t, jnp.int32))
            return (logits, cache), (token[0], logits[0])

        start = (model.head(hidden)[None], model.init_cache(1, NEW + BUCKET))
        return jax.lax.scan(step, start, jnp.arange(NEW + BUCKET))[1]

    return jax.vmap(one)(prompts, lengths, forced, counts)


def compare(folder, scanned=None):
    """Every text without a cache, and with one, the prompt split in two at two places."""
    model = checkpoints.load(folder, scanned=scanned)
    texts, logits = recorded(folder)
    size = max(map(len, texts))
    mine = np.asarray(whole(model, jnp.asarray([np.pad(t, (0, size - len(t))) for t in texts])))
    cases = [(text, len(text) - NEW, split) for text in texts for split in (len(text) - NEW, 2)]
    prompts = jnp.asarray(
        [np.pad(text[:split], (0, BUCKET - split), constant_values=7) for text, _, split in cases]
    )
    forced = jnp.asarray([np.pad(text[split:], (0, BUCKET))[:BUCKET] for text, _, split in cases])
    lengths = jnp.asarray([split for *_, split in cases], jnp.int32)
    counts = jnp.asarray([real - split for _, real, split in cases], jnp.int32)
    tokens, along = map(np.asarray, greedy(model, prompts, lengths, forced, counts))
    for row, (text, real, split) in enumerate(cases):
        np.testing.assert_array_equal(tokens[row][: len(text) - split], text[split:])
        theirs = logits[row // 2]
        places = np.arange(len(text))[::EVERY]
        np.testing.assert_allclose(mine[row // 2][places], theirs, atol=1e-4)
        np.testing.assert_array_equal(np.argmax(mine[row // 2], -1)[real - 1 : len(text) - 1], text[real:])
        seen = places >= split
        np.testing.assert_allclose(along[row][places[seen] - split], theirs[seen], atol=1e-4)


@pytest.mark.f32
@pytest.mark.parametrize("name", NAMES)
def test_parity_with_recordings(name):
    compare(FOLDER / name)


def test_parity_of_scanned_layers():
    compare(FOLDER / "qwen2_window", scanned=True)


@pytest.mark.slow
def test_parity_live(tmp_path):
    pytest.importorskip("transformers")
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "recorder", Path(__file__).with_name("record_checkpoints.py")
    )
    recorder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recorder)
    recorder.main(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        compare(path)


def test_sharded_is_the_same():
    one, many = (checkpoints.load(FOLDER / name) for name in ("qwen3", "qwen3_sharded"))
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_dtypes_of_weights():
    model = checkpoints.load(FOLDER / "qwen3", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    assert checkpoints.load(FOLDER / "qwen3").dtype == jnp.float32
    texts, logits = recorded(FOLDER / "qwen3")
    mine = np.asarray(whole(model, jnp.asarray(texts[0])[None]))[0, ::EVERY]
    assert mine.dtype == np.float32
    # eight bits of mantissa; logits have a spread of about ten
    assert np.sqrt(np.mean((mine - logits[0]) ** 2)) < 0.05 * np.std(logits[0])


@pytest.fixture
def broken(tmp_path):
    """A copy of a checkpoint, and functions that change its configuration and its tensors."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(FOLDER / "qwen2_tied", folder)

    def configure(**entries):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    def tensors(change):
        from safetensors import numpy

        held = numpy.load_file(folder / "model.safetensors")
        change(held)
        numpy.save_file(held, folder / "model.safetensors")

    return folder, configure, tensors


def test_folder_errors(tmp_path, broken):
    folder, _, _ = broken
    with pytest.raises(FileNotFoundError, match="no folder"):
        checkpoints.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        checkpoints.load(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin may run code"):
        checkpoints.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "mamba"}, "'mamba'.*there is llama, qwen2, qwen3"),
        ({"architectures": ["Qwen2ForRewardModel"]}, "no language model"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
            "'longrope'.*there is default, linear",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "needs a factor"),
        ({"partial_rotary_factor": 0.5}, "0.5 of each head"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"hidden_size": None}, "'hidden_size'"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
    ],
)
def test_configuration_errors(broken, entries, message):
    folder, configure, _ = broken
    configure(**entries)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(folder)


def test_tensor_errors(broken):
    folder, configure, tensors = broken
    name = "model.layers.1.self_attn.k_proj.bias"
    tensors(lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": held[name]}))
    checkpoints.load(folder)  # harmless
    tensors(lambda held: held.update({"model.strange": held[name]}))
    with pytest.raises(ValueError, match=r"does not use: model\.strange"):
        checkpoints.load(folder)
    tensors(lambda held: held.pop("model.strange"))
    kept = {}
    tensors(lambda held: kept.update({name: held.pop(name)}))
    with pytest.raises(ValueError, match=f"lacks the tensors {name}"):
        checkpoints.load(folder)
    tensors(lambda held: held.update({name: kept[name][:3]}))
    with pytest.raises(ValueError, match=r"k_proj\.bias \(3,\) for \(16,\)"):
        checkpoints.load(folder)
    tensors(lambda held: held.update({name: kept[name].astype(np.int8)}))
    with pytest.raises(ValueError, match=r"bias \(I8\)"):
        checkpoints.load(folder)
    tensors(lambda held: held.update(kept))
    configure(tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*tie_word_embeddings"):
        checkpoints.load(folder)


def test_damaged_files(broken):
    folder, _, _ = broken
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:5], b"\xff" * 8 + content[8:], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cut off or damaged"):
            checkpoints.load(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(FOLDER / "qwen3_sharded", folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        checkpoints.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        checkpoints.load(folder)


def test_memory_is_predicted(monkeypatch):
    from probinfer.lm.models import memory

    model = checkpoints.load(FOLDER / "qwen3")
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(model)) == 4 * model.config.num_parameters()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(model.init_cache(5, 7))) == model.cache_bytes(5, 7)
    needed = memory.predicted_bytes(model, 5, 16, 7)
    assert needed >= 2 * model.cache_bytes(5, 7) + model.prompt_bytes(16)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**35)
    with pytest.raises(MemoryError, match=r"10000000 texts .* lower max_tokens"):
        memory.check_memory(model, 10**7, 16, 4096)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match="bfloat16"):
        checkpoints.load(FOLDER / "qwen3")


def test_old_words_of_rotations():
    """``rope_scaling`` beside ``rope_theta``, as older checkpoints have it."""
    raw = json.loads((FOLDER / "llama_llama3" / "config.json").read_text())
    new = parse_config(raw)
    said = raw.pop("rope_parameters")
    theta = said.pop("rope_theta")
    assert parse_config(raw | {"rope_scaling": said, "rope_theta": theta}) == new
    raw["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert parse_config(raw).max_context == 512


def test_dynamic_rotation_beyond_the_context():
    rope = checkpoints.read_config(FOLDER / "llama_dynamic").rope
    inside, beyond = (frequencies(rope, 8, 128, length)[0] for length in (128, 256))
    # base' = base (2 * 256 / 128 - 1)^(8 / 6): the slowest of four frequencies is base'^(-3/4)
    np.testing.assert_allclose(inside, 1e4 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(beyond[-1], (1e4 * 3 ** (4 / 3)) ** -0.75)


def test_model_type_of_what_is_loaded():
    assert isinstance(checkpoints.load(FOLDER / "llama"), Transformer)
