"""The definition of `diagonal_plus_low_rank`: one step of time after another."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.segments import restarts


def reference(query, key, value, a, b, log_decay, initial_state, index, *, scale, chunk_size=None):
    """See `diagonal_plus_low_rank`; heads equal, padding zeroed, a decay of channels.

    index: the segment index or None.
    """
    del chunk_size
    dtype = initial_state.dtype
    highest = jax.lax.Precision.HIGHEST

    def step(state, inputs):
        q, k, v, a, b, g, restart = inputs  # [B, H, K] and [B, H, V]
        if restart is not None:
            state = jnp.where(restart[:, None, None, None], 0, state)
        held = jnp.einsum("bhk,bhkv->bhv", a, state, precision=highest)
        new = jnp.exp(g)[..., None] * state
        new += b[..., :, None] * held[..., None, :] + k[..., :, None] * v[..., None, :]
        return new, scale * jnp.einsum("bhk,bhkv->bhv", q, new, precision=highest)

    by_time = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0),
        (
            *(x.astype(dtype) for x in (query, key, value, a, b)),
            log_decay,
            None if index is None else restarts(index),
        ),
    )
    state, out = jax.lax.scan(step, initial_state, by_time)
    return jnp.moveaxis(out, 0, 1).astype(value.dtype), state
