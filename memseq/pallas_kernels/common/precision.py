"""How exactly matrix products are taken."""

import jax
import jax.numpy as jnp


def products_precision(*inputs: jax.Array) -> jax.lax.Precision:
    """HIGHEST where an input is float32 or wider; the platform's native product for 16-bit inputs.

    Says nothing about states, gates and the triangular inverse: those are always HIGHEST.
    """
    wide = any(jnp.finfo(x.dtype).bits >= 32 for x in inputs)
    return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
