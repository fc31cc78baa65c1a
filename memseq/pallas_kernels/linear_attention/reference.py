"""The definition of `linear_attention`: one step of time after another."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.segments import restarts


def reference(
    query,
    key,
    value,
    log_decay,
    value_log_decay,
    bonus,
    initial_state,
    index,
    *,
    scale,
    chunk_size=None,
):
    """See `linear_attention`; heads equal, padding zeroed, `index` the segment index or None."""
    del chunk_size
    dtype = initial_state.dtype

    def step(state, inputs):
        q, k, v, g, gv, restart = inputs  # [B, H, K] and [B, H, V]
        if restart is not None:
            state = jnp.where(restart[:, None, None, None], 0, state)
        decayed = state
        if g is not None:
            decayed *= jnp.exp(g[..., None] if g.ndim == 3 else g[..., None, None])
        if gv is not None:
            decayed *= jnp.exp(gv[..., None, :])
        new = decayed + k[..., :, None] * v[..., None, :]
        read = new if bonus is None else state + (bonus * k)[..., :, None] * v[..., None, :]
        out = jnp.einsum("bhk,bhkv->bhv", q, read, precision=jax.lax.Precision.HIGHEST)
        return new, scale * out

    by_time = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0),
        (
            *(x.astype(dtype) for x in (query, key, value)),
            log_decay,
            value_log_decay,
            None if index is None else restarts(index),
        ),
    )
    state, out = jax.lax.scan(step, initial_state, by_time)
    return jnp.moveaxis(out, 0, 1).astype(value.dtype), state
