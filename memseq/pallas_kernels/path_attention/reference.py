"""The definition of `path_attention`: one step of time after another moves all keys before it."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.attention.reference import attend
from memseq.pallas_kernels.common.precision import products_precision

HIGHEST = jax.lax.Precision.HIGHEST


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
    direction,
    beta,
    *,
    dtype,
    chunk_size=None,
    **options,
):
    """See `path_attention`; the arrays before the direction are those of `weigh`."""
    del chunk_size
    precision = products_precision(query, key, value)
    value_dtype = value.dtype
    key, value = key.astype(dtype), value.astype(dtype)
    place = jnp.arange(key.shape[1])
    held = key.shape[1] - query.shape[1]

    def step(keys, inputs):
        t, w, b, (q, sums, positions, segments) = inputs
        along = jnp.einsum("bshd,bhd->bsh", keys, w, precision=HIGHEST) * b[:, None]
        moved = keys - along[..., None] * w[:, None]
        keys = jnp.where((place < held + t)[:, None, None], moved, keys)
        out = attend(
            *(q, keys, value, sinks, sums, key_sums),
            *(positions, key_positions, segments, key_segments),
            **options,
            precision=precision,
        )
        return keys, out[:, 0]

    def by_time(x):
        return jnp.moveaxis(x, 1, 0)

    by_query = (query.astype(dtype), query_sums, query_positions, query_segments)
    steps = (
        jnp.arange(query.shape[1]),
        by_time(direction.astype(dtype)),
        by_time(beta.astype(dtype)),
        jax.tree.map(lambda x: by_time(x)[:, :, None], by_query),
    )
    keys, out = jax.lax.scan(step, key, steps)
    return jnp.moveaxis(out, 0, 1).astype(value_dtype), keys
