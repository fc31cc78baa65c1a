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
    step = jnp.where(filled[..., None], step, 0)
    kept, between = _products(keep)
    if momentum is None:
        return Coefficients(kept, None, _written(between, step)), None
    held, passed = _products(jnp.where(filled, momentum, 1))
    added = _written(passed, step)
    between = jnp.where(filled[..., None, :], between, 0)  # S is added to W where a token is
    carried = jnp.matmul(between, held[..., None], precision=_HIGHEST)[..., 0]
    written = jnp.matmul(between, added, precision=_HIGHEST)
    return Coefficients(kept, carried, written), Coefficients(held, None, added).last()


_HIGHEST = jax.lax.Precision.HIGHEST


def _products(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., chunk] multiplied from the start, and between any two steps.

    [..., chunk]; [..., chunk, chunk]: entry t, j is the product over l in (j, t], 0 for j > t.

    Products of numbers in [0, 1] as they are: no quotient, no logarithm, 0 is a number as others.
    Step t and an earlier one meet at the one level at which they are in the two halves of a block.
    """
    chunk = x.shape[-1]
    size = 1 << (chunk - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - chunk)], constant_values=1)
    i = jnp.arange(size)
    row, column = i[:, None], i[None]
    pairs = jnp.broadcast_to(jnp.eye(size, dtype=x.dtype), (*x.shape, size))
    through = total = x  # of the block up to a step, and all of it
    after = jnp.ones_like(x)  # of the block behind a step
    half = 1
    while half < size:
        later = (i & half) != 0
        meet = (row // half == column // half + 1) & later[:, None]
        pairs = jnp.where(meet, through[..., :, None] * after[..., None, :], pairs)
        halves = total.reshape(*x.shape[:-1], -1, 2, half)
        other = jnp.flip(halves, axis=-2).reshape(x.shape)
        through = jnp.where(later, through * other, through)
        after = jnp.where(later, after, after * other)
        total = total * other
        half *= 2
    return through[..., :chunk], pairs[..., :chunk, :chunk]


def _written(between: jax.Array, step: jax.Array) -> jax.Array:
    """between [..., chunk, chunk] times the steps [..., chunk, window] along the gradient of the
    token that came so many before: [..., chunk, window - 1 + chunk] by token."""
    chunk, window = step.shape[-2:]
    if window == 1:
        return between * jnp.swapaxes(step, -1, -2)
    row, column = jnp.mgrid[:chunk, : window - 1 + chunk]
    lag = row + window - 1 - column
    by_token = sum(jnp.where(lag == n, step[..., n : n + 1], 0) for n in range(window))
    return jnp.matmul(between, by_token, precision=_HIGHEST)
