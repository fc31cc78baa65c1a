"""Chunkwise-parallel linear attention: matrix products inside chunks, a short scan between them.

With S the memory at the chunk's start and D_ij the decay from j to i (Yang et al. 2024,
arXiv:2312.06635, section 4; for the scalar case Dao and Gu 2024, arXiv:2405.21060, section 6):

    out_i = q_i D_i S + sum_{j<=i} (q_i k_j D_ij) v_j,    S <- D_C S + sum_j D_Cj k_j v_j^T
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


def chunked(
    query,
    key,
    value,
    log_decay,
    value_log_decay,
    bonus,
    initial_state,
    index,
    *,
    scale,
    chunk_size=None,
):
    """See `linear_attention`; heads equal, padding zeroed, `index` the segment index or None."""
    chunk = chunk_length(chunk_size, query.shape[1])
    form = functools.partial(_form, bonus=bonus, scale=scale, chunk=chunk)
    arrays = (query, key, value, log_decay, value_log_decay)
    return whole_or_by_stretch(form, arrays, initial_state, index, chunk)


def _form(arrays, initial_state, index, *, bonus, scale, chunk):
    query, key, value, log_decay, value_log_decay = arrays
    time, dtype = query.shape[1], initial_state.dtype
    precision = products_precision(query, key, value)
    masks = chunk_masks(index, time, chunk)
    q, k, v = (to_chunks(x.astype(dtype), chunk) for x in (query, key, value))
    exclusive = bonus is not None

    q_start, k_end, carry = q, k, jnp.ones((1, 1, 1, 1, 1), dtype)
    if log_decay is None:
        weights = scores(q, k, precision)
    elif log_decay.ndim == 3:
        g = to_chunks(log_decay, chunk)
        weights = scores(q, k, precision)
        weights *= decay.masked_exp(decay.pair_sums(g, exclusive), masks.pairs)
        q_start = q * jnp.exp(decay.sums_from_start(g, -1, exclusive))[..., None]
        k_end = k * jnp.exp(decay.sums_to_end(g, -1))[..., None]
        carry = jnp.exp(g.sum(-1))[..., None, None]
    else:
        g = to_chunks(log_decay, chunk)
        weights = decay.decayed_products(
            q, k, g, exclusive=exclusive, diagonal=True, precision=precision
        )
        q_start = q * jnp.exp(decay.sums_from_start(g, -2, exclusive))
        k_end = k * jnp.exp(decay.sums_to_end(g, -2))
        carry = jnp.exp(g.sum(-2))[..., None]
    if bonus is not None:
        own = jnp.einsum("bhnik,hk,bhnik->bhni", q, bonus, k, precision=precision)
        eye = jnp.eye(chunk, dtype=bool)
        weights = jnp.where(eye, own[..., None], weights)
    if log_decay is None or log_decay.ndim == 4:
        weights = jnp.where(masks.pairs, weights, 0)

    v_end, out_start = v, None
    if value_log_decay is None:
        out = weighted(weights, v, precision)
    else:
        gv = to_chunks(value_log_decay, chunk)
        out = decay.decayed_sum(weights, v, gv, exclusive=exclusive, precision=precision)
        out_start = jnp.exp(decay.sums_from_start(gv, -2, exclusive))
        v_end = v * jnp.exp(decay.sums_to_end(gv, -2))
        carry = carry * jnp.exp(gv.sum(-2))[..., None, :]

    carry = jnp.where(masks.carried[..., None, None], carry, 0)
    k_end = jnp.where(masks.to_end[..., None], k_end, 0)
    q_start = jnp.where(masks.from_start[..., None], q_start, 0)
    written = outer_sum(k_end, v_end, precision)
    starts, state = scan_chunks(carry, written, initial_state)
    past = weighted(q_start, starts, precision)
    out += past if out_start is None else out_start * past
    return from_chunks(scale * out, time).astype(value.dtype), state


def scan_chunks(carry: jax.Array, written: jax.Array, initial: jax.Array):
    """state <- carry * state + written over the chunk axis (2).

    Args: carry broadcastable to written [B, H, N, K, V], initial [B, H, K, V].
    Returns: the states at the chunks' starts [B, H, N, K, V], and the last state.
    """

    def step(state, inputs):
        carry, written = inputs
        state = checkpoint_name(state, STARTS)
        return carry * state + written, state

    chunks = written.shape[2]
    carry = jnp.broadcast_to(carry, (*carry.shape[:2], chunks, *carry.shape[3:]))
    by_chunk = jnp.moveaxis(carry, 2, 0), jnp.moveaxis(written, 2, 0)
    state, starts = jax.lax.scan(step, initial, by_chunk, unroll=chunks <= UNROLLED)
    return jnp.moveaxis(starts, 0, 2), state
