"""Which keys a query sees."""

import jax
import jax.numpy as jnp


def visible(
    query_positions: jax.Array | None,
    key_positions: jax.Array | None,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
    sink_tokens: int,
) -> jax.Array:
    """bool, broadcastable to [batch, queries, keys].

    positions int32 [batch, queries] and [batch, keys], None if neither `causal` nor `window` asks;
    segments likewise, negative for padding, None for one segment without padding.
    """
    mask = jnp.ones((1, 1, 1), bool)
    if causal or window is not None:
        distance = query_positions[:, :, None] - key_positions[:, None, :]
        if causal:
            mask &= distance >= 0
        if window is not None:
            mask &= (distance < window) | (key_positions < sink_tokens)[:, None, :]
    if query_segments is not None:
        own = query_segments[:, :, None] == key_segments[:, None, :]
        mask &= own & (key_segments >= 0)[:, None, :]
    return mask
