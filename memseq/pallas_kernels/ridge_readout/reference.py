"""The definition of `ridge_readout`: one step of time after another, each solved exactly."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.segments import restarts

HIGHEST = jax.lax.Precision.HIGHEST


def reference(
    query,
    key,
    value,
    beta,
    log_decay,
    ridge,
    initial_state,
    index,
    *,
    scale,
    iterations,
    chunk_size=None,
):
    """See `ridge_readout`; heads equal, padding zeroed, `index` the segment index or None.

    The state is [batch, heads, key_dim, key_dim + value_dim]: the gram, then the memory.
    """
    del iterations, chunk_size
    key_dim, dtype = key.shape[-1], initial_state.dtype

    def step(state, inputs):
        q, k, v, b, g, restart = inputs  # [B, H, K], [B, H, V] and [B, H]
        if restart is not None:
            state = jnp.where(restart[:, None, None, None], 0, state)
        if g is not None:
            state *= jnp.exp(g)[..., None, None]
        pair = jnp.concatenate([k, v], axis=-1)
        state += (b[..., None] * k)[..., :, None] * pair[..., None, :]
        gram, memory = state[..., :key_dim], state[..., key_dim:]
        system = gram + ridge[..., None] * jnp.eye(key_dim, dtype=dtype)
        solved = jnp.linalg.solve(system, q[..., None])[..., 0]
        return state, scale * jnp.einsum("bhk,bhkv->bhv", solved, memory, precision=HIGHEST)

    by_time = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0),
        (
            *(x.astype(dtype) for x in (query, key, value, beta)),
            log_decay,
            None if index is None else restarts(index),
        ),
    )
    state, out = jax.lax.scan(step, initial_state, by_time)
    return jnp.moveaxis(out, 0, 1).astype(value.dtype), state
