"""Cutting time into chunks."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64
# Bytes of one array [batch, heads, time, ...] up to which a CPU's caches hold a whole call.
WHOLE = 2**21
# Matrix products in a stack from which on a CPU's cores all have work.
STACK = 32
# Chunks of a stretch up to which their states are taken without a loop.
UNROLLED = 8
# The name, for rematerialisation, of the states at the starts of chunks: few, and long to retake.
STARTS = "chunk_starts"


def chunk_length(chunk_size: int | None, time: int) -> int:
    """The chunk of a call of `time` steps: what was asked for, rounded up to a power of two."""
    wanted = CHUNK if chunk_size is None else chunk_size
    return min(_power_of_two(wanted), _power_of_two(time))


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def to_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[batch, time, heads, ...] -> [batch, heads, chunks, chunk, ...], time padded with zeros."""
    batch, time, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, -time % chunk)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(x.reshape(batch, -1, chunk, *rest), 3, 1)


def from_chunks(x: jax.Array, time: int) -> jax.Array:
    """[batch, heads, chunks, chunk, ...] -> [batch, time, heads, ...]."""
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :time]


class ChunkMasks(NamedTuple):
    """Which positions of a chunk see each other, bool, broadcastable over heads (axis 1).

    pairs: [batch, 1, chunks, chunk, chunk], j <= i in one segment.
    from_start: [batch, 1, chunks, chunk], i continues the segment that the chunk starts in.
    to_end: [batch, 1, chunks, chunk], j is in the segment that the chunk ends in.
    carried: [batch, 1, chunks], the chunk ends in the segment that it starts in.
    """

    pairs: jax.Array
    from_start: jax.Array
    to_end: jax.Array
    carried: jax.Array


def chunk_masks(index: jax.Array | None, time: int, chunk: int) -> ChunkMasks:
    """Masks from the segment index int32 [batch, time] (see `segments`), None for one segment."""
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))
    if index is None:
        true = jnp.ones((1, 1, 1), bool)
        return ChunkMasks(causal[None, None, None], true[..., None], true[..., None], true)
    index = jnp.pad(index, ((0, 0), (0, -time % chunk)), mode="edge")
    index = index.reshape(index.shape[0], 1, -1, chunk)
    end = index[..., -1]
    start = jnp.pad(end, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    return ChunkMasks(
        causal & (index[..., :, None] == index[..., None, :]),
        index == start[..., None],
        index == end[..., None],
        start == end,
    )


def whole_or_by_stretch(
    form: Callable[..., Any], arrays: tuple, state: jax.Array, index: jax.Array | None, chunk: int
) -> Any:
    """form(arrays, state, index) -> (out, state) of a whole call, or of one stretch after another.

    A form passes over its intermediates dozens of times. Where they do not fit a CPU's caches, a
    few chunks at a time are faster by more than it costs to take them again in the backward pass
    (all but what the form names `STARTS`). Other devices, and short calls, want all the work at
    once.

    arrays: [batch, time, heads, ...] or None each, of which zeros write and decay nothing.
    index: the segment index int32 [batch, time] or None, counted from that of `state`.
    """
    batch, time, heads = arrays[0].shape[:3]
    widest = max(chunk, *(x.shape[3] for x in arrays if x is not None and x.ndim == 4))
    if batch * time * heads * widest * state.dtype.itemsize <= WHOLE:
        return form(arrays, state, index)
    stretch = chunk * max(1, min(STACK // (batch * heads), -(-time // chunk)))

    def cut(x, **padding):
        x = jnp.pad(x, [(0, 0), (0, -time % stretch)] + [(0, 0)] * (x.ndim - 2), **padding)
        return jnp.moveaxis(x.reshape(batch, -1, stretch, *x.shape[2:]), 1, 0)

    kept = jax.checkpoint_policies.save_only_these_names(STARTS)

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=kept)
    def step(carried, inputs):
        state, last = carried
        arrays, index = inputs
        if index is not None:
            index, last = index - last[:, None], index[:, -1]
        out, state = form(arrays, state, index)
        return (state, last), out

    def by_stretch(arrays, state, index):
        last = None
        if index is not None:
            index = cut(index, mode="edge")
            last = jnp.zeros_like(index[0, :, 0])
        (state, _), out = jax.lax.scan(step, (state, last), (jax.tree.map(cut, arrays), index))
        out = jnp.moveaxis(out, 0, 1)
        return out.reshape(batch, -1, *out.shape[3:])[:, :time], state

    return jax.lax.platform_dependent(arrays, state, index, cpu=by_stretch, default=form)
