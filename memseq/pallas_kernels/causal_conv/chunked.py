"""All positions at once: as many shifted products as the kernel has taps.

With segments, padding is first moved out of the way: valid inputs are gathered to the front in
their order, so that a tap's input is again a fixed number of places back, and the outputs are
gathered to where they belong.
"""

import jax.numpy as jnp

from memseq.pallas_kernels.causal_conv.activations import ACTIVATIONS


def chunked(x, kernel, bias, initial_state, valid, index, *, activation):
    """See `causal_conv`; padding zeroed, `valid` and `index` the segments or None."""
    time, tail = x.shape[1], kernel.shape[0] - 1
    if valid is None:
        inputs = jnp.concatenate([initial_state, x], axis=1)
        y = _taps(inputs, kernel, bias, None, activation)
        return y, inputs[:, time:]

    order = jnp.argsort(~valid, axis=1, stable=True)
    inputs = jnp.concatenate(
        [initial_state, jnp.take_along_axis(x, order[..., None], axis=1)], axis=1
    )
    source = jnp.pad(jnp.take_along_axis(index, order, axis=1), ((0, 0), (tail, 0)))
    y = _taps(inputs, kernel, bias, source, activation)
    rank = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    y = jnp.where(valid[..., None], jnp.take_along_axis(y, rank[..., None], axis=1), 0)

    last = valid.sum(axis=1, keepdims=True) + jnp.arange(tail)
    own = jnp.take_along_axis(source, last, axis=1) == index[:, -1:]
    state = jnp.take_along_axis(inputs, last[..., None], axis=1)
    return y, jnp.where(own[..., None], state, 0)


def _taps(inputs, kernel, bias, source, activation):
    """[batch, tail + time, channels] -> [batch, time, channels]; taps stay in their `source`."""
    tail = kernel.shape[0] - 1
    time = inputs.shape[1] - tail
    wide = inputs.astype(kernel.dtype)  # once: the taps' gradients add up before they are rounded
    y = 0 if bias is None else bias
    for w in range(tail + 1):
        shifted = wide[:, w : w + time]
        if source is not None and w < tail:
            own = source[:, w : w + time] == source[:, tail:]
            shifted = jnp.where(own[..., None], shifted, 0)
        y += kernel[w] * shifted
    return ACTIVATIONS[activation](y).astype(inputs.dtype)
