"""Sizes at which models call `attention`, and inputs of those sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    """`heads` of queries are a multiple of `key_heads`; `window`: keys seen, None for all."""

    batch: int
    time: int
    key_heads: int
    heads: int
    dim: int
    window: int | None = None


SHAPES = {
    "transformer_1.3b": Shape(4, 2048, 16, 16, 128),
    "llama3_8b": Shape(1, 8192, 8, 32, 128),
    "sliding_window": Shape(4, 4096, 4, 16, 64, 512),
    "odd": Shape(3, 97, 2, 6, 24, 13),
}


def example(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict:
    """Random arguments."""
    keys = jax.random.split(key, 3)
    heads = (shape.heads, shape.key_heads, shape.key_heads)
    arrays = {
        name: jax.random.normal(k, (shape.batch, shape.time, h, shape.dim)).astype(dtype)
        for name, k, h in zip(("query", "key", "value"), keys, heads, strict=True)
    }
    return arrays | {"window": shape.window}


def forward_products(shape: Shape, chunk: int) -> int:
    """Multiply-adds of the matrix products of one forward pass.

    Each pair of a query and a key that it sees takes dim for its score and dim for its value.
    """
    del chunk
    seen = min(shape.window or shape.time, shape.time)
    pairs = seen * (seen + 1) // 2 + (shape.time - seen) * seen
    return 2 * shape.batch * shape.heads * pairs * shape.dim
