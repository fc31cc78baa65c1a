"""The definition of `momentum_delta_rule`: one step of time after another."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.segments import restarts


def reference(
    query,
    key,
    value,
    beta,
    step,
    log_momentum,
    log_decay,
    initial_state,
    index,
    *,
    scale,
    erase,
    chunk_size=None,
):
    """See `momentum_delta_rule`; heads equal, padding zeroed, `index` the segment index or None."""
    del chunk_size
    dtype = initial_state.dtype
    highest = jax.lax.Precision.HIGHEST

    def one(state, inputs):
        q, k, v, b, s, m, g, restart = inputs  # [B, H, K], [B, H, V] and [B, H]
        if restart is not None:
            state = jnp.where(restart[:, None, None, None], 0, state)
        memory, momentum = jnp.split(state, 2, axis=-2)
        decayed = jnp.exp(g)[..., None, None] * memory
        held = decayed if erase == "decayed" else memory
        error = v - jnp.einsum("bhk,bhkv->bhv", k, held, precision=highest)
        pair = k[..., :, None] * (s[..., None] * error)[..., None, :]
        momentum = jnp.exp(m)[..., None, None] * momentum + pair
        memory = decayed + b[..., None, None] * momentum
        out = scale * jnp.einsum("bhk,bhkv->bhv", q, memory, precision=highest)
        return jnp.concatenate([memory, momentum], axis=-2), out

    by_time = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0),
        (
            *(x.astype(dtype) for x in (query, key, value, beta, step)),
            log_momentum,
            log_decay,
            None if index is None else restarts(index),
        ),
    )
    state, out = jax.lax.scan(one, initial_state, by_time)
    return jnp.moveaxis(out, 0, 1).astype(value.dtype), state
