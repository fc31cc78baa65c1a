"""Chunkwise-parallel diagonal plus low rank.

With S the memory at the chunk's start, D_ij the decay of the steps after j through i and D'_ij that
of the steps after j before i, what `a` finds at each step of a chunk, x_i = S_{i-1}^T a_i, solves

    x_i - sum_{j<i} (a_i b_j D'_ij) x_j = a_i D'_i S + sum_{j<i} (a_i k_j D'_ij) v_j.

T, the inverse of that unit lower-triangular system, and the second sum are taken for all chunks at
once. What waits for the memory is x, a short scan over chunks, and S <- D_C S +
sum_j D_Cj (b_j x_j^T + k_j v_j^T). Then

    out_i = q_i D_i S + sum_{j<=i} (q_i b_j D_ij) x_j + (q_i k_j D_ij) v_j.
"""

import functools

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common import decay
from memseq.pallas_kernels.common.chunks import (
    chunk_length,
    chunk_masks,
    from_chunks,
    to_chunks,
    whole_or_by_stretch,
)
from memseq.pallas_kernels.common.precision import products_precision
from memseq.pallas_kernels.common.triangular import unit_lower_inverse

HIGHEST = jax.lax.Precision.HIGHEST
# Less than elsewhere: four products of a chunk's pairs weigh more than the steps of the scan.
CHUNK = 32


def chunked(query, key, value, a, b, log_decay, initial_state, index, *, scale, chunk_size=None):
    """See `diagonal_plus_low_rank`; heads equal, padding zeroed, a decay of channels.

    index: the segment index or None.
    """
    chunk = chunk_length(CHUNK if chunk_size is None else chunk_size, query.shape[1])
    form = functools.partial(_form, scale=scale, chunk=chunk)
    arrays = (query, key, value, a, b, log_decay)
    return whole_or_by_stretch(form, arrays, initial_state, index, chunk)


def _form(arrays, initial_state, index, *, scale, chunk):
    time, dtype = arrays[0].shape[1], initial_state.dtype
    precision = products_precision(*arrays[:5])
    masks = chunk_masks(index, time, chunk)
    q, k, v, a, b, g = (to_chunks(x.astype(dtype), chunk) for x in arrays)

    def pairs(rows, columns, **kind):  # [batch, heads, chunks, chunk, chunk]
        # heads and chunks are one axis of the products: with a vmap or two they could have eight,
        # at which XLA for CPUs aborts (jax 0.12)
        arrays = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (rows, columns, g))
        found = decay.decayed_products(*arrays, **kind).reshape(*g.shape[:3], chunk, chunk)
        return jnp.where(masks.pairs, found, 0)

    held = {"exclusive": True, "diagonal": False, "precision": HIGHEST}
    read = {"exclusive": False, "diagonal": True, "precision": precision}
    held_b, held_k = (pairs(a, columns, **held) for columns in (b, k))
    read_b, read_k = (pairs(q, columns, **read) for columns in (b, k))
    known = jnp.einsum("bhnij,bhnjv->bhniv", held_k, v, precision=HIGHEST)
    solve = unit_lower_inverse(-held_b)

    end = jnp.exp(decay.sums_to_end(g, -2))
    q_start = q * jnp.exp(decay.sums_from_start(g, -2))
    a_start = a * jnp.exp(decay.sums_from_start(g, -2, exclusive=True))
    q_start, a_start = (jnp.where(masks.from_start[..., None], x, 0) for x in (q_start, a_start))
    b_end, k_end = (jnp.where(masks.to_end[..., None], x * end, 0) for x in (b, k))
    carry = jnp.where(masks.carried[..., None, None], jnp.exp(g.sum(-2))[..., None], 0)
    added = jnp.einsum("bhnjk,bhnjv->bhnkv", k_end, v, precision=HIGHEST)

    def step(state, inputs):
        solve, known, a_start, b_end, carry, added = inputs
        # float32 products: what is found and the values are large with a small difference
        found = known + jnp.einsum("bhik,bhkv->bhiv", a_start, state, precision=HIGHEST)
        found = jnp.einsum("bhij,bhjv->bhiv", solve, found, precision=HIGHEST)
        moved = jnp.einsum("bhik,bhiv->bhkv", b_end, found, precision=HIGHEST)
        return carry * state + moved + added, (state, found)

    by_chunk = (jnp.moveaxis(x, 2, 0) for x in (solve, known, a_start, b_end, carry, added))
    state, (starts, found) = jax.lax.scan(step, initial_state, tuple(by_chunk))
    out = jnp.einsum("bhnik,nbhkv->bhniv", q_start, starts, precision=precision)
    out += jnp.einsum("bhnij,nbhjv->bhniv", read_b, found, precision=precision)
    out += jnp.einsum("bhnij,bhnjv->bhniv", read_k, v, precision=precision)
    return from_chunks(scale * out, time).astype(arrays[2].dtype), state
