"""Laying tokens out so that every update chunk starts at a multiple of its length.

Chunks count from each segment's start, so the rows of a batch, and the segments of a row, have
their borders at different steps. Here every token gets a slot: a segment starts at the next
multiple of the chunk, a segment that goes on from the call before starts where its chunk stopped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memseq.pallas_kernels.common.segments import Segments, segment_positions


class Alignment(NamedTuple):
    """Where each token goes, and what each chunk is.

    slot: int32 [batch, time], the slot of each token; the number of slots where it is padding.
    source: int32 [batch, recent + slots], what is in each slot: an index into the `recent` tokens
        of the state followed by those of the call; recent + time where nothing is. None where each
        token is its own slot.
    filled: bool [batch, slots], slots with a token of this call.
    age: int32 [batch, slots], tokens of the segment before the slot's token, as far as known.
    restart, full: bool [batch, chunks], a segment starts with this chunk; its last slot is filled.
    number: int32 [batch, chunks], chunks of the segment in this call before this one.
    state_count, state_position: int32 [batch], `recent_count` and `position` after the call.
    """

    slot: jax.Array
    source: jax.Array | None
    filled: jax.Array
    age: jax.Array
    restart: jax.Array
    full: jax.Array
    number: jax.Array
    state_count: jax.Array
    state_position: jax.Array

    def gather(self, x: jax.Array, recent: jax.Array | None = None) -> jax.Array:
        """x [batch, time, ...] by slot; with `recent` [batch, recent, ...] also those before."""
        if recent is not None:
            x = jnp.concatenate([recent, x], axis=1)
        if self.source is None:
            missing = self.filled.shape[1] - self.slot.shape[1]
            return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        source = self.source
        if recent is None:
            before = source.shape[1] - self.filled.shape[1]
            source = jnp.maximum(source[:, before:] - before, -1)  # -1 is the last, as empty slots
        return _take(jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2)), source)

    def scatter(self, x: jax.Array) -> jax.Array:
        """x [batch, slots, ...] by token, 0 at padding."""
        if self.source is None:
            return x[:, : self.slot.shape[1]]
        return _take(jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2)), self.slot)


def chunks_needed(time: int, chunk: int, carried: bool, max_segments: int) -> int:
    """The most chunks that a row of `time` tokens in `max_segments` segments can take.

    carried: the first segment may start inside a chunk.
    """
    segments = min(max_segments, time)
    if segments == 0:
        return 0
    spare = (chunk - 1) * (segments + carried)  # each can have a chunk with one token in it
    return min((time + spare) // chunk, time)


def align(
    segs: Segments,
    position: jax.Array,
    recent_count: jax.Array,
    recent: int,
    chunk: int,
    count: int,
) -> Alignment:
    """The layout of one call.

    Args:
        segs: of the call, [batch, time].
        position: int32 [batch], steps that the first segment's chunk has had already.
        recent_count: int32 [batch], how many of the state's `recent` tokens there are.
        recent: how many there can be.
        chunk: length of an update chunk.
        count: chunks to lay out; more tokens than go there are lost, see `chunks_needed`.
    """
    batch, time = segs.valid.shape
    slots = count * chunk
    first = segs.index == 0
    step = segment_positions(segs)
    in_segment = step + jnp.where(first, position[:, None], 0)
    age = step + jnp.where(first, recent_count[:, None], 0)
    # whole chunks that a segment takes, added where the next one starts
    starts = jnp.pad(segs.index, ((0, 0), (1, 0)))[:, :-1] != segs.index
    last_place = jnp.where(segs.valid, in_segment, -1)
    before = jnp.pad(_last_valid(last_place, segs.valid, position - 1), ((0, 0), (1, 0)))[:, :-1]
    offset = jnp.cumsum(jnp.where(starts, (before // chunk + 1) * chunk, 0), axis=1)
    slot = jnp.where(segs.valid, jnp.minimum(offset + in_segment, slots), slots)

    rows = jnp.arange(batch)[:, None]
    source = jnp.full((batch, recent + slots), recent + time, jnp.int32)
    back = jnp.arange(1, recent + 1, dtype=jnp.int32)
    source = source.at[rows, recent + position[:, None] - back].set(recent - back)
    source = source.at[rows, jnp.where(segs.valid, recent + slot, recent + slots)].set(
        recent + jnp.arange(time, dtype=jnp.int32), mode="drop"
    )
    filled = jnp.zeros((batch, slots + 1), bool).at[rows, slot].set(segs.valid)[:, :-1]

    def by_slot(x, empty):
        return jnp.full((batch, slots + 1), empty, x.dtype).at[rows, slot].set(x)[:, :-1]

    chunks = by_slot(starts, False).reshape(batch, count, chunk)
    restart = chunks.any(axis=2)
    order = jnp.broadcast_to(jnp.arange(count), restart.shape)
    number = order - jax.lax.cummax(jnp.where(restart, order, 0), axis=1)
    none = ~segs.valid.any(axis=1)
    last = jnp.where(none, 0, jnp.max(jnp.where(segs.valid, jnp.arange(time), 0), axis=1))[:, None]
    last_step, last_age = (jnp.take_along_axis(x, last, axis=1)[:, 0] for x in (in_segment, age))
    return Alignment(
        slot=slot,
        source=source,
        filled=filled,
        age=by_slot(age, 0),
        restart=restart,
        full=filled.reshape(batch, count, chunk)[:, :, -1],
        number=number,
        state_count=jnp.where(none, recent_count, jnp.minimum(last_age + 1, recent)),
        state_position=jnp.where(none, position, (last_step + 1) % chunk),
    )


def shifted(
    position: jax.Array, recent_count: jax.Array, recent: int, time: int, chunk: int, count: int
) -> Alignment:
    """The layout of rows that are one segment, without padding; arguments as of `align`."""
    slots = count * chunk
    start = position[:, None]
    held = jnp.arange(recent + slots, dtype=jnp.int32) - start
    token = jnp.arange(slots, dtype=jnp.int32) - start
    filled = (token >= 0) & (token < time)
    no_chunk = jnp.zeros((position.shape[0], count), bool)
    return Alignment(
        slot=start + jnp.arange(time, dtype=jnp.int32),
        source=jnp.where((held >= 0) & (held < recent + time), held, recent + time),
        filled=filled,
        age=jnp.maximum(token + recent_count[:, None], 0),
        restart=no_chunk,
        full=filled.reshape(-1, count, chunk)[:, :, -1],
        number=jnp.broadcast_to(jnp.arange(count), no_chunk.shape),
        state_count=jnp.minimum(recent_count + time, recent),
        state_position=(position + time) % chunk,
    )


def unmoved(batch: int, time: int, recent: int, chunk: int) -> Alignment:
    """The layout of rows that start a chunk and are one segment: each token is its own slot."""
    count = -(-time // chunk)
    slots = np.arange(count * chunk)
    filled = np.broadcast_to(slots < time, (batch, slots.size))
    no_chunk = np.zeros((batch, count), bool)
    return Alignment(
        slot=np.broadcast_to(np.arange(time), (batch, time)),
        source=None,
        filled=filled,
        age=np.broadcast_to(slots, filled.shape),
        restart=no_chunk,
        full=filled.reshape(batch, count, chunk)[:, :, -1],
        number=np.broadcast_to(np.arange(count), no_chunk.shape),
        state_count=np.full((batch,), min(time, recent)),
        state_position=np.full((batch,), time % chunk),
    )


def _last_valid(x, valid, default):
    """x [batch, time] at the last valid position up to each, `default` [batch] before the first."""
    positions = jnp.arange(x.shape[1])
    last = jax.lax.cummax(jnp.where(valid, positions, -1), axis=1)
    found = jnp.take_along_axis(x, jnp.maximum(last, 0), axis=1)
    return jnp.where(last < 0, default[:, None], found)


def _take(x, index):
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
