"""What the maps over the last axis share: checks of a row's logits, and which of them take part."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.checks import check_floating


def enter(x: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(logits in float32 at least, bool of the same shape: takes part). Hidden logits are 0.

    A logit of minus infinity takes no part, as one that `where` hides.
    """
    check_floating("x", x)
    if x.ndim < 1:
        raise ValueError("x: expected an array [..., n], got a number")
    x = jnp.asarray(x)
    part = x > -jnp.inf
    if where is not None:
        if not hasattr(where, "dtype") or where.dtype != jnp.bool_:
            came = getattr(where, "dtype", type(where).__name__)
            raise ValueError(f"where: expected bool, got {came}")
        if where.ndim > x.ndim or any(
            got not in (1, want)
            for got, want in zip(where.shape[::-1], x.shape[::-1], strict=False)
        ):
            raise ValueError(
                f"where: expected a shape that broadcasts to x's {list(x.shape)}, "
                f"got {list(where.shape)}"
            )
        part &= where
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.where(part, wide, 0), part


def row_parameter(name: str, value, x: jax.Array) -> jax.Array:
    """A number of each row: `value` in x's dtype as [..., 1], from what broadcasts to x[..., 0]."""
    value = jnp.asarray(value, x.dtype)
    rows = x.shape[:-1]
    if value.ndim > len(rows) or any(
        got not in (1, want) for got, want in zip(value.shape[::-1], rows[::-1], strict=False)
    ):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to x's without the last axis, "
            f"{list(rows)}, got {list(value.shape)}"
        )
    return value[..., None]


def top(x: jax.Array, part: jax.Array) -> jax.Array:
    """The largest logit that takes part, [..., 1], without gradient; 0 in a row without any."""
    largest = jnp.max(x, axis=-1, keepdims=True, where=part, initial=-jnp.inf)
    return jax.lax.stop_gradient(jnp.where(largest > -jnp.inf, largest, 0))
