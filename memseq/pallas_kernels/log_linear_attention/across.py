"""`log_linear_attention` with time split over devices.

All memories pass through a stretch of time by one and the same map, and move between levels as the
positions at the stretch's two ends say: see `levels`. So what a stretch does to a state is that
map, what it adds to the levels from its own steps, and those two positions. As levels depend on the
position, devices find theirs first, and then what their stretch adds.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common import context
from memseq.pallas_kernels.common.segments import position_at_start
from memseq.pallas_kernels.log_linear_attention.levels import place


def across(
    operation: Callable,
    name: str,
    arrays: dict[str, jax.Array | None],
    memories: jax.Array,
    position: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """`log_linear_attention` of this device's stretch of time, from the state before all time.

    Args:
        operation: itself, with its options.
        name: the mesh axis that splits time.
        arrays: its arguments with time but for the ids, by name.
        memories, position: the state, a pair to `operation`.
        segment_ids: int32 [batch, time] or None.

    Returns:
        out of this stretch, and the state after all time.
    """
    value, beta = arrays["value"], arrays["beta"]
    batch, _, heads, _ = value.shape
    ids = jnp.zeros(value.shape[:2], jnp.int32) if segment_ids is None else segment_ids

    def run(memories, **other):
        state = memories, start
        return operation(**arrays | other, initial_state=state, segment_ids=ids)

    def after(stretch, state):
        added, moved, start, end = stretch
        state = moved * state if beta is None else context.product(moved, state)
        return _lifted(state, start, end) + added

    with context.over(None):
        start = position_at_start(position, ids, name)
        _, (added, end) = run(jnp.zeros_like(memories))
        # the map, at a single level with nothing written: decays scale, a delta rule is a matrix
        size = 1 if beta is None else memories.shape[-2]
        ones = jnp.ones(1) if beta is None else jnp.eye(size)
        ones = jnp.broadcast_to(ones, (batch, heads, 1, memories.shape[-2], size))
        _, (moved, _) = run(
            ones.astype(memories.dtype),
            value=jnp.zeros((*value.shape[:3], size), value.dtype),
            level_scale=arrays["level_scale"][..., :2],
        )
        own = context.carried_in(memories, (added, moved, start, end), after, ids, name)
        out, last = run(own)
    return out, context.at_the_end(last, name)


def _lifted(memories: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    """memories [batch, heads, places, ...] of position `start` [batch], placed as at `end`."""
    here = jnp.arange(memories.shape[2])
    to = jnp.maximum(here, place(end, start, len(here))[:, None])
    moves = (to[:, :, None] == here).astype(memories.dtype)
    return jnp.einsum("bml,bhmkv->bhlkv", moves, memories, precision=jax.lax.Precision.HIGHEST)
