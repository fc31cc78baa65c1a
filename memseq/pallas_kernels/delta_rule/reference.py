"""The definition of `delta_rule`: one step of time after another."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.segments import restarts


def reference(
    query,
    key,
    value,
    beta,
    log_decay,
    erase_key,
    initial_state,
    index,
    *,
    scale,
    erase,
    chunk_size=None,
):
    """See `delta_rule`; heads equal, padding zeroed, `index` the segment index or None."""
    del chunk_size
    dtype = initial_state.dtype
    highest = jax.lax.Precision.HIGHEST

    def step(state, inputs):
        q, k, v, b, g, e, restart = inputs  # [B, H, K], [B, H, V] and [B, H]
        if restart is not None:
            state = jnp.where(restart[:, None, None, None], 0, state)
        decayed = state
        if g is not None:
            decayed *= jnp.exp(g[..., None] if g.ndim == 3 else g[..., None, None])
        held = decayed if erase == "decayed" else state
        error = v - jnp.einsum("bhk,bhkv->bhv", k if e is None else e, held, precision=highest)
        new = decayed + k[..., :, None] * (b[..., None] * error)[..., None, :]
        return new, scale * jnp.einsum("bhk,bhkv->bhv", q, new, precision=highest)

    by_time = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0),
        (
            *(x.astype(dtype) for x in (query, key, value, beta)),
            log_decay,
            None if erase_key is None else erase_key.astype(dtype),
            None if index is None else restarts(index),
        ),
    )
    state, out = jax.lax.scan(step, initial_state, by_time)
    return jnp.moveaxis(out, 0, 1).astype(value.dtype), state
