"""TPU kernels of `neural_memory`.

The chunk's function is `one_chunk.advance`, as in the `chunked` form, with the weights and the
momentum in VMEM. `common.mosaic_tpu.recurrence` makes the forward and the backward kernel of it;
what does not depend on the memory (where tokens go, what gates add up to) XLA does before, and
differentiates.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.dispatch import KernelForm, pulled
from memseq.pallas_kernels.common.mosaic_tpu import blocks, recurrence
from memseq.pallas_kernels.common.mosaic_tpu.hardware import LANES, SUBLANES
from memseq.pallas_kernels.common.sharded import over_mesh
from memseq.pallas_kernels.neural_memory.chunks import Carry, Chunk, Fixed, cut_up, put_together
from memseq.pallas_kernels.neural_memory.one_chunk import advance
from memseq.pallas_kernels.neural_memory.retention import BORDER
from memseq.pallas_kernels.neural_memory.state import Inputs

NAME = "neural_memory"
LAYERS = 2
CHUNK = 128  # steps of the longest update chunk: compilers take minutes for longer ones
WIDTH = 2**17  # steps of a chunk times its widest layer, at most
STATE = 2 * 2**20  # bytes of the largest memory, of a head
TOGETHER = 2**20  # bytes of the memories that a program holds, if they are of several heads
ROWS = 16  # a chunk's steps are padded to a multiple: the rows of a tile of bfloat16
GRID_STEP = 2**11  # steps of a grid step, of all heads of a program, if it has several chunks
REMADE = 12 * 2**20  # bytes of the states that the backward pass makes again at once

# what a step has in the columns beside `written`, and a chunk in its row of numbers
COLUMNS = ("kept", "carried", "written_end", "added_end", "threshold")
NUMBERS = ("kept_end", "carried_end", "held_end")
FLAGS = ("restart", "full", "cut")


def limit(*arrays, tree, retention, update_chunk, anchor, carried, **options) -> str | None:
    """Why the kernels cannot run, or None."""
    inputs: Inputs = jax.tree.unflatten(tree, arrays)
    weights = [layer["weight"] for layer in inputs.initial]
    if weights[0].dtype != jnp.float32:
        return f"the kernels compute in float32, got an input of {weights[0].dtype}"
    if len(weights) > LAYERS:
        return f"the memory has {len(weights)} layers, the kernels take up to {LAYERS}"
    if inputs.step.shape[-1] > 1:
        return f"step has a window of {inputs.step.shape[-1]}, the kernels take 1"
    if not retention.scales:
        return f"retention {retention.kind!r} needs weights for every step"
    if update_chunk > CHUNK:
        return f"update_chunk is {update_chunk}, the kernels take up to {CHUNK}"
    widest = max(n for weight in weights for n in weight.shape[1:])
    if _up(update_chunk, ROWS) * widest > WIDTH:
        return (
            f"a layer is {widest} wide and update_chunk {update_chunk}, the kernels take a product "
            f"of up to {WIDTH}"
        )
    whole = inputs.valid is None and not carried and inputs.query.shape[1] % update_chunk == 0
    copies = 1 + (inputs.momentum is not None) + (not whole or anchor == "call")
    size = copies * sum(_bytes(x.shape[1:]) for x in jax.tree.leaves(inputs.initial))
    if size > STATE:
        return (
            f"a head's weights, momentum and anchor take {size / 2**20:.1f} MiB, the kernels hold "
            f"up to {STATE / 2**20:.0f}"
        )
    return None


def forward(*arrays, tree, memory, loss, retention, precision, **cutting):
    """As `chunked`."""
    inputs: Inputs = jax.tree.unflatten(tree, arrays)
    cut = cut_up(inputs, **cutting)
    passes = 6 if precision == jax.lax.Precision.HIGHEST else 1
    step = functools.partial(
        advance,
        memory=memory,
        loss=loss,
        retention=retention,
        anchor=cutting["anchor"],
        read=cutting["read"],
        outer_grad=cutting["outer_grad"],
        product=lambda kind, a, b: blocks.product(kind, passes, a, b),
    )
    fixed = cut.fixed
    if cut.chunks.restart is None and retention.kind not in BORDER:
        fixed = fixed._replace(initial=())
    out, carry = _run(step, cut.chunks, fixed, cut.carry)
    return put_together(inputs, cut, out, carry)


def backward(arrays, cotangents, **options):
    """One cotangent for each of `arrays`, None for booleans and integers."""
    return pulled(functools.partial(forward, **options), arrays, cotangents)


MOSAIC_TPU = KernelForm(forward, backward, limit)


def _bytes(shape: tuple[int, ...]) -> int:
    """Of a float32 matrix in vector memory; a vector is a row."""
    rows, columns = shape if len(shape) == 2 else (1, *shape)
    return 4 * _up(rows, SUBLANES) * _up(columns, LANES)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class _Arrays(NamedTuple):
    """What goes into the kernels, [batch, heads, ...] each, flags [batch, chunks, 1, F] or None.

    steps: query, key, value and gates [..., time, .]. numbers: [..., chunks, K]. constants and
    state: the leaves of `Fixed` and `Carry`.
    """

    steps: tuple[jax.Array, ...]
    numbers: jax.Array
    constants: tuple[jax.Array, ...]
    state: tuple[jax.Array, ...]
    flags: jax.Array | None


def _run(step, chunks: Chunk, fixed: Fixed, carry: Carry) -> tuple[jax.Array, Carry]:
    """Reads [batch, heads, chunks, C, dim] and the last carry, from what `cut_up` gives."""
    batch, heads, count, size, _ = chunks.query.shape
    plan = _plan(chunks, carry)
    total = _up(count, plan.chunks)
    if total > count and chunks.full is None:
        chunks = chunks._replace(full=jnp.ones((batch, 1, count, 1, 1), bool))

    def padded(x, rows=1, empty=0.0):
        """[., ., chunks, ., n]: whole grid steps, chunks of `rows`."""
        padding = [(0, 0), (0, 0), (0, total - count), (0, rows - x.shape[3]), (0, 0)]
        return jnp.pad(x, padding, constant_values=empty)

    def side_by_side(names, rows=1):
        found = [name for name in names if getattr(chunks, name) is not None]
        # chunks after the last keep all and write nothing
        return tuple(found), [
            padded(getattr(chunks, name), rows, float(name in ("kept_end", "held_end")))
            for name in found
        ]

    columns, gates = side_by_side(COLUMNS, plan.chunk)
    if chunks.written is not None:
        gates.insert(
            0, padded(jnp.pad(chunks.written, [(0, 0)] * 4 + [(0, plan.chunk - size)]), plan.chunk)
        )
    names, numbers = side_by_side(NUMBERS)
    flags, flagged = side_by_side(FLAGS)
    if fixed.scale is not None:
        scale = jnp.pad(fixed.scale, ((0, 0), (0, plan.chunk - size), (0, 0)))
        fixed = fixed._replace(scale=scale)
    constants, fixed_tree = jax.tree.flatten(fixed)
    state, carry_tree = jax.tree.flatten(carry)
    steps = [padded(x, plan.chunk) for x in (chunks.query, chunks.key, chunks.value)]
    arrays = _Arrays(
        tuple(
            x.reshape(batch, heads, -1, x.shape[-1])
            for x in (*steps, jnp.concatenate(gates, axis=-1))
        ),
        jnp.concatenate(numbers, axis=-1)[..., 0, :],
        tuple(jnp.broadcast_to(x, (batch, *x.shape)) for x in constants),
        tuple(state),
        jnp.concatenate(flagged, axis=-1)[:, 0].astype(jnp.float32) if flags else None,
    )

    def of_chunk(chunk: recurrence.Chunk, state):
        query, key, value, gates = chunk.steps
        own = {"written": gates[:, :, : plan.chunk] if chunks.written is not None else None}
        first = 0 if chunks.written is None else plan.chunk
        own |= {n: gates[:, :, first + i : first + i + 1] for i, n in enumerate(columns)}
        own |= {n: chunk.rows[0][:, i : i + 1][:, None] for i, n in enumerate(names)}
        own |= {n: chunk.shared[None, :, i : i + 1] > 0 for i, n in enumerate(flags)}
        missing = dict.fromkeys(set(Chunk._fields) - {"query", "key", "value", *own})
        carry, out = step(
            jax.tree.unflatten(carry_tree, state),
            Chunk(query=query, key=key, value=value, **own, **missing),
            jax.tree.unflatten(fixed_tree, chunk.constants),
        )
        return (out,), tuple(jax.tree.leaves(carry))

    out, *state = _kernels(of_chunk, plan, arrays)
    out = out.reshape(batch, heads, total, plan.chunk, -1)[:, :, :count, :size]
    return out, jax.tree.unflatten(carry_tree, state)


def _plan(chunks: Chunk, carry: Carry) -> recurrence.Plan:
    """As many heads and chunks at once as the vector memory holds; `heads` is the most."""
    heads, count, size = chunks.query.shape[1:4]
    each = sum(_bytes(x.shape[2:]) for x in jax.tree.leaves(carry))
    rows = _up(size, ROWS)
    heads = max(1, min(heads, 8, TOGETHER // each))
    at_once = max(1, min(count, 8, GRID_STEP // (heads * rows), REMADE // (heads * each)))
    return recurrence.Plan(rows, -(-count // -(-count // at_once)), heads, remake=True)


def _kernels(step: recurrence.Step, plan: recurrence.Plan, arrays: _Arrays) -> tuple:
    """(reads [batch, heads, time, dim], *the last state), differentiated by the kernels."""
    flat, tree = jax.tree.flatten(arrays, is_leaf=lambda x: x is None)
    axes = ["bh"] * (len(flat) - 1) + ["b"]
    out_axes = ["bh"] * (1 + len(arrays.state))

    def operands(flat) -> tuple[recurrence.Operands, recurrence.Plan]:
        """Of what one device has."""
        own: _Arrays = jax.tree.unflatten(tree, flat)
        heads = recurrence.largest_divisor(own.numbers.shape[1], plan.heads)

        def sequences(x):
            return x.reshape(-1, *x.shape[2:])

        numbers = own.numbers.reshape(-1, heads, *own.numbers.shape[2:])
        made = recurrence.Operands(
            tuple(map(sequences, own.steps)),
            (jnp.swapaxes(numbers, 1, 2),),
            tuple(map(sequences, own.constants)),
            tuple(map(sequences, own.state)),
            shared=own.flags,
        )
        return made, plan._replace(heads=heads)

    def forward(*flat):
        lead = flat[0].shape[:2]
        made, own_plan = operands(flat)
        out = jax.ShapeDtypeStruct(made.steps[2].shape, jnp.float32)
        (out,), state = recurrence.forward(step, made, (out,), own_plan, name=NAME)
        return tuple(x.reshape(*lead, *x.shape[1:]) for x in (out, *state))

    def backward(*both):
        flat, cotangents = both[: len(axes)], both[len(axes) :]
        made, own_plan = operands(flat)
        d_out, *d_state = (x.reshape(-1, *x.shape[2:]) for x in cotangents)
        d_steps, (d_numbers,), d_constants, d_state = recurrence.backward(
            step, made, ((d_out,), tuple(d_state)), own_plan, name=NAME
        )
        found = _Arrays(d_steps, jnp.swapaxes(d_numbers, 1, 2), d_constants, d_state, None)
        found = jax.tree.leaves(found, is_leaf=lambda x: x is None)
        return tuple(
            None if d is None else d.reshape(x.shape) for d, x in zip(found, flat, strict=True)
        )

    @jax.custom_vjp
    def call(*flat):
        return over_mesh(forward, axes, out_axes, flat)(*flat)

    def backward_rule(flat, cotangents):
        both = (*flat, *cotangents)
        return over_mesh(backward, (*axes, *out_axes), axes, both)(*both)

    call.defvjp(lambda *flat: (call(*flat), flat), backward_rule)
    return call(*flat)
