"""Decay between two positions of a chunk, never as a quotient and never through a rounded sum.

A chunk needs exp(sum of log decays between j and i) for every pair j <= i. The difference of two
cumulative sums loses that: after sixty steps of -20 a float32 sum is -1200 and its last digit is
1e-4. Every exponent here is as good as the sum of the log decays between the two positions alone,
and is <= 0.

Per head, the sums are differences of cumulative sums that are cut in two, so that nothing is lost.
Per channel, a chunk is halved again and again: a pair that straddles the border between two halves
decays from j to the border and from the border to i, two factors <= 1 that separate into key and
query. The border is never in row i's future, so rounding cannot carry later decays into earlier
rows.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from memseq.pallas_kernels.common.products import scores, weighted
from memseq.pallas_kernels.common.triangular import assemble_halves, diagonal_blocks

HIGHEST = jax.lax.Precision.HIGHEST


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def pair_sums(log_decay: jax.Array, exclusive: bool = False) -> jax.Array:
    """[..., chunk] -> [..., chunk, chunk]: entry i, j sums l in (j, i], or (j, i) if exclusive.

    0 on and above the diagonal. Differences of cumulative sums, without what they would lose: each
    log decay is cut into a multiple of a grid, of which sums and differences are exact, and a rest
    below the grid, of which they are as good as exact. An error is of the size of 1e-8 (float32),
    whatever the sums. A log decay below `least` makes every exponential 0, and is held there.
    """
    chunk, dtype = log_decay.shape[-1], log_decay.dtype
    least = -(2.0 ** int(-jnp.finfo(dtype).minexp).bit_length())
    grid = -least * chunk * float(jnp.finfo(dtype).eps)  # a power of two
    held = jnp.maximum(log_decay, least)
    coarse = jnp.round(held / grid) * grid
    to_here = np.tri(chunk, dtype=dtype)
    sums = 0
    for part in (coarse, held - coarse):
        column = jnp.einsum("...l,jl->...j", part, to_here, precision=HIGHEST)
        row = shifted(column, -1, 1) if exclusive else column
        sums += row[..., :, None] - column[..., None, :]
    return jnp.where(_below(chunk), sums, 0)


@pair_sums.defjvp
def _pair_sums_jvp(exclusive, primals, tangents):
    """The sums of the tangent as a product: sum_l [l <= i] (tangent_l [j < l]), l < i if exclusive.

    What the backward pass adds up are then the pairs that straddle a step and no others; row sums
    less column sums would have to cancel the rest.
    """
    (log_decay,), (tangent,) = primals, tangents
    chunk = log_decay.shape[-1]
    taken = np.tri(chunk, k=-1 if exclusive else 0, dtype=tangent.dtype)
    steps = jnp.where(_below(chunk), tangent[..., :, None], 0)
    sums = jnp.einsum("il,...lj->...ij", taken, steps, precision=HIGHEST)
    return pair_sums(log_decay, exclusive), jnp.where(_below(chunk), sums, 0)


def _below(chunk: int) -> np.ndarray:
    """bool [chunk, chunk], the row's step after the column's."""
    return np.tri(chunk, k=-1, dtype=bool)


def masked_exp(exponent: jax.Array, mask: jax.Array) -> jax.Array:
    """exp(exponent) where mask, else 0. The exponent is masked too: 0 * inf has a NaN gradient."""
    return jnp.where(mask, jnp.exp(jnp.where(mask, exponent, 0)), 0)


def sums_from_start(log_decay: jax.Array, axis: int, exclusive: bool = False) -> jax.Array:
    """Sum of the log decays from the chunk's first position to each one (exclusive: before it)."""
    if axis == -2:
        return _products(log_decay, lambda step, i: step < i if exclusive else step <= i)
    sums = jnp.cumsum(log_decay, axis=axis)
    return shifted(sums, axis, 1) if exclusive else sums


def sums_to_end(log_decay: jax.Array, axis: int) -> jax.Array:
    """Sum of the log decays after each position, to the chunk's last one."""
    if axis == -2:
        return _products(log_decay, lambda step, i: step > i)
    return shifted(jnp.flip(jnp.cumsum(jnp.flip(log_decay, axis), axis=axis), axis), axis, -1)


def _products(log_decay: jax.Array, taken: Callable) -> jax.Array:
    """[..., chunk, D]: at each i the sum over the steps that `taken(step, i)` says.

    With channels, a CPU is faster at a matrix product than at a cumulative sum.
    """
    step, i = np.ogrid[: log_decay.shape[-2], : log_decay.shape[-2]]
    weights = taken(step, i).astype(log_decay.dtype)
    return jnp.einsum("...ld,li->...id", log_decay, weights, precision=HIGHEST)


