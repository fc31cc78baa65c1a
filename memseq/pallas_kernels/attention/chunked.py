"""Attention by blocks of queries: memory grows with the number of keys, not with its square.

The scores of a block are taken again in the backward pass, so none outlive their block.
"""

import functools

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
    block = max(min(BLOCK, queries), 1)
    precision = products_precision(query, key, value)
    # wide before the blocks: a key's gradients add up over them before they are rounded
    q, k, v = (x.astype(dtype) for x in (query, key, value))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend_block(by_query):
        q, sums, positions, segments = by_query
        return attend(
            *(q, k, v, sinks, sums, key_sums),
            *(positions, key_positions, segments, key_segments),
            **options,
            precision=precision,
        )

    def to_blocks(x):
        x = jnp.pad(x, [(0, 0), (0, -queries % block)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    by_query = (q, query_sums, query_positions, query_segments)
    out = jnp.moveaxis(jax.lax.map(attend_block, jax.tree.map(to_blocks, by_query)), 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :queries].astype(value.dtype)
