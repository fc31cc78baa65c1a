"""PaTH attention by blocks of queries (Yang et al. 2025, arXiv:2505.16381, section 3.2).

Let W be the directions of a chunk, one a row. What its steps take from a key k, c, solves

    c_s + beta_s sum_{r<s} (w_s w_r) c_r = beta_s (w_s k)   for the steps s behind the key's own,

so with M = (I + tril(diag(beta) W W^T, -1))^-1 diag(beta), and for all queries and keys of a chunk,

    q_i H_i ... H_{j+1} k_j = (Q K^T - tril(Q W^T) M tril(W K^T, -1))_ij.

A query brought back to the start of its chunk is q - tril(Q W^T) M W, a key brought to the end of
its own is k - (W^T M tril(W K^T, -1)), and a whole chunk is I - W^T M W. A block of queries walks
back over the chunks before it, meets the keys of each at that chunk's end, and takes one softmax
over all: memory grows with the number of keys, as in `attention`.
"""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.attention.chunked import by_block, join_blocks, to_blocks
from memseq.pallas_kernels.attention.reference import products, weigh
from memseq.pallas_kernels.common.chunks import chunk_length, from_chunks, to_chunks
from memseq.pallas_kernels.common.precision import products_precision
from memseq.pallas_kernels.common.triangular import unit_lower_inverse

HIGHEST = jax.lax.Precision.HIGHEST


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
    direction,
    beta,
    *,
    dtype,
    scale,
    chunk_size=None,
    **options,
):
    """See `path_attention`; the arrays before the direction are those of `weigh`."""
    precision = products_precision(query, key, value)
    batch, queries, heads, dim = query.shape
    _, keys, key_heads, _ = key.shape
    chunk = chunk_length(chunk_size, queries)
    wide_key, wide_value = key.astype(dtype), value.astype(dtype)
    held, own = wide_key[:, : keys - queries], wide_key[:, keys - queries :]

    q = to_chunks(query.astype(dtype), chunk)  # [batch, heads, chunks, chunk, dim]
    q = q.reshape(batch, key_heads, heads // key_heads, *q.shape[2:])
    k, w = to_chunks(own, chunk), to_chunks(direction.astype(dtype), chunk)
    b = to_chunks(beta.astype(dtype), chunk)
    between = jnp.einsum("bhnsd,bhnrd->bhnsr", w, w, precision=HIGHEST)
    solve = unit_lower_inverse(b[..., None] * between) * b[..., None, :]
    shown = jnp.einsum("bhnsd,bhnjd->bhnsj", w, k, precision=HIGHEST)
    shown = jnp.where(jnp.tril(jnp.ones((chunk, chunk), bool), -1), shown, 0)
    taken = jnp.einsum("bhnsr,bhnrj->bhnsj", solve, shown, precision=HIGHEST)
    asked = jnp.tril(jnp.einsum("bhgnid,bhnsd->bhgnis", q, w, precision=HIGHEST))
    inside = jnp.einsum("bhgnid,bhnjd->bhgnij", q, k, precision=precision)
    inside -= jnp.einsum("bhgnis,bhnsj->bhgnij", asked, taken, precision=HIGHEST)
    solved = jnp.einsum("bhnsr,bhnrd->bhnsd", solve, w, precision=HIGHEST)
    q_start = q - jnp.einsum("bhgnis,bhnsd->bhgnid", asked, solved, precision=HIGHEST)
    k_end = k - jnp.einsum("bhnsj,bhnsd->bhnjd", taken, w, precision=HIGHEST)
    removed = jnp.einsum("bhnsd,bhnse->bhnde", w, solved, precision=HIGHEST)

    chunks = k.shape[2]
    by_chunk = (jnp.arange(chunks), jnp.moveaxis(k_end, 2, 0), jnp.moveaxis(removed, 2, 0))

    def attend_block(inputs):
        n, q, inside, (sums, positions, segments) = inputs

        def back(q, inputs):
            m, k_end, removed = inputs
            met = jnp.einsum("bhgid,bhjd->bhgij", q, k_end, precision=precision)
            before = q - jnp.einsum("bhgid,bhde->bhgie", q, removed, precision=HIGHEST)
            return jnp.where(m < n, before, q), jnp.where(m == n, inside, met)

        q, logits = jax.lax.scan(back, q, by_chunk, reverse=True)
        logits = jnp.moveaxis(logits, 0, 4).reshape(*q.shape[:4], -1)[..., :queries]
        earlier = products(_joined(q), held, precision)
        return weigh(
            scale * jnp.concatenate([earlier, logits], axis=-1),
            *(wide_value, sinks, sums, key_sums),
            *(positions, key_positions, segments, key_segments),
            **options,
            precision=precision,
        )

    by_query = to_blocks((query_sums, query_positions, query_segments), chunk)
    q_start, inside = (jnp.moveaxis(x, 3, 0) for x in (q_start, inside))
    out = by_block(attend_block, (jnp.arange(chunks), q_start, inside, by_query))
    out = join_blocks(out, queries).astype(value.dtype)

    def onward(rest, removed):
        """All steps behind a chunk as one matrix, from the last chunk to the first."""
        return rest - jnp.einsum("bhde,bhef->bhdf", rest, removed, precision=HIGHEST), rest

    whole = jnp.broadcast_to(jnp.eye(dim, dtype=dtype), (batch, key_heads, dim, dim))
    whole, rest = jax.lax.scan(onward, whole, by_chunk[2], reverse=True)
    own = jnp.einsum("nbhde,bhnje->bhnjd", rest, k_end, precision=HIGHEST)
    held = jnp.einsum("bhde,bshe->bshd", whole, held, precision=HIGHEST)
    return out, jnp.concatenate([held, from_chunks(own, queries)], axis=1)


def _joined(q):
    """[batch, key_heads, group, chunk, dim] -> [batch, chunk, heads, dim]."""
    q = jnp.moveaxis(q, 3, 1)
    return q.reshape(*q.shape[:2], -1, q.shape[-1])
