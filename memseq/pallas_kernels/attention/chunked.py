"""Attention by blocks of queries: memory grows with the number of keys, not with its square.

The scores of a block are taken again in the backward pass, so none outlive their block.
"""

import functools

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.attention.reference import reference

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
    **options,
):
    """See `attention`; padded keys and values zeroed, sums from `forget_sums` or None."""
    queries = query.shape[1]
    block = min(BLOCK, queries)
    by_query = (query, query_sums, query_positions, query_segments)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(by_query):
        query, sums, positions, segments = by_query
        return reference(
            query,
            key,
            value,
            sinks,
            sums,
            key_sums,
            positions,
            key_positions,
            segments,
            key_segments,
            **options,
        )

    def to_blocks(x):
        x = jnp.pad(x, [(0, 0), (0, -queries % block)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    out = jnp.moveaxis(jax.lax.map(attend, jax.tree.map(to_blocks, by_query)), 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :queries]
