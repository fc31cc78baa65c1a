"""A budget of weight: each logit gets at most 1, all together k."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.checks import check_count
from memseq.pallas_kernels.entmax.rows import enter

BISECTIONS = 60


def k_subsets(x: jax.Array, k: int, *, where: jax.Array | None = None) -> jax.Array:
    """The point nearest to x with 0 <= p <= 1 and sum k (SparseMAP on k-subsets).

        p_i = clip(x_i - threshold, 0, 1)

    Niculae et al. 2018, arXiv:1802.04223; in Hopfield networks Santos et al. 2024,
    arXiv:2402.13725, section 4. k = 1 is sparsemax. Differentiable in both modes.

    Args:
        x: [..., n], floating. Logits of minus infinity take no part.
        k: the budget, at least 1. Where fewer than k logits take part, each gets 1.
        where: bool, broadcasts to x; False takes no part.

    Returns:
        p [..., n] in x's dtype, computed in float32 at least; empty rows are 0.

    Raises:
        ValueError: for shapes, dtypes or a budget that do not fit.
    """
    check_count("k", k, 1)
    wide, part = enter(x, where)
    return _k_subsets(wide, part, k).astype(jnp.result_type(x))


def k_subsets_conjugate(x: jax.Array, k: int, *, where: jax.Array | None = None) -> jax.Array:
    """max_p p . x - |p|^2 / 2 over the same p, whose gradient in x is `k_subsets`: [...]."""
    check_count("k", k, 1)
    wide, part = enter(x, where)
    # the weights' own change adds nothing at the maximum, and keeping it keeps second derivatives
    p = _k_subsets(wide, part, k)
    return (p * wide - p * p / 2).sum(-1)


def _k_subsets(x, part, k):
    """The set of free weights comes from bisection, the threshold from them exactly."""
    count = part.sum(-1, keepdims=True)
    fixed = jax.lax.stop_gradient(x)
    low = jnp.min(fixed, axis=-1, keepdims=True, where=part, initial=jnp.inf) - 1
    high = jnp.max(fixed, axis=-1, keepdims=True, where=part, initial=-jnp.inf)
    low, high = (jnp.where(count > 0, bound, 0) for bound in (low, high))

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) / 2
        above = (jnp.clip(fixed - middle, 0, 1) * part).sum(-1, keepdims=True) >= k
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, _ = jax.lax.fori_loop(0, BISECTIONS, halve, (low, high))
    full = part & (fixed - low >= 1)
    free = part & (fixed > low) & ~full
    free_count = free.sum(-1, keepdims=True)
    threshold = (jnp.where(free, x, 0).sum(-1, keepdims=True) + full.sum(-1, keepdims=True) - k) / (
        jnp.maximum(free_count, 1)
    )
    p = jnp.where(free, jnp.clip(x - threshold, 0, 1), jnp.where(full, 1.0, 0.0).astype(x.dtype))
    return jnp.where(count <= k, part.astype(x.dtype), p)
