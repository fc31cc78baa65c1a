"""How scores become weights of stored patterns, and the part of the energy that goes with it."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.entmax import (
    entmax,
    entmax_conjugate,
    k_subsets,
    k_subsets_conjugate,
    softmax_with_sink,
)

SEPARATIONS = ("softmax", "softmax_n", "entmax", "sparsemax", "budget")
STREAMED = ("softmax", "softmax_n")  # need one pass over the scores, so a tile at a time will do
STATE_NORMS = (None, "l2", "layer", "tanh")


def separate(
    scores: jax.Array,
    part: jax.Array,
    *,
    separation: str,
    alpha: jax.Array | None,
    sink: jax.Array | None,
    budget: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Weights p = grad conjugate(scores), and the conjugate.

    Args:
        scores: [..., n] in float32 or float64.
        part: bool, broadcasts to scores; False takes no part.
        separation: one of SEPARATIONS.
        alpha, sink: [...] up to broadcasting, as the separation needs them.
        budget: sum of the weights of "budget".

    Returns:
        p [..., n] and conjugate [...]; both 0 where nothing takes part.
    """
    if separation in STREAMED:
        return softmax_with_sink(scores, None if sink is None else sink[..., None], part)
    if separation == "budget":
        return k_subsets(scores, budget, where=part), k_subsets_conjugate(
            scores, budget, where=part
        )
    alpha = 2.0 if separation == "sparsemax" else alpha
    return entmax(scores, alpha, where=part), entmax_conjugate(scores, alpha, where=part)


def normalize(state: jax.Array, norm: str | None, axis: int = -1) -> jax.Array:
    """What every new state goes through (Santos et al. 2024, arXiv:2411.08590, section 4.3)."""
    if norm == "l2":
        return state * jax.lax.rsqrt((state * state).sum(axis, keepdims=True) + 1e-12)
    if norm == "layer":
        state = state - state.mean(axis, keepdims=True)
        return state * jax.lax.rsqrt((state * state).mean(axis, keepdims=True) + 1e-5)
    return jnp.tanh(state) if norm == "tanh" else state


def confinement(state: jax.Array, norm: str | None, axis: int = -1) -> jax.Array:
    """The energy's term that keeps states bounded: a state's coordinates lie along `axis`.

    |state|^2 / 2 without a norm. What "l2" and "layer" put on a sphere has none left; "tanh" has
    the negative entropy of spins with these means, whose conjugate is log cosh.
    """
    if norm == "tanh":
        limit = 1 - jnp.finfo(state.dtype).eps  # at 1 the slope is infinite
        bounded = jnp.clip(state, -limit, limit)
        up, down = (1 + bounded) / 2, (1 - bounded) / 2
        return (jax.scipy.special.xlogy(up, up) + jax.scipy.special.xlogy(down, down)).sum(axis)
    if norm is not None:
        return jnp.zeros_like(state.sum(axis))
    return (state * state).sum(axis) / 2
