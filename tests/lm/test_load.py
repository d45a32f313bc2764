"""Folders become models: the same texts as the library that wrote them, and errors that say which file is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import lm
from probinfer.lm.reasoner import load as reasoner_load
from tests.lm import folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders.lettered(tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.mark.f32(slow=True)
def test_greedy_texts_are_those_that_transformers_wrote(folder):
    model = lm.load(folder, dtype=jnp.float32)
    text = np.load(folder / "recorded.npz")["text0"]
    prompt, rest = text[:5], text[5:]
    settings = {"answer": lm.answers.text, "max_tokens": 16, "progress": False}
    found = lm.infer(jax.random.key(0), model, prompt.tolist(), None, lm.Greedy(step=4), **settings)
    length = min(16, 1 + next((i for i, token in enumerate(rest) if token == 0), 16))  # 0 ends a text here
    np.testing.assert_array_equal(found.tokens[0], rest[:length])
    assert found.texts[0] == "".join(
        folders.WORDS[i] if i < len(folders.WORDS) else "" for i in rest[:length]
    )


def test_network_and_tokenizer_know_the_same_tokens(folder):
    model = lm.load(folder)
    assert model.tokenizer.vocab_size == model.network.vocab_size == 64
    assert model.tokenizer.eos_ids == (0,)
    assert model.reward is None
    assert model.tokenizer.decode(model.tokenizer.encode("a b")) == "a b"


def test_dtype_and_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    model = lm.load(f"~/{folder.name}", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.network)} == {jnp.dtype(jnp.bfloat16)}


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="never downloaded"):
        lm.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor tokenizer\.json"):
        lm.load(tmp_path)
    bare = folders.lettered(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json: copy it from the same checkpoint"):
        lm.load(bare)
    (bare / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model alone is not read"):
        lm.load(bare)


def test_a_tokenizer_of_another_model(tmp_path):
    words = [*folders.WORDS, *(f"word{i}" for i in range(40))]
    with pytest.raises(ValueError, match="do not belong together"):
        lm.load(folders.lettered(tmp_path / "large", words=words))


def test_the_reasoner_is_loaded_by_calling_its_package(tmp_path, monkeypatch):
    stored = folders.reasoner(tmp_path)
    monkeypatch.setattr(reasoner_load, "folder", lambda: stored)
    model = lm.reasoner()
    assert isinstance(model, lm.Model)
    assert model.reward.scale == "logit"
    assert {leaf.dtype for leaf in jax.tree.leaves(model.network)} == {jnp.dtype(jnp.float32)}
    problem = lm.reasoner.problems(0, 1)[0]
    assert model.tokenizer.decode(model.tokenizer.encode(problem.prompt)) == problem.prompt


def test_chains_are_read():
    for problem in lm.reasoner.problems(5, 20):
        assert lm.reasoner.parse(problem.prompt) == problem
    assert lm.reasoner.parse(" 7+5 *3 ").operations == "+*"


@pytest.mark.parametrize("text", ["", "7", "7 + ", "7 / 2", "7 + 11", "x + 1", "7 - -1", "1" + " + 1" * 11])
def test_other_texts_are_no_chains(text):
    with pytest.raises(ValueError, match="the reasoner knows chains"):
        lm.reasoner.parse(text)
