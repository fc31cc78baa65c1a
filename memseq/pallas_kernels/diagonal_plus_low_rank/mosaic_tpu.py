"""TPU kernels of `diagonal_plus_low_rank`.

The chunk's function is that of the `chunked` form, with the matrices of a chunk side by side
(`common.mosaic_tpu.squares`). `common.mosaic_tpu.recurrence` makes the forward and the backward
kernel of it.
"""

import functools

import jax.numpy as jnp

from memseq.pallas_kernels.common.dispatch import KernelForm
from memseq.pallas_kernels.common.mosaic_tpu import blocks, recurrence, squares
from memseq.pallas_kernels.common.mosaic_tpu import heads as heads_of

NAME = "diagonal_plus_low_rank"
CHUNK = 32  # 64 takes 6 to 10 % fewer cycles on a v6e, and 4 to 9 % more on a v5e


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
    make = functools.partial(_operands, plan=plan)
    return heads_of.Call(NAME, step, make, plan, value, turned=False)


def _operands(arrays, *, plan) -> recurrence.Operands:
    *steps, state, index = arrays
    return recurrence.Operands(
        tuple(heads_of.to_sequences(x, plan) for x in steps),
        (),
        (),
        heads_of.to_state(state, turned=False),
        (),
        heads_of.shared(index, plan),
    )


def _step(chunk: recurrence.Chunk, state, *, scale, passes):
    query, key, value, a, b, log_decay = chunk.steps
    heads, size, _ = query.shape
    side = squares.side_by_side(heads, size)
    masks = blocks.masks(chunk.shared, size, side)
    exact = max(passes, 3)  # what `a` finds and the value are often large with a small difference
    decay = blocks.channel_decay(log_decay, read_exclusive=False, held_exclusive=True)
    # what `query`, and `a` before the decay of its step, find of `b` and of the key
    pairs = (
        blocks.decayed_products((passes, exact), (query, a), x, decay.levels, (True, False), side)
        for x in (b, key)
    )
    (read_b, held_b), (read_k, held_k) = ([blocks.keep(masks.pairs, x) for x in y] for y in pairs)
    q_start, a_start = query * decay.read_start, a * decay.held_start
    q_start, a_start = (blocks.keep(masks.from_start, x) for x in (q_start, a_start))
    ends = [blocks.keep(masks.to_end, x * decay.to_end) for x in (b, key)]

    solve = blocks.unit_lower_inverse(exact, -held_b)
    past, known = blocks.products("nn", (passes, exact), (q_start, a_start), state)
    found = blocks.weighted(exact, held_k, value, side) + known
    found = blocks.weighted(exact, solve, found, side)
    out = blocks.weighted(passes, read_b, found, side)
    out += blocks.weighted(passes, read_k, value, side) + past
    # a step writes what `a` found under b and the value under the key
    written = jnp.concatenate([found, value.astype(jnp.float32)], axis=1)
    moved = blocks.product("tn", exact, jnp.concatenate(ends, axis=1), written)
    (carry,) = blocks.columns(decay.total[:, 0])
    return (scale * out,), blocks.keep(masks.carried, carry * state) + moved
