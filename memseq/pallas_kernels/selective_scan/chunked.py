"""One chunk after another, each forgotten but for its inputs and the state that it started from.

Within a chunk all states are held at once, [batch, chunk, channels, state_dim], and taken in
parallel as in `linear_scan`; a CPU, which gains nothing by that, holds them only going backward.
The backward pass takes each chunk again.
"""

import functools

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.chunks import chunk_length
from memseq.pallas_kernels.common.segments import restarts
from memseq.pallas_kernels.linear_scan.chunked import recurrence
from memseq.pallas_kernels.selective_scan.reference import steps

CHUNK = 16  # its states are what a call holds: more steps cost memory before they gain speed
INNER = 4  # steps of a chunk that are taken one after another


def chunked(x, dt, A, B, C, D, initial_state, index, *, chunk_size=None):
    """See `selective_scan`; zeros at padding, `index` the segment index or None."""
    dtype, (batch, time, channels) = initial_state.dtype, x.shape
    chunk = chunk_length(CHUNK if chunk_size is None else chunk_size, time)
    # before the loop, whose backward pass adds up their cotangents
    A, D = A.astype(dtype), None if D is None else D.astype(dtype)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, inputs):
        x, dt, B, C, restart = inputs
        arrays = (x, dt, A, B, C, D, state, restart)
        y, state = jax.lax.platform_dependent(*arrays, cpu=steps, default=parallel)
        return state, y

    def cut(x):
        """[batch, time, ...] -> [chunks, batch, chunk, ...]; zeros write and decay nothing."""
        x = jnp.pad(x, [(0, 0), (0, -time % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    restart = None if index is None else restarts(index)
    inputs = jax.tree.map(cut, (x, dt, B, C, restart))
    state, y = jax.lax.scan(step, initial_state, inputs)
    return jnp.moveaxis(y, 0, 1).reshape(batch, -1, channels)[:, :time], state


def parallel(x, dt, A, B, C, D, state, restart):
    """As `steps`, holding the states of all steps."""
    dtype, (batch, time, _) = state.dtype, x.shape
    groups, state_dim = B.shape[2:]
    rates = A.reshape(groups, -1, state_dim)
    start = state.reshape(batch, *rates.shape)
    by_group = (batch, time, groups, -1)
    wide, dt = (y.astype(dtype).reshape(by_group) for y in (x, dt))
    B, C = (y.astype(dtype)[:, :, :, None] for y in (B, C))
    kept = jnp.exp(dt[..., None] * rates)  # [batch, time, groups, channels / groups, state_dim]
    if restart is not None:
        kept = jnp.where(restart[:, :, None, None, None], 0, kept)
    states, end = recurrence(kept, (dt * wide)[..., None] * B, start, min(INNER, time))
    y = jnp.sum(states * C, axis=-1).reshape(x.shape)
    if D is not None:
        y += D * x.astype(dtype)
    return y.astype(x.dtype), end.reshape(state.shape)
