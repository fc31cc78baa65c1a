"""Chunkwise-parallel log-linear attention.

A chunk of the plain memory is four things: the weights of its pairs A_ij, its queries and keys as
they act on the memory before and after the chunk, and how that memory passes through it. For
linear attention those are q_i k_j D_ij, q_i D_i, k_j D_Cj and D_C, with D_ij the decay from j to i;
for the delta rule the inverse T of its chunk's system stands between (see `delta_rule.chunked`):

    A = (Q K^T * D) T beta,  Q~ = D Q - A D K,  K~ = (T beta)^T D_C K,  S -> D_C S - K~^T D K S

Levels then are weights on A by the level of each pair, weights on the reads of the memories that
the chunk starts with, and a move of those and of the chunk's pairs to their levels at its end. As
levels follow from positions alone (see `levels`), chunks need not begin where the tree does, and
every row of a batch has its own phase (Guo et al. 2025, arXiv:2506.04761, section 3.2, has one).
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
from memseq.pallas_kernels.log_linear_attention.levels import place

HIGHEST = jax.lax.Precision.HIGHEST


def chunked(
    query,
    key,
    value,
    level_scale,
    log_decay,
    beta,
    initial_state,
    index,
    before,
    after,
    *,
    scale,
    chunk_size=None,
):
    """See `log_linear_attention` and `reference`; heads equal, padding zeroed."""
    time = query.shape[1]
    chunk = chunk_length(chunk_size, time)
    arrays = [
        None if x is None else jnp.pad(x, [(0, 0), (0, -time % chunk)] + [(0, 0)] * (x.ndim - 2))
        for x in (query, key, value, level_scale, log_decay, beta)
    ]
    # positions stand still where time is padded
    last = jnp.broadcast_to(after[:, -1:], (after.shape[0], -time % chunk))
    before, after = (jnp.concatenate([x, last], axis=1) for x in (before, after))
    if index is not None:
        index = jnp.pad(index, ((0, 0), (0, -time % chunk)), mode="edge")
    form = functools.partial(_form, scale=scale, chunk=chunk)
    arrays = (*arrays, before, after)
    out, state = whole_or_by_stretch(form, arrays, initial_state, index, chunk)
    return out[:, :time], state


def _form(arrays, initial_state, index, *, scale, chunk):
    query, key, value, weights, g, b, before, after = arrays
    time, dtype, places = query.shape[1], initial_state.dtype, initial_state.shape[2]
    precision = products_precision(query, key, value)
    masks = chunk_masks(index, time, chunk)
    q, k, v, weights = (to_chunks(x.astype(dtype), chunk) for x in (query, key, value, weights))
    before, after = (to_chunks(x[:, :, None], chunk) for x in (before, after))

    start, end, carry = (jnp.ones((1, 1, 1, 1), dtype),) * 3
    decays = jnp.where(masks.pairs, jnp.ones((), dtype), 0)
    if g is not None:
        g = to_chunks(g, chunk)
        start, end = (jnp.exp(sums(g, -1)) for sums in (decay.sums_from_start, decay.sums_to_end))
        carry = jnp.exp(g.sum(-1, keepdims=True))
        decays = decay.masked_exp(decay.pair_sums(g), masks.pairs)
    start = jnp.where(masks.from_start, start, 0)[..., None]
    end = jnp.where(masks.to_end, end, 0)[..., None]
    carry = jnp.where(masks.carried[..., None], carry, 0)[..., None, None]
    q_start, k_start, k_end = q * start, k * start, k * end
    pairs = decays * jnp.einsum("bhnik,bhnjk->bhnij", q, k, precision=precision)
    if b is not None:
        # float32 products, as in the delta rule: errors are small differences
        b = to_chunks(b.astype(dtype), chunk)
        held = decays * jnp.einsum("bhnik,bhnjk->bhnij", k, k, precision=HIGHEST)
        solve = unit_lower_inverse(b[..., None] * held) * b[..., None, :]
        pairs = jnp.einsum("bhnij,bhnjl->bhnil", pairs, solve, precision=HIGHEST)
        q_start -= jnp.einsum("bhnij,bhnjk->bhnik", pairs, k_start, precision=HIGHEST)
        k_end = jnp.einsum("bhnij,bhnik->bhnjk", solve, k_end, precision=HIGHEST)

    here, (first, following) = jnp.arange(places), (before[..., :1], after[..., -1:])
    # the memories at the chunk's start: places below `lifted` have merged into it by each step
    lifted = place(before, first, places)[..., None]
    above = jnp.where(1 + lifted == jnp.arange(places + 1), weights, 0).sum(axis=-1, keepdims=True)
    read = jnp.where(here < lifted, above, weights[..., 1:])
    pairs *= _pair_weights(weights, above, before)
    own = jnp.einsum("bhnij,bhnjv->bhniv", pairs, v, precision=precision)
    # at the chunk's end: where those memories stand then, and the chunk's pairs
    kept = jnp.maximum(here, place(following, first, places))
    moves = (kept[..., None, :] == here[:, None]).astype(dtype)
    puts = (place(following, before, places)[..., None] == here).astype(dtype)

    def step(state, inputs):
        q_start, k_start, k_end, v, read, moves, puts, carry = inputs
        out = jnp.einsum("bhik,bhmkv->bhimv", q_start, state, precision=precision)
        out = jnp.einsum("bhim,bhimv->bhiv", read, out, precision=HIGHEST)
        passed = carry * state
        if b is not None:
            held = jnp.einsum("bhik,bhmkv->bhmiv", k_start, state, precision=HIGHEST)
            passed -= jnp.einsum("bhik,bhmiv->bhmkv", k_end, held, precision=HIGHEST)
        k_put = puts[..., None] * k_end[..., None, :]
        added = jnp.einsum("bhimk,bhiv->bhmkv", k_put, v, precision=precision)
        return jnp.einsum("bhml,bhlkv->bhmkv", moves, passed, precision=HIGHEST) + added, out

    chunks = q.shape[2]
    by_chunk = (
        jnp.moveaxis(jnp.broadcast_to(x, (*x.shape[:2], chunks, *x.shape[3:])), 2, 0)
        for x in (q_start, k_start, k_end, v, read, moves, puts, carry)
    )
    state, past = jax.lax.scan(step, initial_state, tuple(by_chunk))
    out = own + jnp.moveaxis(past, 0, 2)
    return from_chunks(scale * out, time).astype(value.dtype), state


def _pair_weights(weights: jax.Array, above: jax.Array, position: jax.Array) -> jax.Array:
    """weights [..., chunk, levels] at the level of each pair of positions, [..., chunk, chunk].

    A choice a level, for a gather's derivative would be a scatter. Positions that differ above the
    bits of a chunk's length lie on two sides of the one border of that kind in the chunk: that is
    the level at which a step reads the chunk's start, with the weight `above` [..., chunk, 1].
    """
    now, earlier = position[..., :, None], position[..., None, :]
    bits, places = position.shape[-1].bit_length() - 1, weights.shape[-1] - 1
    found = weights[..., :1]
    for bit in range(min(bits, places)):
        found = jnp.where(now >> bit != earlier >> bit, weights[..., bit + 1, None], found)
    return found if bits >= places else jnp.where(now >> bits != earlier >> bits, above, found)
