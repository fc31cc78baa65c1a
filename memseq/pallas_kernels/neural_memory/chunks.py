"""A call cut into update chunks, and what the chunks leave put together again.

What does not depend on the memory is made here for all chunks at once: where each token goes and
what its gates add up to. `one_chunk.advance` does the rest, a chunk after another.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memseq.pallas_kernels.common.segments import Segments, hide_padding
from memseq.pallas_kernels.neural_memory.alignment import Alignment, align, shifted, unmoved
from memseq.pallas_kernels.neural_memory.coefficients import coefficients
from memseq.pallas_kernels.neural_memory.memory import Layer
from memseq.pallas_kernels.neural_memory.state import Inputs, MemoryState, entered


class Chunk(NamedTuple):
    """One update chunk: C steps, and the R = window - 1 + C tokens whose gradients they follow.

    Axes before the last two are of rows and heads, [...]; of all chunks together a third follows.

    query: [..., C, key_dim]. key, value: [..., R, dim]. threshold: [..., R, 1] or None.
    kept, carried: [..., C, 1], and written: [..., C, R]: the `Coefficients` of the weights that
        each step reads; None where all read the anchor, carried also without momentum.
    written_end, added_end: [..., R, 1], what is in the weights, and in the momentum, at the end.
    kept_end, carried_end, held_end: [..., 1, 1], of the weights and the momentum at the start.
    restart, full, cut: bool [..., 1, 1]: a segment starts here; the last slot is filled; the state
        before is a constant. None: of no chunk; of every chunk; of no chunk.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    threshold: jax.Array | None
    kept: jax.Array | None
    carried: jax.Array | None
    written: jax.Array | None
    written_end: jax.Array
    added_end: jax.Array | None
    kept_end: jax.Array
    carried_end: jax.Array | None
    held_end: jax.Array | None
    restart: jax.Array | None
    full: jax.Array | None
    cut: jax.Array | None


class Fixed(NamedTuple):
    """What all chunks share, a head each.

    initial: layers with weight [heads, in, out] and perhaps bias [heads, 1, out]. affine: {name:
    [heads, 1, dim]}. scale: [heads, C, 1] of the reads, scale_end: [heads, 1, 1], or None.
    """

    initial: tuple[Layer, ...]
    affine: dict[str, jax.Array]
    scale: jax.Array | None
    scale_end: jax.Array | None


class Carry(NamedTuple):
    """The memory between two chunks: layers with weight [..., in, out], bias [..., 1, out].

    anchor: None where it is always the weights.
    """

    anchor: tuple[Layer, ...] | None
    weights: tuple[Layer, ...]
    momentum: tuple[Layer, ...]


class Cut(NamedTuple):
    """A call by chunk.

    chunks: with their axis behind the heads'. needed: bool [chunks], a row has a token in it; None
        for all. keys, values: [batch, window - 1 + slots, heads, dim].
    """

    chunks: Chunk
    fixed: Fixed
    carry: Carry
    needed: jax.Array | None
    layout: Alignment
    keys: jax.Array
    values: jax.Array
    position: jax.Array


def cut_up(
    inputs: Inputs,
    *,
    update_chunk: int,
    anchor: str,
    read: str,
    outer_grad: str | tuple[str, int],
    max_chunks: int,
    carried: bool,
) -> Cut:
    """The chunks of a call; arguments as of the operation's forms."""
    state = entered(inputs, anchor)
    batch, time = inputs.query.shape[:2]
    recent = state.recent_key.shape[1]
    if inputs.valid is not None:
        layout = align(
            Segments(inputs.valid, inputs.index),
            state.position,
            state.recent_count,
            recent,
            update_chunk,
            max_chunks,
        )
    elif carried:
        layout = shifted(state.position, state.recent_count, recent, time, update_chunk, max_chunks)
    else:
        layout = unmoved(batch, time, recent, update_chunk)
    keys = layout.gather(inputs.key, state.recent_key)
    values = layout.gather(inputs.value, state.recent_value)
    # a token has no step along the gradients of tokens before its segment
    lag = jnp.arange(recent + 1)
    step = jnp.where((lag <= layout.age[..., None])[:, :, None], layout.gather(inputs.step), 0)
    keep, momentum, threshold = (
        None if x is None else _by_chunk(layout.gather(x), update_chunk)
        for x in (inputs.keep, inputs.momentum, inputs.threshold)
    )
    filled = jnp.asarray(layout.filled).reshape(batch, 1, -1, update_chunk)
    of, momentum_end = coefficients(
        keep, momentum, _by_chunk(step, update_chunk, recent + 1), filled
    )
    end = of.last()
    if read == "before":
        of = of.before()
    reads = read != "chunk"
    cut = None
    if isinstance(outer_grad, tuple):
        cut = (layout.number > 0) & (layout.number % outer_grad[1] == 0)
        cut = cut & layout.filled.reshape(batch, -1, update_chunk).any(2)
    chunks = Chunk(
        query=_by_chunk(layout.gather(inputs.query), update_chunk, inputs.query.shape[-1]),
        key=_overlapping(keys, update_chunk, recent),
        value=_overlapping(values, update_chunk, recent),
        threshold=_column(threshold),
        kept=_column(of.kept) if reads else None,
        carried=_column(of.carried) if reads else None,
        written=of.written if reads else None,
        written_end=_column(end.written),
        added_end=None if momentum is None else _column(momentum_end.written),
        kept_end=_number(end.kept),
        carried_end=_number(end.carried),
        held_end=None if momentum is None else _number(momentum_end.kept),
        restart=None if inputs.valid is None else _flag(layout.restart),
        full=None if _known(layout.full, True) else _flag(layout.full),
        cut=None if cut is None or _known(cut, False) else _flag(cut),
    )
    weights, momentum = map(with_rows, (state.weights, state.momentum))
    same = chunks.full is None and not carried and anchor != "call"
    carry = Carry(None if same else with_rows(state.anchor), weights, momentum)
    return Cut(
        chunks=chunks,
        fixed=_fixed(inputs, read),
        carry=carry,
        needed=None if layout.source is None else filled.any((0, 1, 3)),
        layout=layout,
        keys=keys,
        values=values,
        position=state.position,
    )


