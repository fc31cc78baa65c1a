"""What one step keeps of the memory, as a number a channel, and the dtype of what is read."""

import jax
import jax.numpy as jnp


def transition(
    log_decay: jax.Array, sign: jax.Array | None, phase: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """sign exp(log_decay + i phase) in `dtype`, the state's; real without a phase.

    Any shapes that broadcast together.
    """
    real = jnp.finfo(dtype).dtype
    exponent = log_decay.astype(real)
    if phase is not None:
        exponent = jax.lax.complex(*jnp.broadcast_arrays(exponent, phase.astype(real)))
    kept = jnp.exp(exponent)
    if sign is not None:
        kept = sign.astype(real) * kept
    return kept


def out_dtype(x: jax.Array, dtype: jnp.dtype) -> jnp.dtype:
    """Of the output, for a state of `dtype`: x's, complex where the state is."""
    turning = jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.result_type(x.dtype, jnp.complex64) if turning else x.dtype
