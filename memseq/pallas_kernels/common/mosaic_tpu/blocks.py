"""What the chunk functions of the TPU kernels are built of: products, decays, the inverse.

Arrays are [heads, rows, columns]. Everything is written in operations that the TPU compiler knows,
and differentiates into such.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

FLOAT32 = jnp.float32
BFLOAT16 = jnp.bfloat16

# a b, a b^T and a^T b for a batch of matrices
_CONTRACT = {"nn": ((2,), (1,)), "nt": ((2,), (2,)), "tn": ((1,), (1,))}
# of the product c: (kind, operands) that give the cotangents of a and of b, where c stands for dc
_BACKWARD = {
    "nn": (("nt", "cb"), ("tn", "ac")),
    "nt": (("nn", "cb"), ("tn", "ca")),
    "tn": (("nt", "bc"), ("nn", "ac")),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(kind: str, passes: int, a: jax.Array, b: jax.Array) -> jax.Array:
    """The matrix product of each head in float32, [H, ., .].

    Args:
        kind: "nn" for a b, "nt" for a b^T, "tn" for a^T b.
        passes: 1 rounds the operands to bfloat16; 3 takes each as a sum of two bfloat16 (relative
            error 2^-16); 6 is float32.
    """
    return _product(kind, passes, a, b)


def _product(kind, passes, a, b):
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(_CONTRACT[kind], ((0,), (0,))),
        preferred_element_type=FLOAT32,
    )
    if passes == 6:
        return dot(a.astype(FLOAT32), b.astype(FLOAT32), precision=jax.lax.Precision.HIGHEST)
    a_high, b_high = a.astype(BFLOAT16), b.astype(BFLOAT16)
    found = dot(a_high, b_high)
    if passes == 3:  # an operand that is bfloat16 has no lower part
        if a.dtype != BFLOAT16:
            found += dot((a - a_high.astype(FLOAT32)).astype(BFLOAT16), b_high)
        if b.dtype != BFLOAT16:
            found += dot(a_high, (b - b_high.astype(FLOAT32)).astype(BFLOAT16))
    return found


def _product_backward(kind, passes, arrays, cotangent):
    named = dict(zip("abc", (*arrays, cotangent), strict=True))
    return tuple(
        product(own, passes, named[x], named[y]).astype(array.dtype)
        for (own, (x, y)), array in zip(_BACKWARD[kind], arrays, strict=True)
    )


product.defvjp(lambda kind, passes, a, b: (_product(kind, passes, a, b), (a, b)), _product_backward)


def columns(*rows: jax.Array) -> list[jax.Array]:
    """[H, C] each -> [H, C, 1] each: a number a step, from along the lanes to along the sublanes.

    One transposition for all of them; what is done to the numbers is cheaper before.
    """
    number = rows[0].shape[0]
    turned = jnp.swapaxes(jnp.concatenate(rows, axis=0), 0, 1)
    each = [turned[:, i : i + 1] for i in range(len(rows) * number)]
    return [jnp.stack(each[i : i + number]) for i in range(0, len(each), number)]


def positions(chunk: int) -> tuple[jax.Array, jax.Array]:
    """int32 [1, chunk, chunk] twice: the row and the column of each entry."""
    shape = (1, chunk, chunk)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1), jax.lax.broadcasted_iota(
        jnp.int32, shape, 2
    )


def straddles(size: int, i: jax.Array, j: jax.Array) -> jax.Array:
    """True where i is in the later and j in the earlier half of one block of 2 x size."""
    return ((i ^ j) >> (size.bit_length() - 1) == 1) & (i > j)


class Masks(NamedTuple):
    """As `chunks.ChunkMasks`: bool, or None for all true.

    pairs [1, C, C]: j <= i in one segment. from_start and to_end [1, C, 1], carried [1, 1, 1].
    """

    pairs: jax.Array
    from_start: jax.Array | None
    to_end: jax.Array | None
    carried: jax.Array | None


def masks(shared: jax.Array | None, chunk: int) -> Masks:
    """From the rows that `mask_rows` made, [3, C], or None for one segment."""
    i, j = positions(chunk)
    if shared is None:
        return Masks(i >= j, None, None, None)
    index, from_start, to_end = (shared[r : r + 1] for r in range(3))
    own, start, end = columns(index, from_start, to_end)
    carried = from_start[:, None, chunk - 1 :] > 0
    return Masks((i >= j) & (own == index[:, None]), start > 0, end > 0, carried)


def mask_rows(index: jax.Array | None, chunk: int) -> jax.Array | None:
    """Of the segment index int32 [B, T]: float32 [B, T / C, 3, C].

    Rows: the index counted from the chunk's first, whether a step continues the segment that the
    chunk starts in, and whether it is in the segment that the chunk ends in.
    """
    if index is None:
        return None
    index = index.reshape(index.shape[0], -1, chunk)
    end = index[..., -1:]
    start = jnp.pad(end[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jnp.stack([index - index[..., :1], index == start, index == end], axis=2).astype(FLOAT32)


def keep(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """x where the mask is true, else 0."""
    return x if mask is None else jnp.where(mask, x, 0)


# --- decay of a head -----------------------------------------------------------------------------

GRID = 256.0  # the coarse part of a log decay is a whole number of 1 / GRID
LEAST = -120.0  # exp is 0 in float32 below -104


def split_sums(
    log_decay: jax.Array, shared: jax.Array | None, exclusive: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Sums of log decays from a segment's first step in the chunk through each step, in two parts.

    log_decay: float32 [N / H, T / C, H, C]; shared: `mask_rows` or None; exclusive: before a step.
    Returns coarse and fine, as log_decay. The coarse parts are whole numbers of 1 / GRID below
    2^14: they and their differences are exact. The fine parts are sums of numbers below 1 / GRID.
    So the sum over the steps between two positions of a segment,

        (coarse_i - coarse_j) + (fine_i - fine_j),

    is as accurate as if only those steps had been added. Only `fine` has a gradient.
    """
    log_decay = jnp.maximum(log_decay, LEAST)
    coarse = jax.lax.stop_gradient(jnp.round(log_decay * GRID) / GRID)
    chunk = log_decay.shape[-1]
    taken = jnp.tril(jnp.ones((1, 1, chunk, chunk), bool), -1 if exclusive else 0)
    if shared is not None:
        index = shared[:, :, 0]
        taken &= index[..., :, None] == index[..., None, :]
    taken = taken.astype(FLOAT32)

    def sums(x):
        rows = x.reshape(taken.shape[0], -1, *x.shape[1:])
        found = jnp.einsum("bpthl,btil->bpthi", rows, taken, precision=jax.lax.Precision.HIGHEST)
        return found.reshape(x.shape)

    if shared is None:
        taken = jnp.broadcast_to(taken, (1, log_decay.shape[1], chunk, chunk))
    return sums(coarse), sums(log_decay - coarse)


