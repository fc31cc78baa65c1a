"""TPU kernels of `selective_scan`: the state is [state_dim, channels], channels on the lanes.

The maps B and C reach all channels of a group: the kernels spread them over the lanes once for each
block of time, and add up their cotangents over all channels before they leave VMEM.
"""

import math

import jax.numpy as jnp

from memseq.pallas_kernels.common.dispatch import KernelForm
from memseq.pallas_kernels.common.mosaic_tpu import scan
from memseq.pallas_kernels.common.mosaic_tpu import scan_blocks as blocks
from memseq.pallas_kernels.common.mosaic_tpu.hardware import kernel_dtype
from memseq.pallas_kernels.common.segments import restarts

NAME = "selective_scan"
STEPS = 128  # of a block at most: maps have time on the lanes
BLOCK = 2**13  # numbers of the state of a block: 8 registers
LARGEST = 64  # state_dim
WIDEST = 2**20  # numbers of the state of a group, of which the kernels hold several in VMEM


def limit(x, dt, A, B, C, D, state, index, **options):
    """Why the kernels cannot run, or None."""
    if state.dtype != jnp.float32:
        return f"the kernels compute in float32, got an input of {state.dtype}"
    channels, state_dim = A.shape
    if state_dim > LARGEST:
        return f"state_dim is {state_dim}, the kernels take up to {LARGEST}"
    size = channels // B.shape[2] * state_dim
    if size > WIDEST:
        return f"the state of a group has {size} numbers, the kernels take up to {WIDEST}"
    return None


def forward(*arrays, chunk_size=None):
    """As `chunked`."""
    return scan.forward(_call(arrays, chunk_size), arrays)


def backward(arrays, cotangents, *, chunk_size=None):
    """One cotangent for each of `arrays`, None for `index` and None."""
    return scan.backward(_call(arrays, chunk_size), arrays, cotangents)


MOSAIC_TPU = KernelForm(forward, backward, limit)


def _call(arrays, chunk_size) -> scan.Call:
    x, _, A, B, _, _, _, _ = arrays
    _, time, channels = x.shape
    groups, state_dim = B.shape[2:]
    rows = blocks.SUBLANES * math.ceil(state_dim / blocks.SUBLANES)
    lanes = blocks.lanes_for(channels // groups, max(BLOCK // rows, blocks.LANES))
    steps = blocks.steps_for(time, STEPS if chunk_size is None else min(chunk_size, STEPS))
    plan = blocks.Plan(steps, lanes, groups)

    def to_state(h):
        """[..., channels, state_dim] -> [..., C / lanes, A, lanes], A in whole tiles."""
        h = blocks.padded(jnp.swapaxes(h, -1, -2), -2, blocks.SUBLANES)
        return blocks.to_blocks(h, plan)

    def operands(arrays):
        x, dt, A, B, C, D, state, index = arrays
        constants = (to_state(A),)
        if D is not None:
            constants += (blocks.to_blocks(D[None], plan),)
        flags = None
        if index is not None:
            flags = blocks.to_flags(restarts(index), jnp.ones(index.shape, bool), plan)
        return blocks.Operands(
            (blocks.to_rows(x, plan), blocks.to_rows(dt, plan)),
            (blocks.to_columns(B, plan), blocks.to_columns(C, plan)),
            constants,
            (to_state(state),),
            flags,
        )

    def outputs(outs, states):
        state = blocks.from_blocks(states[0], plan, state_dim, channels)
        y = blocks.from_rows(outs[0], plan, time, channels)
        return y.astype(x.dtype), jnp.swapaxes(state, -1, -2)

    def cotangents(d_y, d_state):
        return (blocks.to_rows(d_y, plan),), (to_state(d_state),)

    return scan.Call(NAME, _step, operands, outputs, cotangents, (kernel_dtype(x.dtype),), plan)


def _step(rows, columns, constants, state, flag):
    (x, dt), (write, read), (rate, *skip), (h,) = rows, columns, constants, state
    if flag is not None:
        h = jnp.where(flag == blocks.RESTART, 0.0, h)
    h = jnp.exp(dt * rate) * h + (dt * x) * write
    y = jnp.sum(read * h, axis=0, keepdims=True)
    for d in skip:
        y += d * x
    return (y,), (h,)
