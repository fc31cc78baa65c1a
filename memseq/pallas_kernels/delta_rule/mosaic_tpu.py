"""TPU kernels of `delta_rule`.

The chunk's function is that of the `chunked` form, with the matrices of a chunk side by side
(`common.mosaic_tpu.squares`). `common.mosaic_tpu.recurrence` makes the forward and the backward
kernel of it.
"""

import functools

from memseq.pallas_kernels.common.dispatch import KernelForm
from memseq.pallas_kernels.common.mosaic_tpu import blocks, recurrence, squares
from memseq.pallas_kernels.common.mosaic_tpu import heads as heads_of

NAME = "delta_rule"
CHUNK = 64  # the inverse grows with the chunk's square


def limit(query, key, value, beta, log_decay, erase_key, state, index, **options):
    """Why the kernels cannot run, or None."""
    return heads_of.limit(query, value, state)


def forward(*arrays, scale, erase, chunk_size=None):
    """As `chunked`."""
    return heads_of.forward(_call(arrays, scale, erase, chunk_size), arrays)


def backward(arrays, cotangents, *, scale, erase, chunk_size=None):
    """One cotangent for each of `arrays`, None for `index` and for None."""
    return heads_of.backward(_call(arrays, scale, erase, chunk_size), arrays, cotangents)


MOSAIC_TPU = KernelForm(forward, backward, limit)


def _call(arrays, scale, erase, chunk_size) -> heads_of.Call:
    query, key, value, _, log_decay, erase_key, *_ = arrays
    decay = None if log_decay is None else "channel" if log_decay.ndim == 4 else "head"
    passes = heads_of.passes(query, key, value)
    # sixteen where the program stays small
    at_once = 8 if passes == 6 or decay == "channel" else 16
    plan = heads_of.plan(query, value, chunk_size, CHUNK, at_once)
    undecayed = erase == "undecayed"
    step = functools.partial(
        _step,
        scale=scale,
        passes=passes,
        decay=decay,
        undecayed=undecayed,
        erases=erase_key is not None,
    )
    make = functools.partial(_operands, plan=plan, undecayed=undecayed)
    return heads_of.Call(NAME, step, make, plan, value, turned=False)


def _operands(arrays, *, plan, undecayed) -> recurrence.Operands:
    query, key, value, beta, log_decay, erase_key, state, index = arrays
    rows, fixed = [squares.rows(heads_of.to_rows(beta, plan))], []
    shared = heads_of.shared(index, plan)
    steps = [query, key, value]
    if erase_key is not None:
        steps.append(erase_key)
    if log_decay is not None and log_decay.ndim == 4:
        steps.append(log_decay)
    elif log_decay is not None:
        by_chunk = heads_of.to_rows(log_decay, plan)
        for exclusive in (False, True) if undecayed else (False,):
            coarse, fine = blocks.split_sums(by_chunk, shared, exclusive)
            rows.append(squares.rows(fine))
            fixed.append(squares.rows(coarse))
    return recurrence.Operands(
        tuple(heads_of.to_sequences(x, plan) for x in steps),
        tuple(rows),
        (),
        heads_of.to_state(state, turned=False),
        tuple(fixed),
        shared,
    )


def _step(chunk: recurrence.Chunk, state, *, scale, passes, decay, undecayed, erases):
    query, key, value, *others = chunk.steps
    erase = others[0] if erases else key
    heads, size, _ = query.shape
    beta = chunk.rows[0]
    side = beta.shape[1] // size
    masks = blocks.masks(chunk.shared, size, side)
    i, j = squares.positions(size, side)
    exact = max(passes, 3)  # an error is a small difference of two large numbers
    q_start, e_start, k_end, carry = query, erase, key, 1.0
    if decay == "channel":
        found = blocks.channel_decay(others[-1], False, undecayed)
        read, held = blocks.decayed_products(
            (passes, exact), (query, erase), key, found.levels, (True, False), side
        )
        q_start, e_start = query * found.read_start, erase * found.held_start
        k_end = key * found.to_end
        (carry,) = blocks.columns(found.total[:, 0])
    else:
        read, held = blocks.scores((passes, exact), (query, erase), key, side)
    if decay == "head":
        sums = list(zip(chunk.fixed, chunk.rows[1:], strict=True))
        found = blocks.head_decay(sums[0], sums[0], masks.pairs, chunk.shared)
        read *= found.between
        q_start, k_end, carry = query * found.from_start, key * found.to_end, found.total
        if undecayed:
            found = blocks.head_decay(sums[-1], sums[0], masks.pairs & (i > j), chunk.shared)
        held *= found.between
        e_start = erase * found.from_start
    read = blocks.keep(masks.pairs, read)
    held = blocks.keep(masks.pairs & (i > j), held)
    q_start, e_start = (blocks.keep(masks.from_start, x) for x in (q_start, e_start))
    k_end = blocks.keep(masks.to_end, k_end)

    (beta,) = blocks.columns(beta)
    solve = blocks.unit_lower_inverse(exact, squares.across(beta, side) * held)
    past, known = blocks.products("nn", (passes, exact), (q_start, e_start), state)
    error = value - known
    written = blocks.weighted(exact, solve, beta.reshape(heads, size, 1) * error, side)
    out = blocks.weighted(passes, read, written, side) + past
    state = blocks.keep(masks.carried, carry * state) + blocks.product("tn", passes, k_end, written)
    return (scale * out,), state
