"""Sizes at which models call `linear_attention`, and inputs of those sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    """`decay` is None, "head" (fixed rates), "step" (a gate for each head) or "channel"."""

    batch: int
    time: int
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    decay: str | None = "step"


SHAPES = {
    "linear_transformer_byte": Shape(8, 1024, 8, 8, 64, 64, None),
    "retnet_1.3b": Shape(4, 2048, 8, 8, 256, 512, "head"),
    "gated_linear_attention_1.3b": Shape(4, 2048, 4, 4, 256, 512, "channel"),
    "mamba2_2.7b": Shape(4, 4096, 1, 80, 128, 64, "step"),
    "odd": Shape(3, 97, 2, 6, 24, 20, "channel"),
}


def example(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments: unit queries and keys, gates that keep about nine tenths a step."""
    keys = jax.random.split(key, 4)
    lead = (shape.batch, shape.time)
    unit = jax.random.normal(keys[0], (2, *lead, shape.key_heads, shape.key_dim))
    unit /= jnp.linalg.norm(unit, axis=-1, keepdims=True)
    value = jax.random.normal(keys[1], (*lead, shape.heads, shape.value_dim))
    arrays = {"query": unit[0], "key": unit[1], "value": value}
    if shape.decay is not None:
        gates = {
            "head": (shape.heads,),
            "step": (*lead, shape.heads),
            "channel": (*lead, shape.heads, shape.key_dim),
        }[shape.decay]
        arrays["log_decay"] = jax.nn.log_sigmoid(2 + jax.random.normal(keys[2], gates))
    return {name: x.astype(dtype) for name, x in arrays.items()}


def forward_products(shape: Shape, chunk: int) -> int:
    """Multiply-adds of the matrix products of one chunked forward pass.

    A position and head take chunk * key_dim for the scores of its chunk's pairs, chunk * value_dim
    for their values, and key_dim * value_dim each for what is written and for what is read.
    """
    each = chunk * (shape.key_dim + shape.value_dim) + 2 * shape.key_dim * shape.value_dim
    return shape.batch * shape.time * shape.heads * each
