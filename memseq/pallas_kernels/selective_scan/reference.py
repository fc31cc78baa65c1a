"""The definition of `selective_scan`: one step of time after another."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.segments import restarts


def reference(x, dt, A, B, C, D, initial_state, index, *, chunk_size=None):
    """See `selective_scan`; zeros at padding, `index` the segment index or None."""
    del chunk_size
    restart = None if index is None else restarts(index)
    return steps(x, dt, A, B, C, D, initial_state, restart)


def steps(x, dt, A, B, C, D, state, restart):
    """`reference` with the positions at which the memory restarts, bool [batch, time] or None."""
    dtype, channels = state.dtype, x.shape[2]
    # before the loop, whose backward pass adds up their cotangents
    A, D = A.astype(dtype), None if D is None else D.astype(dtype)

    def step(state, inputs):
        x, dt, B, C, restart = inputs  # x and dt [B, C], B and C [B, G, N], state [B, C, N]
        if restart is not None:
            state = jnp.where(restart[:, None, None], 0, state)
        x, dt = x.astype(dtype), dt.astype(dtype)
        B, C = (jnp.repeat(y.astype(dtype), channels // y.shape[1], axis=1) for y in (B, C))
        state = jnp.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B
        y = jnp.sum(C * state, axis=-1)
        if D is not None:
            y += D * x
        return state, y

    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (x, dt, B, C, restart))
    state, y = jax.lax.scan(step, state, by_time)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), state
