"""All chunks at once: each from an empty memory, then what the chunks before it left.

Within a chunk the steps are taken one after another, for all chunks and channels together, along
with the product of what they keep. Every factor is at most 1 in magnitude, so nothing grows and
nothing is divided, and h_t = (h_t of the chunk alone) + (product up to t) (memory at its start).
"""

import functools

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.chunks import chunk_length
from memseq.pallas_kernels.common.segments import restarts
from memseq.pallas_kernels.linear_scan.gates import out_dtype, transition
from memseq.pallas_kernels.linear_scan.reference import reference


def chunked(x, log_decay, sign, phase, initial_state, index, valid, *, chunk_size=None):
    """See `linear_scan`; zeros at padding, `index` and `valid` the segments or None.

    A CPU has few hands and begins a loop's step in no time: left to itself, it takes all time as
    one chunk.
    """
    arrays = (x, log_decay, sign, phase, initial_state, index, valid)
    form = functools.partial(_form, chunk=chunk_length(chunk_size, x.shape[1]))
    if chunk_size is not None:
        return form(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=reference, default=form)


def _form(x, log_decay, sign, phase, initial_state, index, valid, *, chunk):
    dtype, time = initial_state.dtype, x.shape[1]
    kept = transition(log_decay, sign, phase, dtype)
    kept = jnp.broadcast_to(kept, (kept.shape[0] if kept.ndim == 3 else 1, time, x.shape[2]))
    if index is not None:
        kept = jnp.where(valid[..., None], kept, 1)
        kept = jnp.where(restarts(index)[..., None], 0, kept)
    out, state = recurrence(kept, x.astype(dtype), initial_state, chunk)
    return out.astype(out_dtype(x, dtype)), state


def recurrence(
    kept: jax.Array, x: jax.Array, state: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """h_t = kept_t h_{t-1} + x_t elementwise: all h_t, and the last.

    Args:
        kept: [batch or 1, time, ...], at most 1 in magnitude.
        x: [batch, time, ...].
        state: [batch, ...], before the first step.
        chunk: steps that are taken one after another.
    """
    time = x.shape[1]

    def cut(x, neutral):
        """[batch, time, ...] -> [chunk, batch, chunks, ...]."""
        padding = [(0, 0), (0, -time % chunk)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding, constant_values=neutral)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 2, 0)

    def step(carry, inputs):
        alone, through = carry
        kept, x = inputs
        carry = kept * alone + x, kept * through
        return carry, carry

    def pass_on(state, inputs):
        end, through = inputs
        return end + through * state, state

    x, kept = cut(x, 0), cut(kept, 1)
    empty = jnp.zeros_like(x[0]), jnp.ones_like(kept[0])
    ends, (alone, through) = jax.lax.scan(step, empty, (kept, x))
    state, starts = jax.lax.scan(pass_on, state, tuple(jnp.moveaxis(e, 1, 0) for e in ends))
    out = jnp.moveaxis(alone + through * jnp.moveaxis(starts, 0, 1), 0, 2)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :time], state
