"""Sizes at which models call `mlstm`, and inputs of those sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.linear_attention import shapes as linear_attention_shapes


class Shape(NamedTuple):
    batch: int
    time: int
    heads: int
    key_dim: int
    value_dim: int


SHAPES = {"xlstm_7b": Shape(1, 8192, 8, 256, 512), "odd": Shape(3, 97, 6, 24, 20)}


def memory_of(shape: Shape) -> linear_attention_shapes.Shape:
    """The linear attention inside: one value column more, for the normaliser."""
    batch, time, heads, key_dim, value_dim = shape
    return linear_attention_shapes.Shape(batch, time, heads, heads, key_dim, value_dim + 1, "step")


def example(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments; input gates around 1, forget gates that keep about nine tenths a step."""
    keys = jax.random.split(key)
    arrays = linear_attention_shapes.example(memory_of(shape), keys[0], dtype)
    return {
        "query": arrays["query"],
        "key": arrays["key"],
        "value": arrays["value"][..., :-1],
        "log_input": jax.random.normal(keys[1], arrays["log_decay"].shape, dtype),
        "log_forget": arrays["log_decay"],
    }


def forward_products(shape: Shape, chunk: int) -> int:
    """Multiply-adds of the matrix products of one chunked forward pass."""
    return linear_attention_shapes.forward_products(memory_of(shape), chunk)
