"""Sizes at which models call `log_linear_attention`, and inputs of those sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.linear_attention import shapes as linear_attention


class Shape(NamedTuple):
    """As of `linear_attention`; `delta` adds the write strengths of the delta rule."""

    batch: int
    time: int
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    decay: str | None = "step"
    levels: int = 15
    delta: bool = False


SHAPES = {
    "log_linear_mamba2_780m": Shape(4, 4096, 1, 48, 128, 64),
    "log_linear_gated_delta_net_800m": Shape(4, 4096, 6, 6, 256, 512, delta=True),
    "odd": Shape(3, 97, 2, 6, 24, 20, "head", 5, True),
}


def example(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments, as for `linear_attention`, with weights and strengths in (0, 1)."""
    weigh, write, rest = jax.random.split(key, 3)
    arrays = linear_attention.example(linear_attention.Shape(*shape[:7]), rest, dtype)
    lead = (shape.batch, shape.time, shape.heads)
    weights = jax.nn.sigmoid(jax.random.normal(weigh, (*lead, shape.levels)))
    arrays["level_scale"] = weights.astype(dtype)
    if shape.delta:
        arrays["beta"] = jax.nn.sigmoid(jax.random.normal(write, lead)).astype(dtype)
    return arrays


def forward_products(shape: Shape, chunk: int) -> int:
    """Multiply-adds of the matrix products of one chunked forward pass, without the inverse.

    A position and head take chunk * (key_dim + value_dim) for its chunk's pairs, and key_dim *
    value_dim for each level twice, what is read and what is written, with value_dim more a level to
    weigh the reads. The memories move once a chunk. The delta rule adds its system's chunk *
    key_dim, chunk^2 and chunk * key_dim twice, and once more key_dim * value_dim twice a level.
    """
    keys, values, places = shape.key_dim, shape.value_dim, shape.levels - 1
    each = chunk * (keys + values) + places * (2 * keys * values + values)
    if shape.delta:
        each += 3 * chunk * keys + chunk * chunk + 2 * places * keys * values
    moved = places * places * keys * values
    return shape.batch * shape.heads * (shape.time * each + shape.time // chunk * moved)
