"""What softmax attention is asked for: checked, and with positions and segments filled in."""

from typing import Any

import jax.numpy as jnp

from memseq.pallas_kernels.attention.forgetting import forget_sums
from memseq.pallas_kernels.common import checks
from memseq.pallas_kernels.common.segments import hide_padding, segment_positions, segments


def arrange(
    query,
    key,
    value,
    *,
    scale,
    causal,
    window,
    sinks,
    sink_tokens,
    log_forget,
    query_positions,
    key_positions,
    query_segments,
    key_segments,
) -> tuple[tuple, dict[str, Any]]:
    """(arrays, options) of the forms of `attention`, from its arguments; ValueError for bad ones.

    The arrays are query, key and value, padded keys and values zeroed, and the others of `weigh`.
    """
    checks.check_array("query", query, (None,) * 4, "[batch, queries, heads, dim]")
    batch, queries, heads, dim = query.shape
    checks.check_array("key", key, (batch, None, None, dim), "[batch, keys, key_heads, dim]")
    _, keys, key_heads, _ = key.shape
    checks.check_array(
        "value", value, (batch, keys, key_heads, None), "[batch, keys, key_heads, value_dim]"
    )
    checks.check_heads(key_heads, heads, "query")
    dtype = checks.state_dtype(query, key, value, sinks, log_forget)
    if sinks is not None:
        checks.check_array("sinks", sinks, (heads,), "[heads]")
        sinks = sinks.astype(dtype)
    if log_forget is not None:
        checks.check_array("log_forget", log_forget, (batch, keys, heads), "[batch, keys, heads]")
    checks.check_count("window", window, 1, optional=True)
    checks.check_count("sink_tokens", sink_tokens, 0)
    for name, ids, length in (
        ("query_positions", query_positions, queries),
        ("key_positions", key_positions, keys),
        ("query_segments", query_segments, queries),
        ("key_segments", key_segments, keys),
    ):
        checks.check_segment_ids(ids, batch, length, name)

    if query_segments is not None or key_segments is not None:
        query_segments, key_segments = _segments(query_segments, key_segments, keys)
        key, value = (hide_padding(x, key_segments >= 0) for x in (key, value))
    if causal or window is not None or log_forget is not None:
        query_positions, key_positions = _positions(
            query_positions, key_positions, query_segments, key_segments, (batch, queries, keys)
        )
    else:
        query_positions = key_positions = None
    query_sums = key_sums = None
    if log_forget is not None:
        query_sums, key_sums = forget_sums(
            log_forget.astype(dtype), query_positions, key_positions, query_segments, key_segments
        )
    arrays = (query, key, value, sinks, query_sums, key_sums)
    arrays += (query_positions, key_positions, query_segments, key_segments)
    options = {
        "scale": dim**-0.5 if scale is None else scale,
        "causal": causal,
        "window": window,
        "sink_tokens": sink_tokens,
        "dtype": dtype,
    }
    return arrays, options


def _segments(query_segments, key_segments, keys):
    if query_segments is None:
        raise ValueError("query_segments: needed where key_segments are given, got None")
    if key_segments is not None:
        return query_segments, key_segments
    if query_segments.shape[1] != keys:
        raise ValueError(
            "key_segments: needed where the number of keys is not that of queries "
            f"({keys} keys, {query_segments.shape[1]} queries), got None"
        )
    valid, index = segments(query_segments)
    ids = jnp.where(valid, index, -1)
    return ids, ids


def _positions(query_positions, key_positions, query_segments, key_segments, shape):
    batch, queries, keys = shape
    if query_positions is None and key_positions is not None:
        raise ValueError("query_positions: needed where key_positions are given, got None")
    if key_positions is None and queries != keys:
        name = "key_positions" if query_positions is not None else "query_positions, key_positions"
        raise ValueError(
            f"{name}: needed by causal, window and log_forget where the number of keys is not "
            f"that of queries ({keys} keys, {queries} queries), got None"
        )
    if key_positions is not None:
        return query_positions, key_positions
    if query_positions is not None:
        return query_positions, query_positions

    def count(ids):
        if ids is None:
            return jnp.broadcast_to(jnp.arange(queries, dtype=jnp.int32), (batch, queries))
        return segment_positions(segments(ids))

    return count(query_segments), count(key_segments)
