"""Sizes at which models call `selective_scan`, and inputs of those sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    """`state_dim` numbers a channel; `groups` of channels share B and C."""

    batch: int
    time: int
    channels: int
    state_dim: int = 16
    groups: int = 1


SHAPES = {
    "mamba_130m": Shape(8, 2048, 1536),
    "mamba_2.8b": Shape(4, 2048, 5120),
    "falcon_mamba_7b": Shape(2, 4096, 8192),
    "odd": Shape(3, 97, 24, 5, 2),
}


def example(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments, rates and step sizes as Mamba begins with: -1 to -N, and 0.001 to 0.1."""
    keys = jax.random.split(key, 4)
    by_step = (shape.batch, shape.time, shape.channels)
    maps = (shape.batch, shape.time, shape.groups, shape.state_dim)
    rates = -jnp.arange(1.0, shape.state_dim + 1)
    return {
        "x": jax.random.normal(keys[0], by_step, dtype),
        "dt": (10 ** jax.random.uniform(keys[1], by_step, minval=-3, maxval=-1)).astype(dtype),
        "A": jnp.tile(rates, (shape.channels, 1)),
        "B": jax.random.normal(keys[2], maps, dtype),
        "C": jax.random.normal(keys[3], maps, dtype),
        "D": jnp.ones(shape.channels),
    }


def forward_products(shape: Shape, chunk: int) -> int:
    """Multiply-adds of one forward pass: three a number of the state (rate, write, read).

    They are elementwise, not matrix products.
    """
    del chunk
    return 3 * shape.batch * shape.time * shape.channels * shape.state_dim
