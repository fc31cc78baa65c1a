"""Attention by blocks of queries: memory grows with the number of keys, not with its square.

The scores of a block are taken again in the backward pass, so none outlive their block.
"""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.attention.reference import attend
from memseq.pallas_kernels.common.precision import products_precision

BLOCK = 128


def chunked(
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
    dtype,
    **options,
):
    """See `attention`; the arrays are those of `attend`, the first three in their own dtypes."""
    queries = query.shape[1]
    precision = products_precision(query, key, value)
    # wide before the blocks: a key's gradients add up over them before they are rounded
    q, k, v = (x.astype(dtype) for x in (query, key, value))

    def attend_block(by_query):
        q, sums, positions, segments = by_query
        return attend(
            *(q, k, v, sinks, sums, key_sums),
            *(positions, key_positions, segments, key_segments),
            **options,
            precision=precision,
        )

    block = max(min(BLOCK, queries), 1)
    blocks = to_blocks((q, query_sums, query_positions, query_segments), block)
    return join_blocks(by_block(attend_block, blocks), queries).astype(value.dtype)


def to_blocks(tree, block):
    """Arrays [batch, queries, ...] as [blocks, batch, block, ...], queries padded with zeros."""

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, tree)


def by_block(function, blocks):
    """`function` of one block after another; none keeps anything for the backward pass."""
    return jax.lax.map(jax.checkpoint(function, prevent_cse=False), blocks)


def join_blocks(out, queries):
    """The inverse of `to_blocks` for one array."""
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :queries]
