"""Sizes at which models call `momentum_delta_rule`, and inputs of those sizes."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.linear_attention import shapes as linear_attention
from memseq.pallas_kernels.linear_attention.shapes import Shape

SHAPES = {
    "momentum_delta_net_400m": Shape(4, 2048, 6, 6, 128, 256, "step"),
    "odd": Shape(3, 97, 2, 6, 24, 20, "step"),
}


def example(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments, as for `linear_attention`; beta and step in (0, 1), momentum about 0.7."""
    more, rest = jax.random.split(key)
    arrays = linear_attention.example(shape, rest, dtype)
    drawn = jax.random.normal(more, (3, shape.batch, shape.time, shape.heads))
    beta, step = jax.nn.sigmoid(drawn[:2]).astype(dtype)
    return arrays | {
        "beta": beta,
        "step": step,
        "log_momentum": jax.nn.log_sigmoid(1 + drawn[2]).astype(dtype),
    }


def forward_products(shape: Shape, chunk: int) -> int:
    """Multiply-adds of the products of one chunked forward pass, without inverse and sums of gates.

    A position and head take chunk * chunk for the shares of writes, chunk * key_dim twice (key with
    key, query with key), chunk * value_dim twice (the solved system with the errors, the read of
    the chunk's own writes) and 2 * key_dim * value_dim three times (what memory and momentum hold,
    what is written, what is read).
    """
    each = chunk * chunk + 2 * chunk * (shape.key_dim + shape.value_dim)
    each += 6 * shape.key_dim * shape.value_dim
    return shape.batch * shape.time * shape.heads * each
