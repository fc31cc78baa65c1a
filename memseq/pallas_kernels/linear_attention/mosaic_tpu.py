"""TPU kernels of `linear_attention`.

The chunk's function is that of the `chunked` form with the memory kept transposed,
[value_dim, key_dim], so that a decay of key channels runs along the lanes.
`common.mosaic_tpu.recurrence` makes the forward and the backward kernel of it.
"""

import functools

import jax.numpy as jnp

from memseq.pallas_kernels.common.dispatch import KernelForm
from memseq.pallas_kernels.common.mosaic_tpu import blocks, recurrence
from memseq.pallas_kernels.common.mosaic_tpu import heads as heads_of

NAME = "linear_attention"


def limit(query, key, value, log_decay, value_log_decay, bonus, state, index, **options):
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
    query, key, value, log_decay, value_log_decay, bonus, state, index = arrays
    by_channel = log_decay is not None and log_decay.ndim == 4
    by_step = not by_channel and value_log_decay is None
    plan = heads_of.plan(query, value, chunk_size, 128 if by_step else 64)
    step = functools.partial(
        _step,
        scale=scale,
        passes=heads_of.passes(query, key, value),
        decay=None if log_decay is None else "channel" if by_channel else "head",
        value_decay=value_log_decay is not None,
        exclusive=bonus is not None,
    )
    return heads_of.Call(NAME, step, functools.partial(_operands, plan=plan), plan, value)


def _operands(arrays, *, plan) -> recurrence.Operands:
    query, key, value, log_decay, value_log_decay, bonus, state, index = arrays
    steps = [heads_of.to_sequences(x, plan) for x in (query, key, value)]
    rows, fixed = [], []
    shared = heads_of.shared(index, plan)
    if log_decay is not None and log_decay.ndim == 4:
        steps.append(heads_of.to_sequences(log_decay, plan))
    elif log_decay is not None:
        by_chunk = heads_of.to_rows(log_decay, plan)
        for exclusive in (False, True) if bonus is not None else (False,):
            coarse, fine = blocks.split_sums(by_chunk, shared, exclusive)
            rows.append(fine)
            fixed.append(coarse)
    if value_log_decay is not None:
        steps.append(heads_of.to_sequences(value_log_decay, plan))
    constants = ()
    if bonus is not None:
        batch = query.shape[0]
        constants = (jnp.broadcast_to(bonus, (batch, *bonus.shape)).reshape(-1, 1, bonus.shape[1]),)
    return recurrence.Operands(
        tuple(steps),
        tuple(rows),
        constants,
        heads_of.to_state(state),
        tuple(fixed),
        shared,
    )


def _step(chunk: recurrence.Chunk, state, *, scale, passes, decay, value_decay, exclusive):
    query, key, value, *gates = chunk.steps
    size = query.shape[1]
    masks = blocks.masks(chunk.shared, size)
    q_start, k_end, carry = query, key, 1.0
    if decay == "channel":
        found = blocks.channel_decay(gates[0], exclusive, exclusive)
        (weights,) = blocks.decayed_products(
            (passes,), (query,), key, [(read,) for read, _ in found.levels], (not exclusive,)
        )
        weights = blocks.keep(masks.pairs, weights)
        q_start, k_end, carry = query * found.read_start, key * found.to_end, found.total
    elif decay == "head":
        sums = list(zip(chunk.fixed, chunk.rows, strict=True))
        i, j = blocks.positions(size)
        seen = masks.pairs & (i > j) if exclusive else masks.pairs
        found = blocks.head_decay(sums[-1], sums[0], seen, chunk.shared)
        weights = blocks.product("nt", passes, query, key) * found.between
        q_start, k_end, carry = query * found.from_start, key * found.to_end, found.total
    else:
        weights = blocks.keep(masks.pairs, blocks.product("nt", passes, query, key))
    if exclusive:
        i, j = blocks.positions(size)
        own = query.astype(jnp.float32) * chunk.constants[0] * key.astype(jnp.float32)
        weights = jnp.where(i == j, jnp.sum(own, axis=2, keepdims=True), weights)
    q_start = blocks.keep(masks.from_start, q_start)
    k_end = blocks.keep(masks.to_end, k_end)
    past = blocks.product("nt", passes, q_start, state)
    if value_decay:
        found = blocks.channel_decay(gates[-1], exclusive, exclusive)
        out = blocks.decayed_sum(passes, weights, value, [read for read, _ in found.levels])
        out += past * found.read_start
        value = value * found.to_end
        carry = carry * jnp.swapaxes(found.total, 1, 2)
    else:
        out = blocks.product("nn", passes, weights, value) + past
    state = blocks.keep(masks.carried, carry * state) + blocks.product("tn", passes, value, k_end)
    return (scale * out,), state
