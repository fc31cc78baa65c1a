"""The definition of `attention`: the full matrix of scores."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.attention.masks import visible
from memseq.pallas_kernels.common.precision import products_precision


def reference(query, key, value, *arrays, dtype, **options):
    """See `attention`; `arrays` are the others of `attend`, these three in their own dtypes."""
    precision = products_precision(query, key, value)
    q, k, v = (x.astype(dtype) for x in (query, key, value))
    return attend(q, k, v, *arrays, **options, precision=precision).astype(value.dtype)


def attend(query, key, value, *arrays, scale, precision, **options):
    """Any number of queries against all keys: float32 or float64, padded keys and values zeroed.

    `arrays` and `options` are those of `weigh`.
    """
    logits = scale * products(query, key, precision)
    return weigh(logits, value, *arrays, **options, precision=precision)


def products(query, key, precision):
    """q_i . k_j [batch, key_heads, group, queries, keys] of query and key [batch, ., ., dim]."""
    key_heads = key.shape[2]
    query = query.reshape(*query.shape[:2], key_heads, query.shape[2] // key_heads, -1)
    return jnp.einsum("bthgd,bshd->bhgts", query, key, precision=precision)


def weigh(
    logits,
    value,
    sinks,
    query_sums,
    key_sums,
    query_positions,
    key_positions,
    query_segments,
    key_segments,
    *,
    causal,
    window,
    sink_tokens,
    precision,
):
    """Values weighted by the softmax of logits over the keys that each query sees.

    logits [batch, key_heads, group, queries, keys], the heads of a query being key_heads x group;
    value [batch, keys, key_heads, value_dim], zero at padding; sums from `forget_sums`, positions
    and segments as in `visible`, or None. Gives [batch, queries, heads, value_dim].
    """
    dtype = value.dtype
    batch, *groups, queries, _ = logits.shape
    mask = visible(
        query_positions,
        key_positions,
        query_segments,
        key_segments,
        causal=causal,
        window=window,
        sink_tokens=sink_tokens,
    )

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
    top = logits.max(axis=-1, keepdims=True, initial=jnp.finfo(dtype).min)
    if sinks is not None:
        sinks = sinks.reshape(*groups, 1, 1)
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(top)
    weights = jnp.where(mask, jnp.exp(logits - top), 0)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    weights /= jnp.where(total > 0, total, 1)  # 0 only where a query sees nothing
    out = jnp.einsum("bhgts,bshv->bthgv", weights, value, precision=precision)
    return out.reshape(batch, queries, groups[0] * groups[1], -1)
