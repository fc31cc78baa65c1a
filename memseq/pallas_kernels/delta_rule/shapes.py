"""Sizes at which models call `delta_rule`, and inputs of those sizes."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.linear_attention import shapes as linear_attention
from memseq.pallas_kernels.linear_attention.shapes import Shape

SHAPES = {
    "delta_net_1.3b": Shape(4, 2048, 16, 16, 128, 128, None),
    "gated_delta_net_1.3b": Shape(4, 2048, 6, 6, 256, 512, "step"),
    "qwen3_next": Shape(2, 4096, 16, 32, 128, 128, "step"),
    "kimi_linear": Shape(2, 4096, 32, 32, 128, 128, "channel"),
    "odd": Shape(3, 97, 2, 6, 24, 20, "step"),
}


def example(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments, as for `linear_attention`, with write strengths in (0, 2)."""
    write, rest = jax.random.split(key)
    arrays = linear_attention.example(shape, rest, dtype)
    beta = 2 * jax.nn.sigmoid(jax.random.normal(write, (shape.batch, shape.time, shape.heads)))
    return arrays | {"beta": beta.astype(dtype)}


def forward_products(shape: Shape, chunk: int) -> int:
    """Multiply-adds of the matrix products of one chunked forward pass, without the inverse.

    A position and head take chunk * key_dim twice (erase key with key, query with key), chunk *
    value_dim twice (the solved system with the errors, the read of the chunk's own writes) and
    key_dim * value_dim three times (what the memory holds, what is written, what is read).
    """
    each = 2 * chunk * (shape.key_dim + shape.value_dim) + 3 * shape.key_dim * shape.value_dim
    return shape.batch * shape.time * shape.heads * each
