"""The definition of `log_linear_attention`: one step of time after another."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.segments import restarts
from memseq.pallas_kernels.log_linear_attention.levels import place

HIGHEST = jax.lax.Precision.HIGHEST


def reference(
    query,
    key,
    value,
    level_scale,
    log_decay,
    beta,
    initial_state,
    index,
    before,
    after,
    *,
    scale,
    chunk_size=None,
):
    """See `log_linear_attention`; heads equal, padding zeroed, `index` the segment index or None.

    The state is [batch, heads, places, key_dim, value_dim], see `levels`, as are `before`, `after`.
    """
    del chunk_size
    dtype, places = initial_state.dtype, initial_state.shape[2]

    def step(state, inputs):
        q, k, v, weight, g, b, restart, before, after = inputs  # [B, H, ...], the last three [B]
        if restart is not None:
            state = jnp.where(restart[:, None, None, None, None], 0, state)
        if g is not None:
            state *= jnp.exp(g)[..., None, None, None]
        if b is not None:
            held = jnp.einsum("bhk,bhmkv->bhmv", k, state, precision=HIGHEST)
            k_write = b[..., None] * k
            state -= k_write[..., None, :, None] * held[..., None, :]
        own = (k if b is None else k_write)[..., :, None] * v[..., None, :]
        read = weight[..., :1, None] * own + jnp.einsum(
            "bhm,bhmkv->bhkv", weight[..., 1:], state, precision=HIGHEST
        )
        out = scale * jnp.einsum("bhk,bhkv->bhv", q, read, precision=HIGHEST)

        here = jnp.arange(places)
        target = place(after, before, places)[:, None]
        below, at = ((x[:, None, :, None, None]) for x in (here < target, here == target))
        merged = own + jnp.where(below | at, state, 0).sum(axis=2)
        moved = jnp.where(at, merged[:, :, None], jnp.where(below, 0, state))
        written = (after != before)[:, None, None, None, None]
        return jnp.where(written, moved, state), out

    by_time = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0),
        (
            *(x.astype(dtype) for x in (query, key, value, level_scale)),
            log_decay,
            None if beta is None else beta.astype(dtype),
            None if index is None else restarts(index),
            before,
            after,
        ),
    )
    state, out = jax.lax.scan(step, initial_state, by_time)
    return jnp.moveaxis(out, 0, 1).astype(value.dtype), state
