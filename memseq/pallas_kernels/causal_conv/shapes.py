"""Sizes at which models call `causal_conv`, and inputs of those sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    """`width`: taps of a channel."""

    batch: int
    time: int
    channels: int
    width: int = 4


SHAPES = {
    "mamba_2.8b": Shape(4, 2048, 5120),
    "gated_delta_net_1.3b": Shape(4, 2048, 1536),
    "mamba2_2.7b": Shape(4, 4096, 5376),
    "odd": Shape(3, 97, 24, 3),
}


def example(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments."""
    keys = jax.random.split(key, 2)
    x = jax.random.normal(keys[0], (shape.batch, shape.time, shape.channels))
    kernel = jax.random.normal(keys[1], (shape.width, shape.channels)) / shape.width**0.5
    return {"x": x.astype(dtype), "kernel": kernel.astype(dtype)}


def forward_products(shape: Shape, chunk: int) -> int:
    """Multiply-adds of one forward pass: one a tap. They are elementwise, not matrix products."""
    del chunk
    return shape.batch * shape.time * shape.channels * shape.width
