"""Sizes at which layers call `hopfield_retrieve`, and inputs of those sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    """`queries` and `patterns` of a row; `steps`: softmaxes taken, the read included."""

    batch: int
    queries: int
    patterns: int
    heads: int
    dim: int
    steps: int = 1


SHAPES = {
    "pooling": Shape(64, 1, 1024, 8, 32),
    "lookup": Shape(32, 128, 4096, 8, 64),
    "retrieval": Shape(1, 4096, 65536, 1, 64, 3),
    "odd": Shape(3, 97, 61, 2, 24, 2),
}


def example(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict:
    """Random arguments."""
    keys = jax.random.split(key, 3)
    rows = (shape.queries, shape.patterns, shape.patterns)
    arrays = {
        name: jax.random.normal(k, (shape.batch, n, shape.heads, shape.dim)).astype(dtype)
        for name, k, n in zip(("query", "stored", "values"), keys, rows, strict=True)
    }
    return arrays | {"steps": shape.steps}


def forward_products(shape: Shape, chunk: int) -> int:
    """Multiply-adds of the matrix products of one forward pass.

    Every step takes dim for the score of each pair of a query and a pattern, and dim for its sum.
    """
    del chunk
    pairs = shape.batch * shape.heads * shape.queries * shape.patterns
    return 2 * shape.steps * pairs * shape.dim
