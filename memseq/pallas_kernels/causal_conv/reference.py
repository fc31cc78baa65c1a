"""The definition of `causal_conv`: one step of time after another."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.causal_conv.activations import ACTIVATIONS
from memseq.pallas_kernels.common.segments import restarts


def reference(x, kernel, bias, initial_state, valid, index, *, activation):
    """See `causal_conv`; padding zeroed, `valid` and `index` the segments or None."""
    dtype = kernel.dtype

    def step(tail, inputs):
        now, taken, restart = inputs
        if restart is not None:
            tail = jnp.where(restart[:, None, None], 0, tail)
        window = jnp.concatenate([tail, now[:, None]], axis=1)
        y = jnp.sum(kernel * window.astype(dtype), axis=1)
        if bias is not None:
            y += bias
        y = ACTIVATIONS[activation](y).astype(x.dtype)
        if taken is None:
            return window[:, 1:], y
        y = jnp.where(taken[:, None], y, 0)
        return jnp.where(taken[:, None, None], window[:, 1:], tail), y

    by_time = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0), (x, valid, None if index is None else restarts(index))
    )
    state, y = jax.lax.scan(step, initial_state, by_time)
    return jnp.moveaxis(y, 0, 1), state
