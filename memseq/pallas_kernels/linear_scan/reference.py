"""The definition of `linear_scan`: one step of time after another."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.segments import restarts
from memseq.pallas_kernels.linear_scan.gates import out_dtype, transition


def reference(x, log_decay, sign, phase, initial_state, index, valid, *, chunk_size=None):
    """See `linear_scan`; zeros at padding, `index` and `valid` the segments or None."""
    del chunk_size
    dtype = initial_state.dtype
    real = jnp.finfo(dtype).dtype  # before the loop, whose backward pass adds up fixed gates
    gates = tuple(None if g is None else g.astype(real) for g in (log_decay, sign, phase))
    changing = tuple(g if g is not None and g.ndim == 3 else None for g in gates)

    def step(state, inputs):
        x, changing, restart, taken = inputs  # x and state [B, C]
        now = (g if c is None else c for g, c in zip(gates, changing, strict=True))
        kept = transition(*now, dtype)
        if taken is not None:
            kept = jnp.where(taken[:, None], kept, 1)
            state = jnp.where(restart[:, None], 0, state)
        state = kept * state + x.astype(dtype)
        return state, state

    by_time = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0),
        (x, changing, None if index is None else restarts(index), valid),
    )
    state, out = jax.lax.scan(step, initial_state, by_time)
    return jnp.moveaxis(out, 0, 1).astype(out_dtype(x, dtype)), state
