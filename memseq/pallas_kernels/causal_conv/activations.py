"""Activations that a convolution can end with."""

import jax

ACTIVATIONS = {
    None: lambda x: x,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
}
