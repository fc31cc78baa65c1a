"""Tokens kept as they came beside a Mamba layer: what B'MOJO and MemMamba share."""

from typing import Any

import jax
import jax.numpy as jnp

from memseq.layers.common.base import SequenceLayer
from memseq.layers.common.parts import split_heads
from memseq.layers.state_space.mamba import Mamba


def attend(query: jax.Array, tokens: jax.Array, seen: jax.Array) -> jax.Array:
    """softmax(q K^T / sqrt(dim)) V of one step; 0 where nothing is seen.

    query [batch, heads, dim], tokens [batch, n, 2, heads, dim], seen bool [batch, n].
    """
    logits = jnp.einsum("bhd,bnhd->bhn", query, tokens[:, :, 0]) * query.shape[-1] ** -0.5
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.exp(logits - jnp.where(jnp.isfinite(top), jax.lax.stop_gradient(top), 0))
    weight = weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1e-30)
    return jnp.einsum("bhn,bnhd->bhd", weight, tokens[:, :, 1])


def mamba_of(layer: SequenceLayer, **options: Any) -> Mamba:
    """The Mamba layer that a layer's fields describe."""
    return Mamba(
        layer.features,
        state_dim=layer.state_dim,
        implementation=layer.implementation,
        chunk_size=layer.chunk_size,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        **options,
    )


def pair_of(key: jax.Array, value: jax.Array, heads: int) -> jax.Array:
    """A token's key and value by heads: [batch, time, 2, heads, head_dim]."""
    return jnp.stack([split_heads(key, heads), split_heads(value, heads)], axis=2)


def enqueue(queue: jax.Array, new: jax.Array) -> jax.Array:
    """[batch, slots, ...] without its first, and with `new` [batch, ...] at the end."""
    return jnp.concatenate([queue[:, 1:], new[:, None]], axis=1)
