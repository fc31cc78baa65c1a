"""What a call hands to the next one, and what the forms of the operation take."""

from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp

from memseq.pallas_kernels.neural_memory.memory import Layer


class MemoryState(NamedTuple):
    """A memory between two calls, possibly in the middle of an update chunk.

    Attributes:
        weights: of each layer {"weight": [batch, heads, in, out], "bias": [batch, heads, out]}.
        anchor: as weights, those that the present chunk takes its gradients at.
        momentum: as weights; () without momentum.
        recent_key: [batch, window - 1, heads, key_dim], the last keys of the segment.
        recent_value: [batch, window - 1, heads, value_dim].
        recent_count: int32 [batch], how many of them there are.
        position: int32 [batch], steps that the present chunk has had; -1 is a memory that has not
            been written to, and starts from the initial weights whatever the rest holds.
    """

    weights: tuple[Layer, ...]
    anchor: tuple[Layer, ...]
    momentum: tuple[Layer, ...]
    recent_key: jax.Array
    recent_value: jax.Array
    recent_count: jax.Array
    position: jax.Array


jax.export.register_namedtuple_serialization(
    MemoryState, serialized_name="memseq.pallas_kernels.neural_memory.MemoryState"
)


class Inputs(NamedTuple):
    """The arrays of a call, checked and in the dtype of the state.

    query, key, value [batch, time, heads, dim]; keep [batch, time, heads]; step [batch, time,
    heads, window]; momentum and threshold [batch, time, heads] or None; position_scale [heads,
    chunk] or None; affine {name: [heads, dim]}; initial as `MemoryState.weights` without the batch
    axis; valid bool and index int32 [batch, time] as in `Segments`, or None for one segment.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    keep: jax.Array
    step: jax.Array
    momentum: jax.Array | None
    threshold: jax.Array | None
    position_scale: jax.Array | None
    affine: dict[str, jax.Array]
    initial: tuple[Layer, ...]
    state: MemoryState
    valid: jax.Array | None
    index: jax.Array | None


def empty_state(
    initial: tuple[Layer, ...], batch: int, momentum: bool, window: int, key_dim: int, dim: int
) -> MemoryState:
    """A memory that has not been written to.

    initial: the weights that it will start from, [heads, ...] or their shapes; key_dim, dim: sizes
    of keys and values.
    """
    heads, dtype = initial[0]["weight"].shape[0], initial[0]["weight"].dtype
    zeros = jax.tree.map(lambda w: jnp.zeros((batch, *w.shape), w.dtype), initial)
    return MemoryState(
        weights=zeros,
        anchor=zeros,
        momentum=zeros if momentum else (),
        recent_key=jnp.zeros((batch, window - 1, heads, key_dim), dtype),
        recent_value=jnp.zeros((batch, window - 1, heads, dim), dtype),
        recent_count=jnp.zeros((batch,), jnp.int32),
        position=jnp.full((batch,), -1, jnp.int32),
    )


def select(choose: jax.Array, new, old):
    """new where `choose` [batch], else old, for trees of arrays [batch, ...]."""
    return jax.tree.map(
        lambda a, b: jnp.where(choose.reshape(-1, *[1] * (b.ndim - 1)), a, b), new, old
    )


def entered(inputs: Inputs, anchor: str) -> MemoryState:
    """The state with which a call starts: memories never written to take their initial weights."""
    state = inputs.state
    first = jax.tree.map(lambda w: w[None], inputs.initial)
    fresh = state.position < 0
    weights = select(fresh, first, state.weights)
    zeros = jax.tree.map(jnp.zeros_like, state)
    return select(fresh, zeros, state)._replace(
        weights=weights,
        # anchored at the call, gradients are taken at what the memory holds when the call starts
        anchor=weights if anchor == "call" else select(fresh, first, state.anchor),
        position=jnp.maximum(state.position, 0),
    )