def shifted(x: jax.Array, axis: int, by: int) -> jax.Array:
    """x moved along `axis` by one place, zero moving in."""
    axis %= x.ndim
    padding = [(0, 0)] * x.ndim
    padding[axis] = (1, 0) if by > 0 else (0, 1)
    size = x.shape[axis]
    start = 0 if by > 0 else 1
    return jax.lax.slice_in_dim(jnp.pad(x, padding), start, start + size, axis=axis)


def halves(log_decay: jax.Array, exclusive: bool) -> Iterator[tuple[int, jax.Array, jax.Array]]:
    """Yields (size, later, earlier) for size 1, 2, ... chunk / 2, for log_decay [..., chunk, D].

    later, earlier: [..., chunk / 2size, size, D], for the later and earlier half of each block of
    2 x size positions: the sums from the border to each row (exclusive: before it), and from after
    each row to the border.
    """
    *lead, chunk, dim = log_decay.shape
    shape = (*lead, chunk, 1, dim)
    through = log_decay.reshape(shape)
    read = jnp.zeros(shape, log_decay.dtype) if exclusive else through
    after = jnp.zeros(shape, log_decay.dtype)
    size = 1
    while size < chunk:
        paired = (*lead, chunk // (2 * size), 2, size, dim)
        (through0, through1), (read0, read1), (after0, after1) = (
            (x.reshape(paired)[..., 0, :, :], x.reshape(paired)[..., 1, :, :])
            for x in (through, read, after)
        )
        yield size, read1, after0
        total0, total1 = through0[..., -1:, :], through1[..., -1:, :]
        through = jnp.concatenate([through0, through1 + total0], axis=-2)
        read = jnp.concatenate([read0, read1 + total0], axis=-2)
        after = jnp.concatenate([after0 + total1, after1], axis=-2)
        size *= 2


def decayed_products(
    rows: jax.Array,
    columns: jax.Array,
    log_decay: jax.Array,
    *,
    exclusive: bool,
    diagonal: bool,
    precision: jax.lax.Precision,
) -> jax.Array:
    """sum_d rows_id columns_jd exp(sum of decays j to i)_d, as [..., chunk, chunk].

    Strictly lower, plus rows_i . columns_i on the diagonal if `diagonal`.
    rows, columns and log_decay are [..., chunk, D].
    """
    own = jnp.sum(rows * columns, axis=-1) if diagonal else jnp.zeros(rows.shape[:-1], rows.dtype)
    products = own[..., None, None]
    for size, later, earlier in halves(log_decay, exclusive):
        row = _half(rows, size, 1) * jnp.exp(later)
        column = _half(columns, size, 0) * jnp.exp(earlier)
        lower = scores(row, column, precision)
        top, bottom = _quarters(products)
        products = assemble_halves(top, lower, bottom)
    return products[..., 0, :, :]


def decayed_sum(
    weights: jax.Array,
    values: jax.Array,
    log_decay: jax.Array,
    *,
    exclusive: bool,
    precision: jax.lax.Precision,
) -> jax.Array:
    """out_iv = weights_ii values_iv + sum_{j<i} weights_ij values_jv exp(sum of decays j to i)_v.

    weights [..., chunk, chunk], values and log_decay [..., chunk, V].
    """
    own = jnp.diagonal(weights, axis1=-2, axis2=-1)[..., None] * values
    out = own[..., None, :]
    for size, later, earlier in halves(log_decay, exclusive):
        earlier = _half(values, size, 0) * jnp.exp(earlier)
        moved = weighted(diagonal_blocks(weights, size), earlier, precision)
        paired = out.reshape(*moved.shape[:-2], 2, *moved.shape[-2:])
        out = jnp.concatenate(
            [paired[..., 0, :, :], paired[..., 1, :, :] + jnp.exp(later) * moved], axis=-2
        )
    return out[..., 0, :, :]


def _half(x: jax.Array, size: int, which: int) -> jax.Array:
    *lead, chunk, dim = x.shape
    return x.reshape(*lead, chunk // (2 * size), 2, size, dim)[..., which, :, :]


def _quarters(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    *lead, count, size, _ = blocks.shape
    paired = blocks.reshape(*lead, count // 2, 2, size, size)
    return paired[..., 0, :, :], paired[..., 1, :, :]