def put_together(
    inputs: Inputs, cut: Cut, out: jax.Array, carry: Carry
) -> tuple[jax.Array, MemoryState]:
    """What the operation returns. out: reads [batch, heads, chunks, C, dim]."""
    layout, recent = cut.layout, inputs.state.recent_key.shape[1]
    out = jnp.moveaxis(out, 1, 3)
    out = layout.scatter(out.reshape(out.shape[0], -1, *out.shape[3:]))

    last = jnp.arange(recent) + _filled_slots(layout, cut.position)[:, None]
    last = last.reshape(*last.shape, 1, 1)
    held = jnp.arange(recent) >= recent - jnp.asarray(layout.state_count)[:, None]
    none = ~jnp.asarray(layout.filled).any(axis=1)
    untouched = (inputs.state.position < 0) & none
    weights = without_rows(carry.weights)
    return out, MemoryState(
        weights=weights,
        anchor=weights if carry.anchor is None else without_rows(carry.anchor),
        momentum=without_rows(carry.momentum),
        recent_key=hide_padding(jnp.take_along_axis(cut.keys, last, axis=1), held),
        recent_value=hide_padding(jnp.take_along_axis(cut.values, last, axis=1), held),
        recent_count=jnp.asarray(layout.state_count, jnp.int32),
        position=jnp.where(untouched, -1, layout.state_position).astype(jnp.int32),
    )


def with_rows(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Biases [..., out] become [..., 1, out], so that they add to what each step has."""
    return tuple(
        {name: x[..., None, :] if name == "bias" else x for name, x in layer.items()}
        for layer in layers
    )


def without_rows(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return tuple(
        {name: x[..., 0, :] if name == "bias" else x for name, x in layer.items()}
        for layer in layers
    )


def _fixed(inputs: Inputs, read: str) -> Fixed:
    scale = inputs.position_scale
    if scale is None:
        moved = end = None
    else:
        moved, end = scale[:, :, None], scale[:, -1:, None]
        if read == "before":
            moved = jnp.concatenate([jnp.ones_like(end), moved[:, :-1]], axis=1)
    affine = {name: x[:, None] for name, x in inputs.affine.items()}
    return Fixed(with_rows(inputs.initial), affine, moved if read != "chunk" else None, end)


def _known(flags: Any, value: bool) -> bool:
    """Is it known, when the program is made, that all of them are `value`?"""
    return isinstance(flags, np.ndarray) and bool((flags == value).all())


def _flag(x):
    """[batch, chunks] -> [batch, 1, chunks, 1, 1]."""
    return jnp.asarray(x)[:, None, :, None, None]


def _column(x):
    return None if x is None else x[..., None]


def _number(x):
    return None if x is None else x[..., None, None]


def _filled_slots(layout, position):
    """int32 [batch]: one past the last slot that is filled; the state's position where none is."""
    slots = jnp.arange(layout.filled.shape[1]) + 1
    last = jnp.max(jnp.where(layout.filled, slots, 0), axis=1)
    return jnp.where(last == 0, position, last)


def _by_chunk(x, chunk, *features):
    """[batch, slots, heads, *features] -> [batch, heads, chunks, chunk, *features]."""
    x = x.reshape(x.shape[0], -1, chunk, x.shape[2], *features)
    return jnp.moveaxis(x, 3, 1)


def _overlapping(x, chunk, recent):
    """[batch, recent + slots, heads, dim] -> [batch, heads, chunks, recent + chunk, dim]."""
    own = _by_chunk(x[:, recent:], chunk, x.shape[-1])
    if recent == 0:
        return own
    starts = chunk * jnp.arange(own.shape[2])[:, None] + jnp.arange(recent)
    before = jnp.moveaxis(x[:, starts], 3, 1)
    return jnp.concatenate([before, own], axis=3)