class HeadDecay(NamedTuple):
    """Decays of one chunk, one a head.

    between [H, C, C]: from j to i, 0 where not `seen`. from_start [H, C, 1]: from the chunk's start
    as a read sees it. to_end [H, C, 1]. total [H, 1, 1].
    """

    between: jax.Array
    from_start: jax.Array
    to_end: jax.Array
    total: jax.Array


def head_decay(read: tuple, write: tuple, seen: jax.Array, shared: jax.Array | None) -> HeadDecay:
    """From coarse and fine sums [H, C] of `split_sums`: at a read, and after a write.


    seen: bool [1, C, C]; shared: as of `masks`. Differences across a border between segments mean
    nothing and can be positive: they are masked before exp.
    """
    ends = tuple(x[:, -1:] for x in write)
    start = jnp.exp(read[0] + read[1])
    end = (ends[0] - write[0]) + (ends[1] - write[1])
    end = jnp.exp(end if shared is None else jnp.where(shared[2:3] > 0, end, 0))
    coarse, fine, start, end = columns(*read, start, end)
    between = (coarse - write[0][:, None]) + (fine - write[1][:, None])
    between = jnp.where(seen, jnp.exp(jnp.where(seen, between, 0)), 0)
    return HeadDecay(between, start, end, jnp.exp(ends[0] + ends[1])[:, None])


# --- decay of a channel --------------------------------------------------------------------------


class ChannelDecay(NamedTuple):
    """Decays of one chunk, each [H, C, D] and at most 1.

    levels: for size 1, 2, ... C / 2 a pair (read, held): in the later half of a block of 2 x size,
        the decay from the border between the halves to each row, as a read and as an erasing key
        see it; in the earlier half, the decay from each row to the border.
    read_start, held_start: from the chunk's start. to_end: to the chunk's end.
    total: [H, 1, D], over the whole chunk.
    """

    levels: list[tuple[jax.Array, jax.Array]]
    read_start: jax.Array
    held_start: jax.Array
    to_end: jax.Array
    total: jax.Array


