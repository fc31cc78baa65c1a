"""Softmax with something beside the logits that takes weight and carries nothing."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.entmax.rows import enter, row_parameter, top

LARGEST_EXPONENT = 80.0  # exp of it is far from overflow in float32


def softmax_n(x: jax.Array, n=1.0, *, where: jax.Array | None = None) -> jax.Array:
    """p_i = exp(x_i) / (n + sum_j exp(x_j)) over the last axis.

    n = 1 is softmax_1 (Hu et al. 2024, arXiv:2404.03828, equation 2.3), softmax with one more
    logit of 0 whose weight is dropped; n = 0 is softmax. The weights sum to less than 1 and vanish
    together as all logits fall.

    Args:
        x: [..., n], floating, of any size. Logits of minus infinity take no part.
        n: >= 0; a number, or an array that broadcasts to [...].
        where: bool, broadcasts to x; False takes no part.

    Returns:
        p [..., n] in x's dtype, computed in float32 at least. A row of which nothing takes part
        is 0, and so is its gradient.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    wide, part = enter(x, where)
    n = row_parameter("n", n, wide)
    level = jnp.log(jnp.where(n > 0, n, 1))
    level = jax.lax.stop_gradient(jnp.where(n > 0, level, -jnp.inf))
    largest = jnp.where(part.any(-1, keepdims=True), jnp.maximum(top(wide, part), level), level)
    largest = jnp.where(largest > -jnp.inf, largest, 0)
    raised = jnp.where(part, jnp.exp(jnp.where(part, wide - largest, 0)), 0)
    rest = n * jnp.exp(jnp.minimum(-largest, LARGEST_EXPONENT))
    total = rest + raised.sum(-1, keepdims=True)
    return (raised / jnp.where(total > 0, total, 1)).astype(jnp.result_type(x))


def softmax_with_sink(
    x: jax.Array, sink: jax.Array | None, part: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(weights [..., n], log of the total [...]) of softmax over x and one logit `sink` of a row.

    The weight that the sink takes is dropped: `softmax_n` with n = exp(sink).

    Args:
        x: [..., n] in float32 or float64.
        sink: [..., 1] in x's dtype, finite or minus infinity; None is plain softmax.
        part: bool, broadcasts to x; False takes no part.

    An empty row without a sink has weights 0 and total 0.
    """
    part = jnp.broadcast_to(part, x.shape)
    x = jnp.where(part, x, 0)
    level = top(x, part)
    present = part.any(-1, keepdims=True)
    if sink is not None:
        level = jnp.where(present, jnp.maximum(level, sink), sink)
        level = jax.lax.stop_gradient(jnp.where(level > -jnp.inf, level, 0))
    raised = jnp.where(part, jnp.exp(jnp.where(part, x - level, 0)), 0)
    total = raised.sum(-1, keepdims=True)
    if sink is not None:
        total += jnp.exp(sink - level)
    held = total > 0
    safe = jnp.where(held, total, 1)
    return raised / safe, jnp.where(held, level + jnp.log(safe), 0)[..., 0]
