"""Chunkwise-parallel delta rule (the WY form of Yang et al. 2024, arXiv:2406.06484, section 3).

With S the memory at the chunk's start, D_ij the decay from j to i, e the erase key and
x_i = beta_i (v_i - what the memory holds under e_i), the writes of one chunk solve

    x_i + sum_{j<i} beta_i (e_i k_j D_ij) x_j = beta_i (v_i - e_i D_i S).

T, the inverse of that unit lower-triangular system, is taken for all chunks at once. What waits for
the memory is x = T beta (v - e D S), a short scan over chunks. Then out_i = q_i D_i S +
sum_{j<=i} (q_i k_j D_ij) x_j.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from memseq.pallas_kernels.common import decay
from memseq.pallas_kernels.common.chunks import (
    STARTS,
    UNROLLED,
    chunk_length,
    chunk_masks,
    from_chunks,
    to_chunks,
    whole_or_by_stretch,
)
from memseq.pallas_kernels.common.precision import products_precision
from memseq.pallas_kernels.common.products import outer_sum, scores, weighted
from memseq.pallas_kernels.common.triangular import unit_lower_inverse

HIGHEST = jax.lax.Precision.HIGHEST


def chunked(
    query,
    key,
    value,
    beta,
    log_decay,
    erase_key,
    initial_state,
    index,
    *,
    scale,
    erase,
    chunk_size=None,
):
    """See `delta_rule`; heads equal, padding zeroed, `index` the segment index or None."""
    chunk = chunk_length(chunk_size, query.shape[1])
    form = functools.partial(_form, scale=scale, erase=erase, chunk=chunk)
    arrays = (query, key, value, beta, log_decay, erase_key)
    return whole_or_by_stretch(form, arrays, initial_state, index, chunk)


def _form(arrays, initial_state, index, *, scale, erase, chunk):
    query, key, value, beta, log_decay, erase_key = arrays
    time, dtype = query.shape[1], initial_state.dtype
    precision = products_precision(query, key, value)
    masks = chunk_masks(index, time, chunk)
    q, k, v, b = (to_chunks(x.astype(dtype), chunk) for x in (query, key, value, beta))
    e = k if erase_key is None else to_chunks(erase_key.astype(dtype), chunk)
    undecayed = erase == "undecayed"

    q_start, e_start, k_end, carry = q, e, k, jnp.ones((1, 1, 1, 1, 1), dtype)
    if log_decay is None or log_decay.ndim == 3:
        held = scores(e, k, precision)
        read = scores(q, k, precision)
    if log_decay is not None and log_decay.ndim == 3:
        g = to_chunks(log_decay, chunk)
        decays = decay.masked_exp(decay.pair_sums(g), masks.pairs)
        read *= decays
        if undecayed:
            decays = decay.masked_exp(decay.pair_sums(g, exclusive=True), masks.pairs)
        held *= decays
        q_start = q * jnp.exp(decay.sums_from_start(g, -1))[..., None]
        e_start = e * jnp.exp(decay.sums_from_start(g, -1, exclusive=undecayed))[..., None]
        k_end = k * jnp.exp(decay.sums_to_end(g, -1))[..., None]
        carry = jnp.exp(g.sum(-1))[..., None, None]
    elif log_decay is not None:
        g = to_chunks(log_decay, chunk)
        held = decay.decayed_products(
            e, k, g, exclusive=undecayed, diagonal=False, precision=precision
        )
        read = decay.decayed_products(q, k, g, exclusive=False, diagonal=True, precision=precision)
        q_start = q * jnp.exp(decay.sums_from_start(g, -2))
        e_start = e * jnp.exp(decay.sums_from_start(g, -2, exclusive=undecayed))
        k_end = k * jnp.exp(decay.sums_to_end(g, -2))
        carry = jnp.exp(g.sum(-2))[..., None]

    held = jnp.where(masks.pairs, held, 0)
    read = jnp.where(masks.pairs, read, 0)
    e_start = jnp.where(masks.from_start[..., None], e_start, 0)
    q_start = jnp.where(masks.from_start[..., None], q_start, 0)
    k_end = jnp.where(masks.to_end[..., None], k_end, 0)
    carry = jnp.where(masks.carried[..., None, None], carry, 0)

    solve = unit_lower_inverse(b[..., None] * held) * b[..., None, :]

    def step(state, inputs):
        solve, v, e_start, k_end, carry = inputs
        state = checkpoint_name(state, STARTS)
        # float32 products: an error is a small difference of two large numbers
        error = v - weighted(e_start, state, HIGHEST)
        written = weighted(solve, error, HIGHEST)
        added = outer_sum(k_end, written, precision)
        return carry * state + added, (state, written)

    chunks = q.shape[2]
    carry = jnp.broadcast_to(carry, (*carry.shape[:2], chunks, *carry.shape[3:]))
    by_chunk = (jnp.moveaxis(x, 2, 0) for x in (solve, v, e_start, k_end, carry))
    state, steps = jax.lax.scan(step, initial_state, tuple(by_chunk), unroll=chunks <= UNROLLED)
    starts, written = (jnp.moveaxis(x, 0, 2) for x in steps)
    out = weighted(q_start, starts, precision) + weighted(read, written, precision)
    return from_chunks(scale * out, time).astype(value.dtype), state
