"""The transformer as a language model: weights are leaves, the configuration is static, the cache is an argument."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from probinfer.core.types import Array, Float, Int, PRNGKey, field, pytree
from probinfer.lm.models.transformer.attention import KeysAndValues, attend, causal, visible
from probinfer.lm.models.transformer.block import Block, Ends
from probinfer.lm.models.transformer.cache import Cache, fork, write
from probinfer.lm.models.transformer.config import Config
from probinfer.lm.models.transformer.rope import angles, frequencies

__all__ = ["Prompt", "Transformer"]


UNROLLED = 32  # maximum number of layers that are compiled one by one, at about 0.15 s each


@functools.cache
def _graphs(config: Config) -> tuple[Any, Any]:
    """Return the structure of a block and of the ends, without weights."""
    key = jax.random.key(0)
    block, ends = (
        nnx.split(nnx.eval_shape(functools.partial(module, key, config, jnp.float32)))[0]
        for module in (Block, Ends)
    )
    return block, ends


@pytree
class Prompt:
    """A prefilled prompt that all particles share.

    Attributes:
        keys: one array (K, S, D) for each layer, or all of them in one (L, K, S, D).
        values: likewise.
        length: () number of tokens of the prompt; the rest is padding.
    """

    keys: Any
    values: Any
    length: Any


@pytree
class Transformer:
    """A decoder-only transformer of the Llama, Qwen2 and Qwen3 families.

    Attributes:
        weights: ``{"ends": ..., "blocks": ...}`` of arrays; blocks are a tuple with one entry for each layer, or one
            entry whose arrays have a leading axis of layers.
        config: sizes and switches.
        fork: how ``gather`` forks, see ``cache.fork``.
    """

    weights: Any
    config: Config = field(static=True)
    fork: str | None = field(static=True, default=None)

    @classmethod
    def random(
        cls, key: PRNGKey, config: Config, dtype: Any = jnp.float32, scanned: bool | None = None
    ) -> Transformer:
        """Return a model with random weights to start training from: normal with variance 1 / fan-in.

        Args:
            key: random key.
            config: sizes and switches.
            dtype: dtype of the weights.
            scanned: see ``from_blocks``.
        """
        ends_key, *keys = jax.random.split(key, config.num_layers + 1)
        blocks = tuple(nnx.to_pure_dict(nnx.split(Block(key, config, dtype))[1]) for key in keys)
        ends = nnx.to_pure_dict(nnx.split(Ends(ends_key, config, dtype))[1])
        return cls.from_blocks(ends, blocks, config, scanned)

    @classmethod
    def from_blocks(
        cls, ends: Any, blocks: tuple[Any, ...], config: Config, scanned: bool | None = None
    ) -> Transformer:
        """Choose how the layers are stored.

        Args:
            ends: weights of ``Ends``.
            blocks: weights of each ``Block``.
            config: sizes and switches.
            scanned: one loop over stacked layers, whose compile time does not grow with depth, or layers one after
                another, which copies no weights (a fifth faster for 8 layers of width 512 on a CPU). ``None``: one
                after another up to 32 layers.
        """
        if len(blocks) > UNROLLED if scanned is None else scanned:
            return cls(
                {"ends": ends, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}, config
            )
        return cls({"ends": ends, "blocks": tuple(blocks)}, config)

    def __repr__(self) -> str:
        layers, size = self.config.num_layers, self.config.num_parameters() / 1e6
        shape = f"{layers} layer{'s' if layers > 1 else ''}, {self.vocab_size} tokens"
        return f"Transformer({shape}, {size:.2f} M parameters)"

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.config.vocab_size

    @property
    def max_context(self) -> int:
        """Positions of prompt and answer together."""
        return self.config.max_context

    @property
    def dtype(self) -> Any:
        """The dtype of the weights, of keys and of values."""
        return self.weights["ends"]["embedding"].dtype

    @property
    def scanned(self) -> bool:
        """Whether the weights of all layers are stacked and the layers run in one loop."""
        return not isinstance(self.weights["blocks"], tuple)

    def forward(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s h"]:
        """Return hidden states of whole sequences, without a cache; differentiable.

        Args:
            tokens: rows; padding, if any, is on the right.
        """
        return self._forward(tokens)[0]

    def prefill(self, tokens: Int[Array, "s"], length: Int[Array, ""]) -> tuple[Float[Array, "h"], Prompt]:
        """Read a prompt.

        Args:
            tokens: tokens, padded on the right.
            length: number of tokens that are not padding.

        Returns:
            The hidden state at the last token, and the keys and values that the particles share.
        """
        hidden, keys, values = self._forward(tokens[None])
        keys, values = jax.tree.map(lambda leaf: jnp.squeeze(leaf, -4), (keys, values))
        last = jnp.take(hidden[0], length - 1, axis=0, mode="clip")
        return last, Prompt(keys, values, length.astype(jnp.int32))

    def init_cache(self, num: int, max_len: int) -> Cache:
        """Return an empty cache.

        Args:
            num: number of particles N.
            max_len: room for tokens of each particle, T.
        """
        config = self.config
        shape, layers = (num, config.kv_heads, max_len, config.width), config.num_layers
        if self.scanned:
            return Cache(jnp.zeros((layers, *shape), self.dtype), jnp.zeros((layers, *shape), self.dtype))
        keys, values = (tuple(jnp.zeros(shape, self.dtype) for _ in range(layers)) for _ in range(2))
        return Cache(keys, values)

    def extend(
        self, prompt: Prompt, cache: Cache, tokens: Int[Array, "n s"], start: Int[Array, "n"]
    ) -> tuple[Float[Array, "n s h"], Cache]:
        """Read S more tokens of each particle.

        Args:
            prompt: state of the prompt, which the particles share.
            cache: private tokens so far.
            tokens: the new tokens.
            start: private position of the first new token; 0 is the first token after the prompt.

        Returns:
            Hidden states at the new tokens, and the cache with them. Tokens beyond the end of the cache are not stored.
        """
        private_positions = jnp.arange(_length(cache), dtype=jnp.int32)
        prompt_positions = jnp.arange(_length(prompt), dtype=jnp.int32)
        positions = start.astype(jnp.int32)[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        cos, sin = self._angles(prompt.length + positions)

        def layer(block, window, x, keys, values, prompt_keys, prompt_values):
            q, k, v = block.project(x, cos, sin)
            keys, values = write(keys, k, positions[:, 0]), write(values, v, positions[:, 0])
            private = KeysAndValues(keys, values, visible(positions, private_positions, window))
            mask = visible(prompt.length + positions, prompt_positions, window, prompt.length)
            shared = KeysAndValues(prompt_keys, prompt_values, mask)
            return block.finish(x, attend(q, private, shared)), keys, values

        x = self._ends().embed(tokens)
        x, keys, values = self._apply_layers(layer, x, cache, prompt)
        return self._ends().normalize(x), Cache(keys, values)

    def head(self, hidden: Float[Array, "*b h"]) -> Float[Array, "*b v"]:
        """Return the logits of the next token, float32 or wider.

        Args:
            hidden: hidden states from ``forward``, ``prefill`` or ``extend``.
        """
        return self._ends().logits(hidden)

    def gather(self, cache: Cache, ancestors: Int[Array, "m"]) -> Cache:
        """Fork: row m of the result is a copy of row ``ancestors[m]``."""
        return fork(cache, ancestors, self.fork)

    def cache_bytes(self, num: int, max_len: int) -> int:
        """Return the bytes of ``init_cache(num, max_len)``."""
        return num * self.prompt_bytes(max_len)

    def prompt_bytes(self, length: int) -> int:
        """Return the bytes of the keys and values of one sequence in all layers."""
        config = self.config
        return (
            2 * config.num_layers * config.kv_heads * config.width * length * jnp.dtype(self.dtype).itemsize
        )

    def _ends(self) -> Ends:
        return nnx.merge(_graphs(self.config)[1], self.weights["ends"])

    def _block(self, weights) -> Block:
        return nnx.merge(_graphs(self.config)[0], weights)

    def _angles(self, positions, length=None):
        omega, factor = frequencies(self.config.rope, self.config.width, self.config.max_context, length)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return angles(omega, factor, positions, wide.type)

    def _forward(self, tokens):
        """Return hidden states (B, S, H), keys and values of whole sequences."""
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        cos, sin = self._angles(positions[None], tokens.shape[1])

        def layer(block, window, x):
            q, k, v = block.project(x, cos, sin)
            k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
            return block.finish(x, causal(q, k, v, window)), k, v

        x, keys, values = self._apply_layers(layer, self._ends().embed(tokens))
        return self._ends().normalize(x), keys, values

    def _apply_layers(self, layer, x, cache=None, prompt=None):
        """Apply ``layer(block, window, x, ...)`` for all layers: unrolled, or in one loop."""
        if self.scanned:
            return self._scan_layers(layer, x, cache, prompt)
        keys, values = [], []
        for index, weights in enumerate(self.weights["blocks"]):
            past = () if cache is None else (cache.keys[index], cache.values[index])
            shared = () if prompt is None else (prompt.keys[index], prompt.values[index])
            block = self._block(weights)
            x, k, v = layer(block, self.config.windows[index], x, *past, *shared)
            keys.append(k)
            values.append(v)
        return x, tuple(keys), tuple(values)

    def _scan_layers(self, layer, x, cache, prompt):
        """Apply the layers in one loop; the cache is carried, so that only its new entries are written."""
        windows = set(self.config.windows)
        common = windows.pop() if len(windows) == 1 else None

        def window(index):
            return common if common is not None else jnp.asarray(self.config.windows, jnp.int32)[index]

        if cache is None:

            def body(x, item):
                index, weights = item
                x, k, v = layer(self._block(weights), window(index), x)
                return x, (k, v)

            x, (keys, values) = lax.scan(
                body, x, (jnp.arange(self.config.num_layers), self.weights["blocks"])
            )
            return x, keys, values

        def step(carry, item):
            x, keys, values = carry
            index, weights, shared = item
            x, k, v = layer(self._block(weights), window(index), x, keys[index], values[index], *shared)
            return (x, keys.at[index].set(k), values.at[index].set(v)), None

        items = (
            jnp.arange(self.config.num_layers),
            self.weights["blocks"],
            (prompt.keys, prompt.values),
        )
        (x, keys, values), _ = lax.scan(step, (x, cache.keys, cache.values), items)
        return x, keys, values


def _length(store) -> int:
    """Return the number of positions in a cache or a prompt."""
    return jax.tree.leaves(store.keys)[0].shape[-2]
