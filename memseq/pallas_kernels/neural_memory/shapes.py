"""Sizes at which models call `neural_memory`, and inputs of those sizes."""

import dataclasses

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.neural_memory.losses import Loss
from memseq.pallas_kernels.neural_memory.memory import Memory


@dataclasses.dataclass(frozen=True)
class Shape:
    """Keys and values have `dim` channels, hidden layers `expansion` times as many."""

    batch: int
    time: int
    heads: int
    dim: int
    depth: int = 2
    expansion: int = 4
    momentum: bool = True
    update_chunk: int = 64

    def sizes(self) -> list[int]:
        """Channels before the first layer and after each."""
        return [self.dim] + [self.expansion * self.dim] * (self.depth - 1) + [self.dim]


SHAPES = {
    "ttt_linear_1.3b": Shape(4, 2048, 32, 64, depth=1, momentum=False, update_chunk=16),
    "ttt_mlp_1.3b": Shape(4, 2048, 32, 64, momentum=False, update_chunk=16),
    "titans_400m": Shape(4, 4096, 8, 128),
    "odd": Shape(3, 97, 2, 24, depth=3, expansion=2),
}


def example(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict:
    """Random arguments: unit keys, small steps, and initial weights of unit gain."""
    keys = iter(jax.random.split(key, 6 + shape.depth))
    lead = (shape.batch, shape.time, shape.heads)

    def normal(size):
        return jax.random.normal(next(keys), size, dtype)

    def gate():
        return jax.random.uniform(next(keys), lead, dtype)

    query, stored, value = (normal((*lead, shape.dim)) for _ in range(3))
    sizes = shape.sizes()
    arguments = {
        "query": query / jnp.linalg.norm(query, axis=-1, keepdims=True),
        "key": stored / jnp.linalg.norm(stored, axis=-1, keepdims=True),
        "value": value,
        "log_keep": -0.01 * gate(),
        "step": 0.01 * gate(),
        "momentum": 0.9 * gate(),
        "initial": tuple(
            {"weight": normal((shape.heads, n, m)) * n**-0.5}
            for n, m in zip(sizes[:-1], sizes[1:], strict=True)
        ),
        "memory": Memory(),
        "loss": Loss(),
        "update_chunk": shape.update_chunk,
    }
    if not shape.momentum:
        del arguments["momentum"]
    return arguments


def forward_products(shape: Shape, chunk: int) -> int:
    """Multiply-adds of the matrix products of one chunked forward pass.

    A position and head passes through the weights to find its error, back through all but the
    first, through weights (and momentum) to be read, and is added to weights (and momentum); in
    every layer it takes chunk * in for the scores and chunk * out for what they weigh.
    """
    sizes = shape.sizes()
    weights = [n * m for n, m in zip(sizes[:-1], sizes[1:], strict=True)]
    through = 1 + 2 * (1 + shape.momentum)
    scores = sum(n + m for n, m in zip(sizes[:-1], sizes[1:], strict=True))
    each = through * sum(weights) + sum(weights[1:]) + chunk * scores
    return shape.batch * shape.time * shape.heads * each
