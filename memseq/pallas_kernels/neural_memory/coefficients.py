"""What a chunk's gradient steps add up to: its recurrences unrolled into numbers.

With the gradients u_j of a chunk known, its keep gates a, momentum gates m and steps e give

    S_t = m_t S_{t-1} - sum_j e_tj u_j,   W_t = a_t W_{t-1} + S_t
    W_t = kept_t W_0 + carried_t S_0 - sum_j written_tj u_j

where e_tj is the step that token t takes along token j's gradient (j = t without a window).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Coefficients(NamedTuple):
    """Of one chunk, [..., chunk] a row a step; columns are the window - 1 tokens before, then own.

    kept: [..., chunk], of the weights at the chunk's start.
    carried: [..., chunk], of the momentum at the chunk's start, None without momentum.
    written: [..., chunk, window - 1 + chunk], of the gradients.
    """

    kept: jax.Array
    carried: jax.Array | None
    written: jax.Array

    def last(self) -> "Coefficients":
        """Of the chunk's last step alone, without the axis of steps."""
        carried = None if self.carried is None else self.carried[..., -1]
        return Coefficients(self.kept[..., -1], carried, self.written[..., -1, :])

    def before(self) -> "Coefficients":
        """Of each step, what is true before it."""

        def later(x, first):
            start = jnp.full_like(x[..., :1, :], first)
            return jnp.concatenate([start, x[..., :-1, :]], axis=-2)

        carried = None if self.carried is None else later(self.carried[..., None], 0)[..., 0]
        return Coefficients(later(self.kept[..., None], 1)[..., 0], carried, later(self.written, 0))


def coefficients(
    keep: jax.Array, momentum: jax.Array | None, step: jax.Array, filled: jax.Array
) -> tuple[Coefficients, Coefficients | None]:
    """Of the weights, and of the momentum S (its last step alone; None without momentum).

    keep, momentum, filled (bool): [..., chunk]; step [..., chunk, window], along the gradient of
    the token that came so many before. Slots that are not filled change nothing.
    """
    keep = jnp.where(filled, keep, 1)
    steps = _by_token(jnp.where(filled[..., None], step, 0))
    kept, between = jnp.cumprod(keep, axis=-1), _products(keep)
    if momentum is None:
        return Coefficients(kept, None, jnp.matmul(between, steps, precision=_HIGHEST)), None
    momentum = jnp.where(filled, momentum, 1)
    held = jnp.cumprod(momentum, axis=-1)
    added = jnp.matmul(_products(momentum), steps, precision=_HIGHEST)
    between = jnp.where(filled[..., None, :], between, 0)  # S is added to W where a token is
    carried = jnp.matmul(between, held[..., None], precision=_HIGHEST)[..., 0]
    written = jnp.matmul(between, added, precision=_HIGHEST)
    return Coefficients(kept, carried, written), Coefficients(held, None, added).last()


_HIGHEST = jax.lax.Precision.HIGHEST


def _products(x: jax.Array) -> jax.Array:
    """[..., chunk] -> [..., chunk, chunk]: entry t, j is the product over l in (j, t], 0 for j > t.

    Products of numbers in [0, 1] as they are: no quotient, no logarithm, 0 is a number as others.
    """
    row, column = jnp.mgrid[: x.shape[-1], : x.shape[-1]]
    factors = jnp.where(row > column, x[..., :, None], 1)
    return jnp.where(row >= column, jnp.cumprod(factors, axis=-2), 0)


def _by_token(step: jax.Array) -> jax.Array:
    """[..., chunk, window] by lag -> [..., chunk, window - 1 + chunk] by token."""
    chunk, window = step.shape[-2:]
    row, column = jnp.mgrid[:chunk, : window - 1 + chunk]
    lag = row + window - 1 - column
    found = jnp.take_along_axis(
        step,
        jnp.broadcast_to(jnp.clip(lag, 0, window - 1), (*step.shape[:-2], *lag.shape)),
        axis=-1,
    )
    return jnp.where((lag >= 0) & (lag < window), found, 0)
