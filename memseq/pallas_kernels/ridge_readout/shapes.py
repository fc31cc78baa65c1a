"""Sizes at which models call `ridge_readout`, and inputs of those sizes."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.linear_attention import shapes as linear_attention
from memseq.pallas_kernels.linear_attention.shapes import Shape

SHAPES = {
    "mesa_net_1b": Shape(2, 2048, 16, 16, 128, 128, "step"),
    "odd": Shape(3, 97, 2, 6, 24, 20, "step"),
}


def example(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments, as for `linear_attention`, with weights in (0, 1) and a ridge of 1."""
    write, rest = jax.random.split(key)
    arrays = linear_attention.example(shape, rest, dtype)
    beta = jax.nn.sigmoid(jax.random.normal(write, (shape.batch, shape.time, shape.heads)))
    ridge = jnp.ones((shape.heads, shape.key_dim))
    return {"log_decay": None} | arrays | {"beta": beta.astype(dtype), "ridge": ridge.astype(dtype)}


def forward_products(shape: Shape, chunk: int, iterations: int = 30) -> int:
    """Multiply-adds of the matrix products of one chunked forward pass.

    A position and head take, each iteration, key_dim^2 for the past and 2 * chunk * key_dim for the
    chunk's own pairs; once, chunk * key_dim for the diagonal, key_dim * (key_dim + value_dim) for
    what is written, and chunk * (key_dim + value_dim) + key_dim * value_dim for the read-out.
    """
    _, _, _, _, keys, values, _ = shape
    iteration = keys * keys + 2 * chunk * keys
    once = chunk * keys + keys * (keys + values) + chunk * (keys + values) + keys * values
    return shape.batch * shape.time * shape.heads * (iterations * iteration + once)