def channel_decay(log_decay: jax.Array, read_exclusive: bool, held_exclusive: bool) -> ChannelDecay:
    """From the log decays of one chunk [H, C, D], float32; C is a power of two.

    Every exponent is a sum over exactly the steps between two positions, built by doubling: `total`
    of a block is that of its half plus that of the other half.
    """
    chunk = log_decay.shape[1]
    row = jax.lax.broadcasted_iota(jnp.int32, (1, chunk, 1), 1)
    total = through = log_decay
    before = after = jnp.zeros_like(log_decay)
    levels = []
    size = 1
    while size < chunk:
        later = (row & size) != 0
        with_own = jnp.exp(jnp.where(later, through, after))
        without = with_own
        if read_exclusive or held_exclusive:
            without = jnp.exp(jnp.where(later, before, after))
        levels.append(
            (without if read_exclusive else with_own, without if held_exclusive else with_own)
        )
        other = other_half(size, total)
        past, future = jnp.where(later, other, 0), jnp.where(later, 0, other)
        total, through, before, after = total + other, through + past, before + past, after + future
        size *= 2
    through, before, after = jnp.exp(through), jnp.exp(before), jnp.exp(after)
    return ChannelDecay(
        levels,
        before if read_exclusive else through,
        before if held_exclusive else through,
        after,
        jnp.exp(total[:, :1]),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def other_half(size: int, x: jax.Array) -> jax.Array:
    """Row i gets row i xor size of x [H, C, D]."""
    chunk = x.shape[1]
    row = jax.lax.broadcasted_iota(jnp.int32, (1, chunk, 1), 1)
    down, up = pltpu.roll(x, size, 1), pltpu.roll(x, chunk - size, 1)
    return jnp.where((row & size) != 0, down, up)


# the rows trade places, so the derivative does too
other_half.defvjp(
    lambda size, x: (other_half(size, x), None), lambda size, _, c: (other_half(size, c),)
)


def decayed_products(
    passes: int, rows: jax.Array, columns: jax.Array, decays: list[jax.Array], diagonal: bool
) -> jax.Array:
    """sum_d rows_id columns_jd decay(j to i)_d for j < i, [H, C, C]; above the diagonal 0.

    decays: of each level, [H, C, D]. diagonal: has rows_i . columns_i, else 0.

    A pair meets at the one level at which it straddles the border between two halves.
    """
    chunk = rows.shape[1]
    i, j = positions(chunk)
    rows, columns = rows.astype(FLOAT32), columns.astype(FLOAT32)
    found = jnp.zeros((rows.shape[0], chunk, chunk), FLOAT32)
    if diagonal:
        found = jnp.where(i == j, jnp.sum(rows * columns, axis=2, keepdims=True), found)
    size = 1
    for decay in decays:
        found = jnp.where(
            straddles(size, i, j), product("nt", passes, rows * decay, columns * decay), found
        )
        size *= 2
    return found


def decayed_sum(
    passes: int, weights: jax.Array, values: jax.Array, decays: list[jax.Array]
) -> jax.Array:
    """out_iv = weights_ii values_iv + sum_{j<i} weights_ij values_jv decay(j to i)_v, [H, C, V].

    weights [H, C, C], values [H, C, V]; decays: of each level, [H, C, V].
    """
    i, j = positions(values.shape[1])
    values = values.astype(FLOAT32)
    out = jnp.sum(jnp.where(i == j, weights, 0), axis=2, keepdims=True) * values
    size = 1
    for decay in decays:
        pairs = jnp.where(straddles(size, i, j), weights, 0)
        out += decay * product("nn", passes, pairs, decay * values)
        size *= 2
    return out


# --- the triangular system -----------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def unit_lower_inverse(passes: int, a: jax.Array) -> jax.Array:
    """(I + tril(a, -1))^-1 for a float32 [H, C, C] by block doubling; C is a power of two.

    With x the solved diagonal blocks of one size, and l what joins pairs of them, the blocks of
    twice the size are x - x l x. See `triangular.unit_lower_inverse` for why not Neumann squaring.
    """
    chunk = a.shape[-1]
    i, j = positions(chunk)

    def joins(size):
        return jnp.where(straddles(size, i, j), a, 0)

    # Blocks of 2 and 4 without the matrix unit: (I - l1) l2 (I - l1), with l1 one number a pair
    one, two = joins(1), joins(2)
    below, beside = one.sum(axis=2, keepdims=True), one.sum(axis=1, keepdims=True)
    left = two - below * pltpu.roll(two, 1, 1)
    right = left - beside * pltpu.roll(left, chunk - 1, 2)
    inverse = jnp.where(i == j, 1.0, -one - right)
    size = 4
    while size < chunk:
        inner = _product("nn", passes, joins(size), inverse)
        inverse = inverse - _product("nn", passes, inverse, inner)
        size *= 2
    return inverse


def _inverse_backward(passes, inverse, cotangent):
    i, j = positions(inverse.shape[-1])
    inner = _product("nt", passes, cotangent, inverse)
    return (jnp.where(i > j, -_product("tn", passes, inverse, inner), 0),)


def _inverse_forward(passes, a):
    inverse = unit_lower_inverse(passes, a)
    return inverse, inverse


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)
