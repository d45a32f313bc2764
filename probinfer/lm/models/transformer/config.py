"""The configuration of a transformer: sizes, heads, windows, rotations. Hashable, so it can be a static argument."""

from __future__ import annotations

import dataclasses

from probinfer.lm.models.transformer.rope import Rope

__all__ = ["Config"]


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder-only transformer of the Llama, Qwen2 and Qwen3 families.

    Attributes:
        vocab_size: number of tokens V (rows of the embedding).
        hidden_size: width H of the residual stream.
        intermediate_size: width of the gated feed-forward layer.
        num_layers: number of blocks.
        num_heads: number of query heads; a multiple of ``num_kv_heads``.
        num_kv_heads: number of heads of keys and values; each serves ``num_heads // num_kv_heads`` query heads.
        head_dim: width D of a head, even; ``None``: hidden_size / num_heads.
        max_context: number of positions that the model was trained for, prompt and answer together.
        norm_eps: added to the mean square before its root.
        rope: the rotation of queries and keys.
        qkv_bias: queries, keys and values have a bias (Qwen2).
        out_bias: the product after attention has a bias.
        mlp_bias: the feed-forward products have biases.
        qk_norm: queries and keys are normalized in each head before the rotation (Qwen3).
        tied: the head is the embedding, transposed.
        windows: for each layer the number of positions that a query attends to, its own included; 0 means all. Empty:
            all, in all layers.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_context: int = 2048
    norm_eps: float = 1e-6
    rope: Rope = dataclasses.field(default_factory=Rope)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    windows: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None and self.num_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        object.__setattr__(self, "windows", tuple(self.windows) or (0,) * self.num_layers)
        self._check()

    def _check(self):
        sizes = (
            "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim max_context"
        )
        for name in sizes.split():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer; got {value!r}")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads; got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.width % 2:
            raise ValueError(f"head_dim must be even for the rotation of its halves; got {self.head_dim}")
        if len(self.windows) != self.num_layers or any(w < 0 for w in self.windows):
            raise ValueError(
                f"windows must be one number >= 0 for each of the {self.num_layers} layers (0: all positions); "
                f"got {self.windows}"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return int(self.num_kv_heads or self.num_heads)

    @property
    def width(self) -> int:
        """Width D of one head."""
        return int(self.head_dim or self.hidden_size // self.num_heads)

    @property
    def group(self) -> int:
        """Query heads G that share one head of keys and values."""
        return self.num_heads // self.kv_heads

    def num_parameters(self) -> int:
        """Number of weights."""
        h, f, d, q, k = self.hidden_size, self.intermediate_size, self.width, self.num_heads, self.kv_heads
        qkv = (q + 2 * k) * d
        block = h * qkv + q * d * h + 3 * h * f + 2 * h
        block += self.qkv_bias * qkv + self.out_bias * h + self.mlp_bias * (2 * f + h) + self.qk_norm * 2 * d
        return self.num_layers * block + (2 - self.tied) * self.vocab_size * h + h
