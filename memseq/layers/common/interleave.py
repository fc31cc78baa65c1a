"""Several steps of an operation for each token, one after another along its time axis."""

import jax
import jax.numpy as jnp


def at_step(x: jax.Array, step: int, steps: int) -> jax.Array:
    """x [batch, time, ...] at one of a token's steps, 0 at the others; time * steps long."""
    others = [(0, 0)] * x.ndim
    others.insert(2, (step, steps - 1 - step))
    return jnp.pad(x[:, :, None], others).reshape(x.shape[0], -1, *x.shape[2:])


def taken_at(x: jax.Array, step: int, steps: int) -> jax.Array:
    """[batch, time * steps, ...] to its entries at one of a token's steps: [batch, time, ...]."""
    return x.reshape(x.shape[0], -1, steps, *x.shape[2:])[:, :, step]


def repeat_ids(segment_ids: jax.Array | None, steps: int) -> jax.Array | None:
    """Segment ids of all steps from those of the tokens."""
    return None if segment_ids is None else jnp.repeat(segment_ids, steps, axis=1)
