"""From an operation's arrays to the operands of its TPU kernels and back, for matrix memories.

[batch, time, heads, dim] becomes [batch x heads, time, dim] with time padded to whole grid steps by
zeros, which write and decay nothing. XLA does this, and its derivative, outside the kernels.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.mosaic_tpu import blocks, recurrence
from memseq.pallas_kernels.common.mosaic_tpu.hardware import LANES, kernel_dtype, operands_vjp

LARGEST = {"key_dim": 256, "value_dim": 512}  # whose state and chunks fit the vector memory


class Call(NamedTuple):
    """One call of an operation: how to make its operands, and its chunk's function.

    turned: the kernel's state is [value_dim, key_dim], else [key_dim, value_dim].
    """

    name: str
    step: recurrence.Step
    operands: Callable[[tuple], recurrence.Operands]
    plan: recurrence.Plan
    value: jax.Array
    turned: bool = True


def limit(query: jax.Array, value: jax.Array, state: jax.Array) -> str | None:
    """Why sizes or dtypes do not fit the kernels, or None."""
    if state.dtype != jnp.float32:
        return f"the kernels compute in float32, got an input of {state.dtype}"
    sizes = {"key_dim": query.shape[3], "value_dim": value.shape[3]}
    for name, size in sizes.items():
        if size > LARGEST[name]:
            return f"{name} is {size}, the kernels take up to {LARGEST[name]}"
    return None


def plan(
    query: jax.Array, value: jax.Array, chunk_size: int | None, most: int, at_once: int = 8
) -> recurrence.Plan:
    """Chunks of up to `most` steps, as many heads and chunks at once as the vector memory holds.

    Several heads (`at_once`, of a register's width): one after another, the matrix unit would wait
    for each one's chain of products. Eight chunks, or four of sixteen heads: what a grid step costs
    by itself is then less than a fifth.
    """
    time, heads = query.shape[1:3]
    wanted = min(most, most if chunk_size is None else chunk_size, time)
    chunk = max(16, 1 << (wanted - 1).bit_length())  # 16 rows of bfloat16 fill a register
    registers = -(-max(query.shape[3], value.shape[3]) // LANES)
    bytes_each = max(query.dtype.itemsize, value.dtype.itemsize, 2)
    all_chunks = -(-time // chunk)
    together = recurrence.largest_divisor(heads, max(1, at_once // registers))
    most_chunks = max(1, 128 // (bytes_each * registers * max(8, together * registers)))
    grid_steps = -(-all_chunks // most_chunks)
    return recurrence.Plan(chunk, -(-all_chunks // grid_steps), together)


def passes(*inputs: jax.Array) -> int:
    """Of a matrix product: 6 (float32) if an input is wider than 16 bits, 1 for bfloat16 alone."""
    if any(jnp.finfo(x.dtype).bits >= 32 for x in inputs):
        return 6
    return 3 if any(x.dtype == jnp.float16 for x in inputs) else 1


def forward(call: Call, arrays: tuple) -> tuple[jax.Array, jax.Array]:
    operands = call.operands(arrays)
    number, time, _ = operands.steps[0].shape
    shape = (number, time, call.value.shape[3])
    out = jax.ShapeDtypeStruct(shape, kernel_dtype(call.value.dtype))
    (out,), state = recurrence.forward(call.step, operands, (out,), call.plan, name=call.name)
    out = from_sequences(out, call.value.shape).astype(call.value.dtype)
    return out, from_state(state, call.value.shape[0], call.turned)


def backward(call: Call, arrays: tuple, cotangents: tuple) -> tuple:
    def operands(arrays):
        found = call.operands(arrays)
        return (found.steps, found.rows, found.constants, found.state), (found.fixed, found.shared)

    made, pull, (fixed, shared) = operands_vjp(operands, arrays)
    d_out, d_state = cotangents
    d_out = to_sequences(d_out, call.plan)
    found = recurrence.backward(
        call.step,
        recurrence.Operands(*made, fixed, shared),
        ((d_out,), to_state(d_state, call.turned)),
        call.plan,
        name=call.name,
    )
    return pull(found)


def to_sequences(x: jax.Array, plan: recurrence.Plan) -> jax.Array:
    """[batch, time, heads, dim] -> [batch x heads, padded time, dim], in a dtype of the kernels."""
    x = x.astype(kernel_dtype(x.dtype))
    x = jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], x.shape[3])
    return jnp.pad(x, ((0, 0), (0, recurrence.padded_time(x.shape[1], plan) - x.shape[1]), (0, 0)))


def from_sequences(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse: `shape` is [batch, time, heads, dim]."""
    batch, time, heads, dim = shape
    return jnp.moveaxis(x[:, :time].reshape(batch, heads, time, dim), 1, 2)


def to_rows(x: jax.Array, plan: recurrence.Plan) -> jax.Array:
    """[batch, time, heads] -> float32 [programs, chunks, H, C]."""
    x = to_sequences(x[..., None].astype(jnp.float32), plan)
    return jnp.swapaxes(x.reshape(-1, plan.heads, x.shape[1] // plan.chunk, plan.chunk), 1, 2)


def to_state(state: jax.Array, turned: bool = True) -> jax.Array:
    """[batch, heads, key_dim, value_dim] -> [batch x heads, value_dim, key_dim] if turned."""
    state = state.reshape(-1, *state.shape[2:])
    return jnp.swapaxes(state, 1, 2) if turned else state


def from_state(state: jax.Array, batch: int, turned: bool = True) -> jax.Array:
    """The inverse."""
    state = jnp.swapaxes(state, 1, 2) if turned else state
    return state.reshape(batch, -1, *state.shape[1:])


def shared(index: jax.Array | None, plan: recurrence.Plan) -> jax.Array | None:
    """The rows that masks are made of, from the segment index int32 [batch, time] or None."""
    if index is None:
        return None
    padding = recurrence.padded_time(index.shape[1], plan) - index.shape[1]
    return blocks.mask_rows(jnp.pad(index, ((0, 0), (0, padding)), mode="edge"), plan.chunk)
