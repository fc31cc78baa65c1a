"""Chunkwise-parallel delta rule with momentum.

With D_il the decay of the memory and U_lj that of the momentum from one position of a chunk to
another, and x_j = step_j error_j what enters the momentum under key k_j, the memory at i is

    S_i = D_i S + B_i M + sum_{j<=i} G_ij k_j x_j^T,
    G_ij = sum_{j<=l<=i} D_il beta_l U_lj,  B_i = sum_{l<=i} D_il beta_l U_l,

from the memory S and the momentum M at the chunk's start: G is one product of two lower-triangular
matrices whose entries are at most 1, never a quotient of cumulative decays. (Huang et al. 2026,
arXiv:2605.05838, section 3, take logarithms of sums of such quotients instead.) So the errors of a
chunk solve a unit lower-triangular system as those of the delta rule do,

    x_i + sum_{j<i} step_i (k_i k_j) (a_i G_{i-1,j}) x_j
        = step_i (v_i - k_i a_i (D_{i-1} S + B_{i-1} M))

with a_i the decay of step i itself where the error reads the decayed memory, else 1. The inverse is
taken for all chunks at once; a short scan over chunks carries the memory and its momentum.
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


def chunked(
    query,
    key,
    value,
    beta,
    step,
    log_momentum,
    log_decay,
    initial_state,
    index,
    *,
    scale,
    erase,
    chunk_size=None,
):
    """See `momentum_delta_rule`; heads equal, padding zeroed, `index` the segment index or None."""
    chunk = chunk_length(chunk_size, query.shape[1])
    form = functools.partial(_form, scale=scale, erase=erase, chunk=chunk)
    arrays = (query, key, value, beta, step, log_momentum, log_decay)
    return whole_or_by_stretch(form, arrays, initial_state, index, chunk)


def _form(arrays, initial_state, index, *, scale, erase, chunk):
    query, key, value, beta, step, log_momentum, log_decay = arrays
    time, dtype = query.shape[1], initial_state.dtype
    precision = products_precision(query, key, value)
    masks = chunk_masks(index, time, chunk)
    q, k, v, b, s = (to_chunks(x.astype(dtype), chunk) for x in (query, key, value, beta, step))
    m, g = (to_chunks(x, chunk) for x in (log_momentum, log_decay))
    # of momentum and memory, [batch, heads, chunks, chunk, chunk]
    slowing, fading = (decay.masked_exp(decay.pair_sums(x), masks.pairs) for x in (m, g))

    def from_start(log_decay, exclusive=False):
        sums = decay.sums_from_start(log_decay, -1, exclusive=exclusive)
        return jnp.where(masks.from_start, jnp.exp(sums), 0)

    # what the memory at each position has of each write, and of memory and momentum at the start
    momentum_start, memory_start = from_start(m), from_start(g)
    spent = fading * b[..., None, :]
    share = jnp.einsum("bhnil,bhnlj->bhnij", spent, slowing, precision=HIGHEST)
    share_start = jnp.einsum("bhnil,bhnl->bhni", spent, momentum_start, precision=HIGHEST)

    # the same of the memory at the chunk's end
    slowing_end, fading_end = (
        jnp.where(masks.to_end, jnp.exp(decay.sums_to_end(x, -1)), 0) for x in (m, g)
    )
    spent = fading_end * b
    share_end = jnp.einsum("bhnl,bhnlj->bhnj", spent, slowing, precision=HIGHEST)
    share_start_end = jnp.sum(spent * momentum_start, axis=-1)

    # the same of what the error reads: the memory one step before
    own = jnp.exp(g) if erase == "decayed" else jnp.ones_like(g)
    held = own[..., None] * jnp.where(masks.pairs, decay.shifted(share, -2, 1), 0)
    held_start = own * jnp.where(masks.from_start, decay.shifted(share_start, -1, 1), 0)
    kept = memory_start if erase == "decayed" else from_start(g, exclusive=True)

    held *= jnp.einsum("bhnik,bhnjk->bhnij", k, k, precision=precision)
    read = share * jnp.einsum("bhnik,bhnjk->bhnij", q, k, precision=precision)
    solve = unit_lower_inverse(s[..., None] * held) * s[..., None, :]
    # beside memory and momentum, one above the other
    e_start = _beside(k, kept, held_start)
    q_start = _beside(q, memory_start, share_start)
    k_end = _beside(k, share_end, slowing_end)
    ends = (memory_start[..., -1], share_start_end, momentum_start[..., -1])
    ends = (x[..., None, None] for x in ends)

    def one(state, inputs):
        solve, v, e_start, k_end, memory_kept, momentum_spent, momentum_kept = inputs
        # float32 products: an error is a small difference of two large numbers
        error = v - jnp.einsum("bhik,bhkv->bhiv", e_start, state, precision=HIGHEST)
        written = jnp.einsum("bhij,bhjv->bhiv", solve, error, precision=HIGHEST)
        memory, momentum = jnp.split(state, 2, axis=-2)
        moved = [memory_kept * memory + momentum_spent * momentum, momentum_kept * momentum]
        added = jnp.einsum("bhik,bhiv->bhkv", k_end, written, precision=precision)
        return jnp.concatenate(moved, axis=-2) + added, (state, written)

    by_chunk = (jnp.moveaxis(x, 2, 0) for x in (solve, v, e_start, k_end, *ends))
    state, (starts, written) = jax.lax.scan(one, initial_state, tuple(by_chunk))
    out = jnp.einsum("bhnik,nbhkv->bhniv", q_start, starts, precision=precision)
    out += jnp.einsum("bhnij,nbhjv->bhniv", read, written, precision=precision)
    return from_chunks(scale * out, time).astype(value.dtype), state


def _beside(x: jax.Array, of_memory: jax.Array, of_momentum: jax.Array) -> jax.Array:
    """[..., chunk, K] weighed in two ways [..., chunk], side by side: [..., chunk, 2K]."""
    return jnp.concatenate([x * of_memory[..., None], x * of_momentum[..., None]], axis=-1)
