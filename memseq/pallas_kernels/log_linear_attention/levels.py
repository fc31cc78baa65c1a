"""Which level of the Fenwick tree holds what.

Read at position i, a pair written at position j has level 0 if j is i, else one more than the
number of the highest bit in which i and j differ: level l holds 2^(l-1) neighbours, the nearest at
level 1. The last level holds all that is older. Memories are kept for levels 1 and up, as the next
position will read them; the memory of level l stands at place l - 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.segments import restarts


class Positions(NamedTuple):
    """How many steps of its segment came before each step and up to it, int32 [batch, time].

    Padding does not count: there both are the same.
    """

    before: jax.Array
    after: jax.Array


def positions(valid: jax.Array, index: jax.Array | None, start: jax.Array) -> Positions:
    """Counted from `start` int32 [batch] in segment index 0, else from 0.

    valid: bool [batch, time]; index: the segment index int32 [batch, time], None for one segment.
    """
    count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    base = -start[:, None]
    if index is not None:
        border = jax.lax.cummax(jnp.where(restarts(index), count - 1, 0), axis=1)
        base = jnp.where(index == 0, base, border)
    after = count - base
    return Positions(after - valid.astype(jnp.int32), after)


def place(position: jax.Array, earlier: jax.Array, places: int) -> jax.Array:
    """The place of what was written at `earlier`, read at `position`; -1 where they are the same.

    What stood at place m when the next position was `earlier` stands at the larger of m and this.
    With `earlier` the position before, where the step between leaves its own pair and all below.
    """
    bits = jnp.arange(places, dtype=jnp.int32)
    differ = (position[..., None] >> bits) != (earlier[..., None] >> bits)
    return differ.sum(axis=-1, dtype=jnp.int32) - 1
