"""TPU kernels of `diagonal_plus_low_rank`.

The chunk's function is that of the `chunked` form with the memory kept transposed,
[value_dim, key_dim], and with `b` and the key side by side: a step writes what `a` found under one
and the value under the other, so each product is taken with both at once, twice as wide.
`common.mosaic_tpu.recurrence` makes the forward and the backward kernel of it.
"""

import functools

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.dispatch import KernelForm
from memseq.pallas_kernels.common.mosaic_tpu import blocks, recurrence
from memseq.pallas_kernels.common.mosaic_tpu import heads as heads_of

NAME = "diagonal_plus_low_rank"
CHUNK = 32  # fewest cycles a step on v5e and v6e, and half the time to compile that 64 takes


def limit(query, key, value, a, b, log_decay, state, index, **options):
    """Why the kernels cannot run, or None."""
    return heads_of.limit(query, value, state)


def forward(*arrays, scale, chunk_size=None):
    """As `chunked`."""
    return heads_of.forward(_call(arrays, scale, chunk_size), arrays)


def backward(arrays, cotangents, *, scale, chunk_size=None):
    """One cotangent for each of `arrays`, None for `index` and for None."""
    return heads_of.backward(_call(arrays, scale, chunk_size), arrays, cotangents)


MOSAIC_TPU = KernelForm(forward, backward, limit)


def _call(arrays, scale, chunk_size) -> heads_of.Call:
    query, _, value, *_ = arrays
    plan = heads_of.plan(query, value, chunk_size, CHUNK)
    step = functools.partial(_step, scale=scale, passes=heads_of.passes(*arrays[:5]))
    return heads_of.Call(NAME, step, functools.partial(_operands, plan=plan), plan, value)


def _operands(arrays, *, plan) -> recurrence.Operands:
    *steps, state, index = arrays
    return recurrence.Operands(
        tuple(heads_of.to_sequences(x, plan) for x in steps),
        (),
        (),
        heads_of.to_state(state),
        (),
        heads_of.shared(index, plan),
    )


def _step(chunk: recurrence.Chunk, state, *, scale, passes):
    query, key, value, a, b, log_decay = chunk.steps
    size = query.shape[1]
    masks = blocks.masks(chunk.shared, size)
    exact = max(passes, 3)  # what `a` finds and the value are often large with a small difference
    decay = blocks.channel_decay(log_decay, read_exclusive=False, held_exclusive=True)
    both = jnp.concatenate([b, key], axis=1).astype(jnp.float32)
    read, held = _pairs((passes, exact), query, a, both, decay)
    if chunk.shared is not None:  # a mask of numbers: the compiler does not join Booleans
        pairs = masks.pairs.astype(jnp.float32)
        pairs = jnp.concatenate([pairs, pairs], axis=2)
        read, held = pairs * read, pairs * held
    q_start, a_start = query * decay.read_start, a * decay.held_start
    q_start, a_start = (blocks.keep(masks.from_start, x) for x in (q_start, a_start))
    b_end, k_end = (blocks.keep(masks.to_end, x * decay.to_end) for x in (b, key))

    solve = blocks.unit_lower_inverse(exact, -held[:, :, :size])
    found = blocks.product("nn", exact, held[:, :, size:], value)
    found += blocks.product("nt", exact, a_start, state)
    found = blocks.product("nn", exact, solve, found)
    written = jnp.concatenate([found, value.astype(jnp.float32)], axis=1)
    out = blocks.product("nn", passes, read, written)
    out += blocks.product("nt", passes, q_start, state)
    moved = blocks.product("tn", exact, written, jnp.concatenate([b_end, k_end], axis=1))
    return (scale * out,), blocks.keep(masks.carried, decay.total * state) + moved


def _pairs(passes, query, a, both, decay) -> tuple[jax.Array, jax.Array]:
    """(read, held) float32 [H, C, 2C]: `query`, and `a` before the decay of its step, with `both`.

    both: [H, 2C, K], two vectors a step. read_ij = query_i . (decay(j to i) both_j) for j <= i, and
    held likewise for j < i, else 0. See `blocks.decayed_products`.
    """
    heads, size, _ = query.shape
    shape = (1, size, 2 * size)
    i = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    j = column & (size - 1)  # size is a power of two
    query = query.astype(jnp.float32)
    own = [jnp.sum(query * x, axis=2, keepdims=True) for x in (both[:, :size], both[:, size:])]
    held = jnp.zeros((heads, *shape[1:]), jnp.float32)
    read = jnp.where(column == i, own[0], jnp.where(column == i + size, own[1], held))
    half = 1
    for with_own, without in decay.levels:
        meets = blocks.straddles(half, i, j)
        # rows of earlier halves alone count here, and those decay alike for both readers
        to_border = both * jnp.concatenate([with_own, with_own], axis=1)
        read = jnp.where(meets, blocks.product("nt", passes[0], query * with_own, to_border), read)
        held = jnp.where(meets, blocks.product("nt", passes[1], a * without, to_border), held)
        half *= 2
    return read, held
