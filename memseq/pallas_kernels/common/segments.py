"""Segments of packed rows: where a memory restarts, and which positions are padding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common import context


class Segments(NamedTuple):
    """What `segment_ids` mean to a memory.

    valid: bool [batch, time]. False is padding: no write, no decay, output 0.
    index: int32 [batch, time], non-decreasing. 0 until the first restart, one more after each.
        A padded position carries the index of the valid position before it.
    """

    valid: jax.Array
    index: jax.Array


def segments(segment_ids: jax.Array) -> Segments:
    """Reads ids int32 [batch, time]: a restart is a valid id that differs from the last valid one.

    The first valid position never restarts: in an operation it continues the initial state.
    """
    if context.axis() is not None:
        raise ValueError(
            "context_parallel: expected a layer that looks across time through linear-state "
            "operations alone, got one that reads segments by itself"
        )
    valid = segment_ids >= 0
    positions = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    last_valid = jax.lax.cummax(jnp.where(valid, positions, -1), axis=1)
    before = jnp.pad(last_valid, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    previous_id = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    restart = valid & (before >= 0) & (segment_ids != previous_id)
    return Segments(valid, jnp.cumsum(restart, axis=1, dtype=jnp.int32))


def segment_positions(segs: Segments) -> jax.Array:
    """int32 [batch, time]: how many valid positions of its segment came before each position.

    In segment index 0 the count starts at 0 where this call starts. Padding does not advance it.
    """
    count = jnp.cumsum(segs.valid, axis=1, dtype=jnp.int32)
    started = jnp.pad(segs.index, ((0, 0), (1, 0)))[:, :-1] != segs.index
    before_segment = jax.lax.cummax(jnp.where(started, count - 1, 0), axis=1)
    return jnp.maximum(count - 1 - before_segment, 0)


def position_at_start(position: jax.Array, segment_ids: jax.Array, name: str) -> jax.Array:
    """How many steps its segment had before this device's stretch of time, int32 [batch].

    position: int32 [batch], the steps before all time; segment_ids: int32 [batch, time] of this
    stretch; name: the mesh axis that splits time.
    """
    with context.over(None):
        valid, index = segments(segment_ids)
    current = index == index[:, -1:]
    steps, through = jnp.sum(valid & current, axis=1, dtype=jnp.int32), index[:, -1] == 0

    def after(stretch, position):
        steps, through = stretch
        return jnp.where(through, position, 0) + steps

    return context.carried_in(position, (steps, through), after, segment_ids, name)


def last_segment(segment_ids: jax.Array, previous: jax.Array) -> jax.Array:
    """int32 [batch]: the last valid id of each row, `previous` [batch] where a row has none."""
    return context.end_segment(segment_ids, previous, last=True)


def first_segment(segment_ids: jax.Array, default: jax.Array) -> jax.Array:
    """int32 [batch]: the first valid id of each row, `default` [batch] where a row has none."""
    return context.end_segment(segment_ids, default, last=False)


def restarts(index: jax.Array) -> jax.Array:
    """bool [batch, time]: the positions at which a segment index int32 [batch, time] grows."""
    return jnp.pad(index, ((0, 0), (1, 0)))[:, :-1] != index


def begins(segment_ids: jax.Array) -> jax.Array:
    """bool [batch, time]: the valid positions where a segment begins, but for the first of all.

    Unlike `segments`, also where time is split over devices.
    """
    across = context.axis() is not None
    with context.over(None):
        valid, index = segments(segment_ids)
    found = restarts(index)
    if across:
        first = valid & (jnp.cumsum(valid, axis=1) == 1)
        found |= first & context.begins_anew(segment_ids)[:, None]
    return found


def numbered(segment_ids: jax.Array) -> Segments:
    """As `segments`, also where time is split over devices: the index then counts from the first.

    For what tells segments apart by it, and not for an operation, whose stretch starts at 0.
    """
    if context.axis() is None:
        return segments(segment_ids)
    count = jnp.cumsum(begins(segment_ids), axis=1, dtype=jnp.int32)
    before = context.carried_in(jnp.zeros_like(count[:, -1]), count[:, -1], jnp.add, None)
    return Segments(segment_ids >= 0, before[:, None] + count)


def hide_padding(x: jax.Array | None, valid: jax.Array) -> jax.Array | None:
    """x [batch, time, ...] with zeros at padding: zero keys, decays and queries change nothing."""
    if x is None:
        return None
    return jnp.where(valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), x, 0)
