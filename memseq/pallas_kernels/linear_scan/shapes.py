"""Sizes at which models call `linear_scan`, and inputs of those sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    """`gates`: "fixed" (one rate a channel) or "step" (input-dependent); `turns`: with a phase."""

    batch: int
    time: int
    channels: int
    gates: str = "step"
    turns: bool = False


SHAPES = {
    "recurrent_gemma_2b": Shape(4, 2048, 2560),
    "hgrn_1.3b": Shape(4, 2048, 2048),
    "lru_long_range_arena": Shape(32, 1024, 256, "fixed", True),
    "s4d_256": Shape(8, 2048, 256 * 32, "fixed", True),
    "odd": Shape(3, 97, 24, "step", True),
}


def example(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments: gates that keep about nine tenths a step, phases up to half a turn."""
    keys = jax.random.split(key, 3)
    by_step = (shape.batch, shape.time, shape.channels)
    gates = by_step if shape.gates == "step" else (shape.channels,)
    arrays = {
        "x": jax.random.normal(keys[0], by_step),
        "log_decay": jax.nn.log_sigmoid(2 + jax.random.normal(keys[1], gates)),
    }
    if shape.turns:
        arrays["phase"] = jnp.pi * jax.random.uniform(keys[2], (shape.channels,))
    return {name: x.astype(dtype) for name, x in arrays.items()}


def forward_products(shape: Shape, chunk: int) -> int:
    """Multiply-adds of one forward pass: one a step and channel, four if it turns.

    They are elementwise, not matrix products.
    """
    del chunk
    return shape.batch * shape.time * shape.channels * (4 if shape.turns else 1)
