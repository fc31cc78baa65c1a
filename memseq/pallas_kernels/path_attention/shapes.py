"""Sizes at which models call `path_attention`, and inputs of those sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    """`heads` of queries are a multiple of `key_heads`."""

    batch: int
    time: int
    key_heads: int
    heads: int
    dim: int


SHAPES = {
    "transformer_1.3b": Shape(4, 2048, 16, 16, 128),
    "grouped": Shape(1, 8192, 8, 32, 128),
    "odd": Shape(3, 97, 2, 6, 24),
}


def example(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict:
    """Random arguments: directions of unit length, beta in [0, 2]."""
    keys = jax.random.split(key, 5)
    heads = (shape.heads, *[shape.key_heads] * 3)
    query, k, value, w = (
        jax.random.normal(key, (shape.batch, shape.time, h, shape.dim))
        for key, h in zip(keys, heads, strict=False)
    )
    beta = 2 * jax.random.uniform(keys[4], (shape.batch, shape.time, shape.key_heads))
    return {
        "query": query.astype(dtype),
        "key": k.astype(dtype),
        "value": value.astype(dtype),
        "direction": (w / jnp.linalg.norm(w, axis=-1, keepdims=True)).astype(dtype),
        "beta": beta,
    }


def forward_products(shape: Shape, chunk: int) -> int:
    """Multiply-adds of the matrix products that queries take part in, of one forward pass.

    Each pair of a query and a key that it sees takes dim for its score and dim for its value, and
    a query takes dim^2 for each chunk before its own.
    """
    pairs = shape.time * (shape.time + 1) // 2
    back = shape.time * max(shape.time - chunk, 0) // (2 * chunk) * shape.dim**2
    return shape.batch * shape.heads * (2 * pairs * shape.dim + back)
