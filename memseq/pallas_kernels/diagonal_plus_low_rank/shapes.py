"""Sizes at which models call `diagonal_plus_low_rank`, and inputs of those sizes."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.linear_attention.shapes import Shape

SHAPES = {
    "rwkv7_0.4b": Shape(8, 2048, 16, 16, 64, 64, "channel"),
    "rwkv7_2.9b": Shape(4, 4096, 40, 40, 64, 64, "channel"),
    "odd": Shape(3, 97, 2, 6, 24, 20, "channel"),
}
LEAST_LOG_DECAY = -0.6065  # RWKV-7's: -exp(-1/2) times a sigmoid


def example(shape: Shape, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments as RWKV-7 makes them.

    With the unit removal key kappa and the learning rate eta in (0, 1) of each channel: a = -kappa,
    b = eta kappa; the key is a removal key of its own length, and log decays are in (-0.6065, 0).
    """
    keys = jax.random.split(key, 5)
    lead = (shape.batch, shape.time)
    small, large = ((*lead, n, shape.key_dim) for n in (shape.key_heads, shape.heads))
    query, removal = jax.random.normal(keys[0], (2, *small))
    removal /= jnp.linalg.norm(removal, axis=-1, keepdims=True)
    eta = jax.nn.sigmoid(jax.random.normal(keys[1], small))
    arrays = {
        "query": query / shape.key_dim**0.5,
        "key": removal * jnp.exp(0.3 * jax.random.normal(keys[2], small)),
        "value": jax.random.normal(keys[3], (*lead, shape.heads, shape.value_dim)),
        "a": -removal,
        "b": removal * eta,
        "log_decay": LEAST_LOG_DECAY * jax.nn.sigmoid(jax.random.normal(keys[4], large)),
    }
    return {name: x.astype(dtype) for name, x in arrays.items()}


def forward_products(shape: Shape, chunk: int) -> int:
    """Multiply-adds of the matrix products of one chunked forward pass, without the inverse.

    A position and head take chunk * key_dim four times (query and a, each with key and b), chunk *
    value_dim four times (the key's part of what a finds, the solved system, the read of what was
    found and of the values) and key_dim * value_dim four times (what the memory holds, what is
    moved, what is written, what is read).
    """
    each = 4 * chunk * (shape.key_dim + shape.value_dim) + 4 * shape.key_dim * shape.value_dim
    return shape.batch * shape.time * shape.heads * each
