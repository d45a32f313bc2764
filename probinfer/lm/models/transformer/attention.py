r"""Attention of many particles that share a prompt: two softmaxes with one normaliser.

With scores :math:`s_j` over the prompt and :math:`s'_j` over the particle's own tokens the output is
:math:`(\sum_j e^{s_j - m} v_j + \sum_j e^{s'_j - m} v'_j) / (\sum_j e^{s_j - m} + \sum_j e^{s'_j - m})`, m the largest
score: no key is copied next to another. The keys of the prompt are stored once, and the queries of all particles meet
them in one matrix product for each head of keys.

References:
    Vaswani et al. (2017), "Attention is all you need". Ainslie et al. (2023), "GQA: Training generalized multi-query
    transformer models". Juravsky et al. (2024), "Hydragen: High-throughput LLM inference with shared prefixes".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from probinfer.core.types import Array, Bool, Float, Int

__all__ = ["Part", "attend", "causal", "visible"]

BLOCK = 512  # queries at a time where a sequence attends itself: bounds the memory of the scores


class Part(NamedTuple):
    """Keys and values (..., K, T, D) with what each query sees of them (..., S, T)."""

    keys: Any
    values: Any
    mask: Any


def visible(
    queries: Int[Array, "*b s"], keys: Int[Array, "t"], window: Any, limit: Any = None
) -> Bool[Array, "*b s t"]:
    """Whether position q sees position k: k <= q, q - k < window, k < limit.

    Args:
        queries: positions.
        keys: positions.
        window: 0 for all; a Python number where every layer has the same, else an integer array.
        limit: first position that is padding, if any.

    Returns:
        The mask.
    """
    q, k = queries[..., None], keys
    mask = k <= q
    if not isinstance(window, int):
        mask &= (q - k < window) | (window == 0)
    elif window:
        mask &= q - k < window
    return mask if limit is None else mask & (k < limit)


def attend(
    query: Float[Array, "n s k g d"], own: Part, shared: Part | None = None
) -> Float[Array, "n s k g d"]:
    """Attention of S queries in each of N rows over the row's own keys and over keys that all rows share.

    Args:
        query: of K heads of keys, G query heads each.
        own: keys and values (N, K, T, D), mask (N or 1, S, T); each query sees at least one.
        shared: keys and values (K, P, D), mask (N or 1, S, P).

    Returns:
        In the dtype of the query.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query = (query.astype(wide) * query.shape[-1] ** -0.5).astype(own.keys.dtype)
    scores = jnp.einsum("nskgd,nktd->nksgt", query, own.keys, preferred_element_type=wide)
    scores = jnp.where(own.mask[:, None, :, None], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1)
    if shared is None:
        weights = jnp.exp(scores - top[..., None])
        total, out = jnp.sum(weights, -1), _own_values(weights, own, wide)
    else:
        far = jnp.einsum("nskgd,kpd->nksgp", query, shared.keys, preferred_element_type=wide)
        far = jnp.where(shared.mask[:, None, :, None], far, -jnp.inf)
        top = jnp.maximum(top, jnp.max(far, axis=-1))
        weights, far = jnp.exp(scores - top[..., None]), jnp.exp(far - top[..., None])
        total = jnp.sum(weights, -1) + jnp.sum(far, -1)
        out = _own_values(weights, own, wide)
        out += jnp.einsum(
            "nksgp,kpd->nksgd", far.astype(shared.values.dtype), shared.values, preferred_element_type=wide
        )
    out = (out / total[..., None]).astype(own.keys.dtype)
    return jnp.moveaxis(out, 1, 2)


def _own_values(weights, own, wide):
    weights = weights.astype(own.values.dtype)
    return jnp.einsum("nksgt,nktd->nksgd", weights, own.values, preferred_element_type=wide)


def causal(
    query: Float[Array, "n s k g d"],
    keys: Float[Array, "n k s d"],
    values: Float[Array, "n k s d"],
    window: Any,
) -> Float[Array, "n s k g d"]:
    """Attention of whole sequences over themselves, a block of queries at a time.

    Args:
        query: of each position.
        keys: of each position.
        values: of each position.
        window: see ``visible``.

    Returns:
        In the dtype of the query.
    """
    length = query.shape[1]
    places = jnp.arange(length, dtype=jnp.int32)

    def block(query, places_of_queries):
        mask = visible(places_of_queries, places, window)[None]
        return attend(query, Part(keys, values, mask))

    if length <= BLOCK or length % BLOCK:
        return block(query, places)
    blocks = jnp.moveaxis(query.reshape(query.shape[0], -1, BLOCK, *query.shape[2:]), 1, 0)
    out = lax.map(lambda pair: block(*pair), (blocks, places.reshape(-1, BLOCK)))
    return jnp.moveaxis(out, 0, 1).reshape(query.shape)
