"""`path_attention`: arguments, checks and dispatch."""

import jax

from memseq.pallas_kernels.attention.arguments import arrange
from memseq.pallas_kernels.common import checks
from memseq.pallas_kernels.common.dispatch import Forms, run
from memseq.pallas_kernels.common.segments import hide_padding
from memseq.pallas_kernels.path_attention.chunked import chunked
from memseq.pallas_kernels.path_attention.reference import reference

FORMS = Forms("path_attention", reference, chunked)


def path_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    direction: jax.Array,
    beta: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: jax.Array | None = None,
    sink_tokens: int = 0,
    log_forget: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """PaTH attention (Yang et al. 2025, arXiv:2505.16381, section 3): keys moved by what follows.

        out_i = sum_{j<=i} softmax_j(scale q_i . H_i H_{i-1} ... H_{j+1} k_j + forgotten_ij) v_j,
        H_t = I - beta_t w_t w_t^T   with w_t the direction of step t

    A key is stored as it is, and every later step takes its Householder matrix to it: where RoPE
    turns by position, this moves by content. It has no state: the keys before this call belong to
    the caller, who passes them first, moved to the step before this call, and gets all keys back
    moved to its last step. The cost is that of `attention` and, for each query and key, another dim
    / chunk times that of their product.

    Args:
        query: [batch, queries, heads, dim], floating; queries are in the order of time.
        key: [batch, keys, key_heads, dim]; the last `queries` of them are those of the queries'
            own steps, any before them are earlier ones, in any order. Query head h reads key head
            h // (heads // key_heads).
        value: [batch, keys, key_heads, value_dim].
        direction: [batch, queries, key_heads, dim], of unit length (as is beta = 0, which moves
            nothing).
        beta: [batch, queries, key_heads], in [0, 2]: 1 removes what lies along the direction, 2
            reflects it.
        chunk_size: steps taken together; changes speed only.
        implementation: "auto", or one of `FORMS.available`.
        scale, window, sinks, sink_tokens, log_forget, query_positions, key_positions,
            query_segments, key_segments: as of `attention`; a padded query moves nothing.

    Returns:
        out [batch, queries, heads, value_dim] in value's dtype, and the keys [batch, keys,
        key_heads, dim] as a query at the last step would see them, in float32 (float64 if an input
        is). Keys of segments that have ended are finite and mean nothing.

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, at trace time.
    """
    arrays, options = arrange(
        query,
        key,
        value,
        scale=scale,
        causal=True,
        window=window,
        sinks=sinks,
        sink_tokens=sink_tokens,
        log_forget=log_forget,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segments=query_segments,
        key_segments=key_segments,
    )
    batch, keys, key_heads, dim = key.shape
    queries = query.shape[1]
    if keys < queries:
        raise ValueError(f"key: expected at least the {queries} keys of the queries, got {keys}")
    checks.check_chunk_size(chunk_size)
    layout = "[batch, queries, key_heads, dim]"
    checks.check_array("direction", direction, (batch, queries, key_heads, dim), layout)
    checks.check_array("beta", beta, (batch, queries, key_heads), "[batch, queries, key_heads]")
    options["dtype"] = checks.state_dtype(query, key, value, sinks, log_forget, direction, beta)
    if query_segments is not None:
        valid = query_segments >= 0
        direction, beta = hide_padding(direction, valid), hide_padding(beta, valid)
    arrays += (direction, beta)
    return run(FORMS, implementation, queries, arrays, chunk_size=chunk_size, **options)
