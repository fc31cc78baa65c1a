"""Cross-entropy that never holds the logits of a whole batch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from memseq.models.language_model import LanguageModel
from memseq.pallas_kernels.common.checks import check_count


def token_cross_entropy(
    model: LanguageModel,
    params,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log p(target) in nats, and the sum of weights.

    Takes `chunk` time steps at once, forward and backward, so that [batch, chunk, vocab] logits
    are the most that exist.

    Args:
        hidden: [batch, time, features], from `model.hidden`.
        targets: int32 [batch, time]; ignored where the weight is 0.
        weights: float32 [batch, time].
        chunk: time steps taken together.

    Returns:
        Two scalars: the nats float32 (float64 if hidden is), the weights in their own dtype.

    Raises:
        ValueError: for a chunk below 1.
    """
    check_count("chunk", chunk, 1)
    batch, time = targets.shape
    chunk = min(chunk, max(time, 1))
    padding = -time % chunk

    def blocks(x):
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def block_sum(hidden, targets, weights):
        logits = model.apply(params, hidden, method="logits")
        targets = jnp.where(weights > 0, targets, 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(jnp.where(weights > 0, losses * weights, 0))

    def step(total, block):
        return total + block_sum(*block), None

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    total, _ = jax.lax.scan(step, zero, (blocks(hidden), blocks(targets), blocks(weights)))
    return total, jnp.sum(weights)


def auxiliary_loss(sown: Mapping[str, Any]) -> jax.Array:
    """float32 scalar: the sum of what layers sowed in `losses`, such as a router's balance loss.

    sown: the variables that `model.apply(..., mutable="losses")` returned.
    """
    leaves = jax.tree.leaves(sown.get("losses", {}))
    return sum((jnp.sum(x, dtype=jnp.float32) for x in leaves), jnp.zeros((), jnp.float32))
