"""Chunkwise-parallel delta rule (the WY form of Yang et al. 2024, arXiv:2406.06484, section 3).

With S the memory at the chunk's start, D_ij the decay from j to i, e the erase key and
x_i = beta_i (v_i - what the memory holds under e_i), the writes of one chunk solve

    x_i + sum_{j<i} beta_i (e_i k_j D_ij) x_j = beta_i (v_i - e_i D_i S).

T, the inverse of that unit lower-triangular system, gives x = T beta v - (T beta e D) S: only the
second factor of the second term waits for the memory, so a short scan over chunks is all that
is sequential. Then out_i = q_i D_i S + sum_{j<=i} (q_i k_j D_ij) x_j.
"""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common import decay
from memseq.pallas_kernels.common.chunks import chunk_length, chunk_masks, from_chunks, to_chunks
from memseq.pallas_kernels.common.precision import products_precision
from memseq.pallas_kernels.common.triangular import unit_lower_inverse


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
    time, dtype = query.shape[1], initial_state.dtype
    chunk = chunk_length(chunk_size, time)
    precision = products_precision(query, key, value)
    masks = chunk_masks(index, time, chunk)
    q, k, v, b = (to_chunks(x.astype(dtype), chunk) for x in (query, key, value, beta))
    e = k if erase_key is None else to_chunks(erase_key.astype(dtype), chunk)
    undecayed = erase == "undecayed"

    q_start, e_start, k_end, carry = q, e, k, jnp.ones((1, 1, 1, 1, 1), dtype)
    if log_decay is None or log_decay.ndim == 3:
        held = jnp.einsum("bhnik,bhnjk->bhnij", e, k, precision=precision)
        read = jnp.einsum("bhnik,bhnjk->bhnij", q, k, precision=precision)
    if log_decay is not None and log_decay.ndim == 3:
        g = to_chunks(log_decay, chunk)
        kept = decay.masked_exp(decay.pair_sums(g, False), masks.pairs)
        start = decay.sums_from_start(g, -1)
        read *= kept
        q_start = q * jnp.exp(start)[..., None]
        if undecayed:
            kept = decay.masked_exp(decay.pair_sums(g, True), masks.pairs)
            start = decay.sums_from_start(g, -1, exclusive=True)
        held *= kept
        e_start = e * jnp.exp(start)[..., None]
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

    inverse = unit_lower_inverse(b[..., None] * held)
    solved = jnp.einsum(
        "bhnij,bhnjd->bhnid",
        inverse,
        b[..., None] * jnp.concatenate([v, e_start], axis=-1),
        precision=jax.lax.Precision.HIGHEST,
    )
    new_values, erased = jnp.split(solved, [v.shape[-1]], axis=-1)

    def step(state, inputs):
        new_value, erased, k_end, carry = inputs
        # float32 products: a write is a small difference of two large numbers
        written = new_value - jnp.einsum(
            "bhik,bhkv->bhiv", erased, state, precision=jax.lax.Precision.HIGHEST
        )
        added = jnp.einsum("bhik,bhiv->bhkv", k_end, written, precision=precision)
        return carry * state + added, (state, written)

    chunks = q.shape[2]
    carry = jnp.broadcast_to(carry, (*carry.shape[:2], chunks, *carry.shape[3:]))
    by_chunk = (jnp.moveaxis(x, 2, 0) for x in (new_values, erased, k_end, carry))
    state, (starts, written) = jax.lax.scan(step, initial_state, tuple(by_chunk))
    out = jnp.einsum("bhnik,nbhkv->bhniv", q_start, starts, precision=precision)
    out += jnp.einsum("bhnij,nbhjv->bhniv", read, written, precision=precision)
    return from_chunks(scale * out, time).astype(value.dtype), state
