"""`attention`: arguments, checks and dispatch."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.attention.chunked import chunked
from memseq.pallas_kernels.attention.forgetting import forget_sums
from memseq.pallas_kernels.attention.reference import reference
from memseq.pallas_kernels.common import checks
from memseq.pallas_kernels.common.dispatch import Forms, run
from memseq.pallas_kernels.common.segments import hide_padding, segment_positions, segments

FORMS = Forms("attention", reference, chunked)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: jax.Array | None = None,
    sink_tokens: int = 0,
    log_forget: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1).

        out_i = sum_j softmax_j(scale q_i . k_j + forgotten_ij) v_j   over the keys that i sees

    It has no state: a cache of keys and values belongs to the caller, who passes all of them with
    their positions. A query that sees no key gives 0.

    Args:
        query: [batch, queries, heads, dim], floating.
        key: [batch, keys, key_heads, dim]. Query head h reads key head h // (heads // key_heads).
        value: [batch, keys, key_heads, value_dim].
        scale: factor on the scores; None is dim ** -0.5.
        causal: a query sees only keys at its own position and before.
        window: a query sees only keys with query position - key position < window, so `window`
            keys with itself. Without `causal` it limits the past only. None is no limit.
        sinks: [heads]; a logit that takes part in the softmax and carries no value (Xiao et al.
            2024, arXiv:2309.17453, equation 2, with a learned logit as in gpt-oss).
        sink_tokens: keys at positions below it stay visible beyond the window (the same paper's
            attention sinks).
        log_forget: [batch, keys, heads], natural logarithms of forget gates, <= 0 (forgetting
            attention: Lin et al. 2025, arXiv:2503.02130, equation 5); adds to a score the sum over
            the segment's keys after position j, up to position i.
        query_positions: int32 [batch, queries]. None counts from 0, from each segment's start
            where there are segments; so where `keys` differs from `queries`, `causal`, `window`
            and `log_forget` need both positions given.
        key_positions: int32 [batch, keys]; None is query_positions.
        query_segments: int32 [batch, queries]; a query sees keys of its own id only. Negative is
            padding: its output is 0.
        key_segments: int32 [batch, keys], negative for keys that nobody sees. None is
            query_segments, read as the other operations do: a segment ends where the id changes,
            and an id that comes back is a new one.
        implementation: "auto", or one of `FORMS.available`.

    Returns:
        out [batch, queries, heads, value_dim] in value's dtype; the softmax is taken in float32
        (float64 if an input is).

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, at trace time.
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
    return run(
        FORMS,
        implementation,
        queries,
        arrays,
        scale=dim**-0.5 if scale is None else scale,
        causal=causal,
        window=window,
        sink_tokens=sink_tokens,
        dtype=dtype,
    )


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
