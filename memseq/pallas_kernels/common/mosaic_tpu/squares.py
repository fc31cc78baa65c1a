"""The [C, C] matrices of a chunk, those of several heads side by side.

A matrix of 64 columns fills half of a register's lanes, and a product with one half of the matrix
unit. So `side` heads share an array [N, C, W]: W = side x C columns, N = H / side. Two forms go
with it: the heads' rows one below another, [N, W, D], which is [H, C, D] in another shape; and the
matrices along the diagonal of one, [N, W, W], with which a product is that of each head.
"""

import functools

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.mosaic_tpu.hardware import LANES, SUBLANES


def side_by_side(heads: int, chunk: int) -> int:
    """How many of `heads` matrices [chunk, chunk] share an array."""
    return max(n for n in range(1, max(1, LANES // chunk) + 1) if heads % n == 0)


def stacked(x: jax.Array, side: int) -> jax.Array:
    """[H, C, D] -> [H / side, side C, D]."""
    heads, chunk, dim = x.shape
    return x.reshape(heads // side, side * chunk, dim)


def rows(x: jax.Array) -> jax.Array:
    """A number a step of each head, [..., H, C], as the rows [..., N, W] that go with an array."""
    *lead, heads, chunk = x.shape
    side = side_by_side(heads, chunk)
    return x.reshape(*lead, heads // side, side * chunk)


def positions(chunk: int, side: int = 1) -> tuple[jax.Array, jax.Array]:
    """int32 [1, chunk, side x chunk] twice: row and column of each entry in its head's matrix."""
    shape = (1, chunk, side * chunk)
    i, j = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
    return i, j if side == 1 else j & (chunk - 1)


def straddles(size: int, i: jax.Array, j: jax.Array) -> jax.Array:
    """True where i is in the later and j in the earlier half of one block of 2 x size."""
    return ((i ^ j) >> (size.bit_length() - 1) == 1) & (i > j)


def _head(side: int, width: int) -> jax.Array:
    """int32 [1, 1, width]: which of the heads side by side a column belongs to."""
    column = jax.lax.broadcasted_iota(jnp.int32, (1, 1, width), 2)
    return column >> ((width // side).bit_length() - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def own(x: jax.Array, side: int) -> jax.Array:
    """The blocks on the diagonal of [N, side R, W], side by side: [N, R, W]."""
    number = x.shape[1] // side
    head = _head(side, x.shape[2])
    found = x[:, :number]
    for n in range(1, side):
        found = jnp.where(head == n, x[:, n * number : (n + 1) * number], found)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread(x: jax.Array, side: int) -> jax.Array:
    """[N, R, W] as the blocks on the diagonal of [N, side R, W]."""
    if side == 1:
        return x
    head = _head(side, x.shape[2])
    return jnp.concatenate([jnp.where(head == n, x, 0) for n in range(side)], axis=1)


own.defvjp(lambda x, side: (own(x, side), None), lambda side, _, c: (spread(c, side),))
spread.defvjp(lambda x, side: (spread(x, side), None), lambda side, _, c: (own(c, side),))


def half(size: int) -> int | None:
    """`size`, if halves of so many rows can be taken apart: a register holds eight."""
    return size if size % SUBLANES == 0 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def later(size: int | None, x: jax.Array) -> jax.Array:
    """The rows in the later halves of blocks of 2 x size, [N, R / 2, W]; all if size is None."""
    if size is None:
        return x
    parts = [x[:, at : at + size] for at in range(size, x.shape[1], 2 * size)]
    return jnp.concatenate(parts, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def put_later(size: int | None, rows: jax.Array, x: jax.Array) -> jax.Array:
    """x with other rows in the later halves, the inverse of `later`."""
    if size is None:
        return rows
    parts = []
    for at in range(0, rows.shape[1], size):
        parts += [x[:, 2 * at : 2 * at + size], rows[:, at : at + size]]
    return jnp.concatenate(parts, axis=1)


def _later_backward(size, shape, c):
    return (put_later(size, c, jnp.zeros(shape, c.dtype)),)


def _put_later_backward(size, rows, c):
    return later(size, c), put_later(size, jnp.zeros(rows, c.dtype), c)


later.defvjp(lambda size, x: (later(size, x), x.shape), _later_backward)
put_later.defvjp(lambda size, rows, x: (put_later(size, rows, x), rows.shape), _put_later_backward)


def across(column: jax.Array, side: int) -> jax.Array:
    """A number a row, [N, W, 1], over the columns of its head: [N, C, W] (or [N, C, 1])."""
    if side == 1:
        return column
    number, width, _ = column.shape
    return own(jnp.broadcast_to(column, (number, width, width)), side)
