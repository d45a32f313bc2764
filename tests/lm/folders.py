"""Checkpoint folders that tests write: a recorded transformer with letters as tokens, and a tiny random reasoner."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from probinfer.lm.models.transformer import Config, Transformer
from probinfer.lm.reasoner import encoding, files
from probinfer.lm.rewards.model import RewardModel

RECORDED = Path(__file__).parent / "recorded"
WORDS = ["<end>", "\n", ".", *"abcdefghijklmnopqrstuvwxyz0123456789 "]


def lettered(folder, name="llama", words=WORDS, chat=None):
    """A recorded checkpoint, and a tokenizer with a token a letter."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    shutil.copytree(RECORDED / name, folder)
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<end>"} | ({} if chat is None else {"chat_template": chat})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def reasoner(folder):
    """What the package calls the folder of the reasoner, with weights that know nothing."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    config = Config(vocab_size=len(encoding.TOKENS), max_context=128, qkv_bias=True, tied=True, **shape)
    model = Transformer.random(jax.random.key(0), config)
    files.write_model(folder, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model))
    weight = jax.random.normal(jax.random.key(1), (16,), jnp.float32)
    files.write_reward(folder, RewardModel(model, weight, jnp.float32(0.5)))
    return folder
