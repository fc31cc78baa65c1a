"""The definition of `attention`: the full matrix of scores."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.attention.masks import visible
from memseq.pallas_kernels.common.precision import products_precision


def reference(
    query,
    key,
    value,
    sinks,
    query_sums,
    key_sums,
    query_positions,
    key_positions,
    query_segments,
    key_segments,
    *,
    scale,
    causal,
    window,
    sink_tokens,
    dtype,
):
    """See `attention`; padded keys and values zeroed, sums from `forget_sums` or None."""
    precision = products_precision(query, key, value)
    batch, queries, heads, _ = query.shape
    groups = (key.shape[2], heads // key.shape[2])  # key heads, query heads of each
    q = query.reshape(batch, queries, *groups, -1).astype(dtype)
    k, v = key.astype(dtype), value.astype(dtype)
    mask = visible(
        query_positions,
        key_positions,
        query_segments,
        key_segments,
        causal=causal,
        window=window,
        sink_tokens=sink_tokens,
    )

    logits = scale * jnp.einsum("bthgd,bshd->bhgts", q, k, precision=precision)
    if query_sums is not None:
        at_query, at_key = (
            jnp.moveaxis(x.reshape(*x.shape[:2], *groups, 2), 1, 3) for x in (query_sums, key_sums)
        )
        forgotten = (at_query[..., :, None, :] - at_key[..., None, :, :]).sum(-1)
        if not causal:  # a key ahead of the query: no gate lies between
            ahead = query_positions[:, :, None] < key_positions[:, None, :]
            forgotten = jnp.where(ahead[:, None, None], 0, forgotten)
        logits += forgotten
    mask = mask[:, None, None]
    logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    top = logits.max(axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(dtype).reshape(*groups, 1, 1)
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(top)
    weights = jnp.where(mask, jnp.exp(logits - top), 0)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    weights /= jnp.where(total > 0, total, 1)  # 0 only where a query sees nothing
    out = jnp.einsum("bhgts,bshv->bthgv", weights, v, precision=precision)
    return out.reshape(batch, queries, heads, -1).astype(value.dtype)
