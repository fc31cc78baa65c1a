"""The key-value cache of softmax attention, as a layer's state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from memseq.layers.common.base import no_segment, state_dataclass


@state_dataclass
class SoftmaxAttentionState:
    """Keys and values of the segment that goes on.

    Attributes:
        key, value: [batch, slots, heads, dim]; keys as attention reads them (rotated, or moved).
        log_forget: float32 [batch, slots, heads], log forget gates; [batch, slots, 0] without.
        position: int32 [batch, slots], position of a slot's token in its segment, -1 if empty.
        length: int32 [batch], positions of the segment so far.
        conv: tail of the short convolution, [batch, conv_width - 1, channels].
        segment: int32 [batch], id of the segment, -1 for none yet.
        grows: each call adds as many slots as it has steps (the cache of `state=None`).
    """

    key: jax.Array
    value: jax.Array
    log_forget: jax.Array
    position: jax.Array
    length: jax.Array
    conv: jax.Array
    segment: jax.Array
    grows: bool = struct.field(pytree_node=False, default=False)


class Sizes(NamedTuple):
    """Heads of queries, keys and values, and sizes of a key (as of a query) and of a value."""

    heads: int
    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int


class Seen(NamedTuple):
    """Keys and values that the queries of one call may see, and where all of them stand.

    Attributes:
        keys, values: [batch, keys, heads, dim].
        log_forget: float32 [batch, keys, heads], or [batch, keys, 0] without forget gates.
        query_positions, query_segments: int32 [batch, time]; segments as the operation takes them.
        key_positions, key_segments: int32 [batch, keys].
    """

    keys: jax.Array
    values: jax.Array
    log_forget: jax.Array
    query_positions: jax.Array
    key_positions: jax.Array
    query_segments: jax.Array
    key_segments: jax.Array


def empty_cache(
    batch, slots, sizes: Sizes, gates, conv, key_dtype, dtype, grows
) -> SoftmaxAttentionState:
    """A cache of `slots` positions with nothing in it."""
    return SoftmaxAttentionState(
        key=jnp.zeros((batch, slots, sizes.key_heads, sizes.key_dim), key_dtype),
        value=jnp.zeros((batch, slots, sizes.value_heads, sizes.value_dim), dtype),
        log_forget=jnp.zeros((batch, slots, gates), jnp.float32),
        position=jnp.full((batch, slots), -1, jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
        conv=conv,
        segment=no_segment(batch),
        grows=grows,
    )


def grown(state: SoftmaxAttentionState, by: int) -> SoftmaxAttentionState:
    """The cache with `by` more empty slots."""
    wider = [(0, 0), (0, by)]
    return state.replace(
        key=jnp.pad(state.key, wider + [(0, 0)] * 2),
        value=jnp.pad(state.value, wider + [(0, 0)] * 2),
        log_forget=jnp.pad(state.log_forget, [*wider, (0, 0)]),
        position=jnp.pad(state.position, wider, constant_values=-1),
    )


def store(
    state: SoftmaxAttentionState,
    key: jax.Array,
    value: jax.Array,
    log_forget: jax.Array,
    position: jax.Array,
    valid: jax.Array,
    index: jax.Array,
    window: int | None,
    sink_tokens: int,
) -> SoftmaxAttentionState:
    """Puts a call's last segment into the cache; earlier segments will never be read again.

    key, value [batch, time, heads, dim]; log_forget [batch, time, gates]; position, valid, index
    [batch, time], with `index` 0 for the segment that the cache holds. With a window the slots are
    a ring behind the sink tokens.
    """
    rows = jnp.arange(position.shape[0])[:, None]
    slots = state.position.shape[1]
    last = index[:, -1:]
    current = valid & (index == last)
    length = jnp.where(last[:, 0] > 0, 0, state.length)
    length = jnp.maximum(length, jnp.max(jnp.where(current, position + 1, 0), axis=1, initial=0))
    slot, keep = position, current
    if window is not None:
        ring = slots - sink_tokens
        slot = jnp.where(
            position < sink_tokens, position, sink_tokens + (position - sink_tokens) % ring
        )
        keep &= (position < sink_tokens) | (position >= length[:, None] - ring)
    slot = jnp.where(keep & (slot < slots), slot, slots)  # out of range: dropped
    held = jnp.where(last > 0, -1, state.position)

    def put(held, new):
        return held.at[rows, slot].set(new.astype(held.dtype), mode="drop")

    return state.replace(
        key=put(state.key, key),
        value=put(state.value, value),
        log_forget=put(state.log_forget, log_forget),
        position=held.at[rows, slot].set(position, mode="drop"),
        length=length,
    )
