r"""Attention of many particles that share a prompt: two softmaxes with one normalizer.

With scores :math:`s_j` over the prompt and :math:`s'_j` over the private tokens of the particle, the output is
:math:`(\sum_j e^{s_j - m} v_j + \sum_j e^{s'_j - m} v'_j) / (\sum_j e^{s_j - m} + \sum_j e^{s'_j - m})`, m the largest
score: keys of prompt and particle need not be concatenated. The keys of the prompt are stored once, and the queries of
all particles are multiplied with them in one matrix product for each head of keys.

References:
    Vaswani et al. (2017), "Attention is all you need". Ainslie et al. (2023), "GQA: Training generalized multi-query
    transformer models". Juravsky et al. (2024), "Hydragen: High-throughput LLM inference with shared prefixes".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array, Bool, Float, Int

__all__ = ["KeysAndValues", "attend", "causal", "visible"]

BLOCK = 512  # queries at a time in self-attention of whole sequences: bounds the memory of the scores


class KeysAndValues(NamedTuple):
    """Keys and values, and which of them each query attends to.

    Attributes:
        keys: (..., K, T, D).
        values: (..., K, T, D).
        mask: (..., S, T) whether a query attends to a position.
    """

    keys: Float[Array, "*b K T D"]
    values: Float[Array, "*b K T D"]
    mask: Bool[Array, "*c S T"]


def visible(
    queries: Int[Array, "*b s"], keys: Int[Array, "t"], window: Any, limit: Any = None
) -> Bool[Array, "*b s t"]:
    """Return whether a query at position q attends to a key at position k: k <= q, q - k < window, k < limit.

    Args:
        queries: positions of the queries.
        keys: positions of the keys.
        window: width of the window, 0 for all; a Python number if all layers have the same, else an integer array.
        limit: first position that is padding, if any.
    """
    q, k = queries[..., None], keys
    mask = k <= q
    if not isinstance(window, int):
        mask &= (q - k < window) | (window == 0)
    elif window:
        mask &= q - k < window
    return mask if limit is None else mask & (k < limit)


def attend(
    query: Float[Array, "n s k g d"], private: KeysAndValues, shared: KeysAndValues | None = None
) -> Float[Array, "n s k g d"]:
    """Return the attention of S queries in each of N rows over private keys of the row and keys that all rows share.

    Args:
        query: queries, grouped as K heads of keys with G query heads each.
        private: keys and values (N, K, T, D), mask (N or 1, S, T); each query attends to at least one.
        shared: keys and values (K, P, D), mask (N or 1, S, P).

    Returns:
        Outputs, in the dtype of the query.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query = (query.astype(wide) * query.shape[-1] ** -0.5).astype(private.keys.dtype)
    scores = jnp.einsum("nskgd,nktd->nksgt", query, private.keys, preferred_element_type=wide)
    scores = jnp.where(private.mask[:, None, :, None], scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1)
    if shared is None:
        weights = jnp.exp(scores - largest[..., None])
        total, out = jnp.sum(weights, -1), _private_values(weights, private, wide)
    else:
        shared_scores = jnp.einsum("nskgd,kpd->nksgp", query, shared.keys, preferred_element_type=wide)
        shared_scores = jnp.where(shared.mask[:, None, :, None], shared_scores, -jnp.inf)
        # One maximum for both parts, so that neither exponential overflows.
        largest = jnp.maximum(largest, jnp.max(shared_scores, axis=-1))
        weights = jnp.exp(scores - largest[..., None])
        shared_weights = jnp.exp(shared_scores - largest[..., None])
        total = jnp.sum(weights, -1) + jnp.sum(shared_weights, -1)
        out = _private_values(weights, private, wide)
        shared_weights = shared_weights.astype(shared.values.dtype)
        out += jnp.einsum("nksgp,kpd->nksgd", shared_weights, shared.values, preferred_element_type=wide)
    out = (out / total[..., None]).astype(private.keys.dtype)
    return jnp.moveaxis(out, 1, 2)


def _private_values(weights, private, wide):
    weights = weights.astype(private.values.dtype)
    return jnp.einsum("nksgt,nktd->nksgd", weights, private.values, preferred_element_type=wide)


def causal(
    query: Float[Array, "n s k g d"],
    keys: Float[Array, "n k s d"],
    values: Float[Array, "n k s d"],
    window: Any,
) -> Float[Array, "n s k g d"]:
    """Return the attention of whole sequences over themselves, a block of queries at a time.

    Args:
        query: queries of each position.
        keys: keys of each position.
        values: values of each position.
        window: see ``visible``.

    Returns:
        Outputs, in the dtype of the query.
    """
    length = query.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)

    def attend_block(query, query_positions):
        mask = visible(query_positions, positions, window)[None]
        return attend(query, KeysAndValues(keys, values, mask))

    if length <= BLOCK or length % BLOCK:
        return attend_block(query, positions)
    blocks = jnp.moveaxis(query.reshape(query.shape[0], -1, BLOCK, *query.shape[2:]), 1, 0)
    out = lax.map(lambda pair: attend_block(*pair), (blocks, positions.reshape(-1, BLOCK)))
    return jnp.moveaxis(out, 0, 1).reshape(query.shape)
