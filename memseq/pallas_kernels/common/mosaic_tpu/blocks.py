"""What the chunk functions of the TPU kernels are built of: products, decays, the inverse.

Arrays are [heads, rows, columns]. Everything is written in operations that the TPU compiler knows,
and differentiates into such.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from memseq.pallas_kernels.common.mosaic_tpu import squares
from memseq.pallas_kernels.common.mosaic_tpu.hardware import LANES, SUBLANES
from memseq.pallas_kernels.common.mosaic_tpu.squares import positions, straddles

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
    if passes == 6:
        return _dot(kind, a.astype(FLOAT32), b.astype(FLOAT32), jax.lax.Precision.HIGHEST)
    if kind != "tn":
        return _products(kind, (passes,), (a,), b)[0]
    parts = _parts(passes, a)
    if a.shape[2] % LANES == 0:
        found = _dot(kind, jnp.concatenate(parts, axis=2), b.astype(BFLOAT16))
        found = jnp.split(found, len(parts), axis=1)
    else:
        found = [_dot(kind, x, b.astype(BFLOAT16)) for x in parts]
    if passes == 3 and b.dtype != BFLOAT16:
        found.append(_dot(kind, parts[0], _parts(passes, b)[1]))
    return functools.reduce(jnp.add, found)


def _dot(kind, a, b, precision=None):
    dimensions = _CONTRACT[kind], ((0,), (0,))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=FLOAT32
    )


def _parts(passes, x):
    """What a product takes of x: its bfloat16, and for 3 passes what that leaves, if anything."""
    high = x.astype(BFLOAT16)
    if passes == 1 or x.dtype == BFLOAT16:
        return [high]
    return [high, (x - high.astype(FLOAT32)).astype(BFLOAT16)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def products(kind: str, passes: tuple, arrays: tuple, b: jax.Array) -> tuple[jax.Array, ...]:
    """`product` of each of `arrays`, with its `passes`, and one b; kind "nn" or "nt".

    Together, because to load b into the matrix unit takes a TPU v6e as long as to multiply 128 rows
    with it.
    """
    return _products(kind, passes, arrays, b)


def _products(kind, passes, arrays, b):
    if 6 in passes:
        return tuple(_product(kind, n, a, b) for n, a in zip(passes, arrays, strict=True))
    parts = [_parts(n, a) for n, a in zip(passes, arrays, strict=True)]
    meet = [[(n, x) for n, each in enumerate(parts) for x in each]]
    if 3 in passes and b.dtype != BFLOAT16:
        meet.append([(n, each[0]) for n, each in enumerate(parts) if passes[n] == 3])
    found = [[] for _ in parts]
    for rows, b_part in zip(meet, _parts(max(passes), b), strict=True):
        whole = _dot(kind, jnp.concatenate([x for _, x in rows], axis=1), b_part)
        ends = itertools.accumulate(x.shape[1] for _, x in rows[:-1])
        for (n, _), own in zip(rows, jnp.split(whole, list(ends), axis=1), strict=True):
            found[n].append(own)
    return tuple(functools.reduce(jnp.add, each) for each in found)


def _products_backward(kind, passes, saved, cotangents):
    arrays, b = saved
    own, turned = _BACKWARD[kind]
    d_arrays = _products(own[0], passes, cotangents, b)
    d_b = [
        _product(turned[0], n, *(dict(a=a, c=c)[x] for x in turned[1]))
        for n, a, c in zip(passes, arrays, cotangents, strict=True)
    ]
    d_arrays = tuple(d.astype(a.dtype) for d, a in zip(d_arrays, arrays, strict=True))
    return d_arrays, functools.reduce(jnp.add, d_b).astype(b.dtype)


products.defvjp(
    lambda kind, passes, arrays, b: (_products(kind, passes, arrays, b), (arrays, b)),
    _products_backward,
)


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


class Masks(NamedTuple):
    """As `chunks.ChunkMasks`: bool, or None for all true.

    pairs [1, C, W]: j <= i in one segment. from_start and to_end [1, C, 1], carried [1, 1, 1].
    """

    pairs: jax.Array
    from_start: jax.Array | None
    to_end: jax.Array | None
    carried: jax.Array | None


def masks(shared: jax.Array | None, chunk: int, side: int = 1) -> Masks:
    """From the rows that `mask_rows` made, [3, C], or None for one segment; see `squares`."""
    i, j = positions(chunk, side)
    if shared is None:
        return Masks(i >= j, None, None, None)
    index, from_start, to_end = (shared[r : r + 1] for r in range(3))
    own, start, end = columns(index, from_start, to_end)
    carried = from_start[:, None, chunk - 1 :] > 0
    index = jnp.concatenate([index] * side, axis=1)
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

    between [N, C, W]: from j to i, 0 where not `seen`. from_start [H, C, 1]: from the chunk's start
    as a read sees it. to_end [H, C, 1]. total [H, 1, 1].
    """

    between: jax.Array
    from_start: jax.Array
    to_end: jax.Array
    total: jax.Array


def head_decay(read: tuple, write: tuple, seen: jax.Array, shared: jax.Array | None) -> HeadDecay:
    """From coarse and fine sums [N, W] of `split_sums`: at a read, and after a write.

    seen: bool [1, C, W]; shared: as of `masks`. Differences across a border between segments mean
    nothing and can be positive: they are masked before exp.
    """
    chunk = seen.shape[1]
    number, width = write[0].shape
    side = width // chunk
    ends = tuple(_ends(x, chunk) for x in write)
    start = jnp.exp(read[0] + read[1])
    end = (ends[0] - write[0]) + (ends[1] - write[1])
    if shared is not None:
        end = jnp.where(jnp.concatenate([shared[2:3]] * side, axis=1) > 0, end, 0)
    coarse, fine, start, end = columns(*read, start, jnp.exp(end))
    coarse, fine = squares.across(coarse, side), squares.across(fine, side)
    between = (coarse - write[0][:, None]) + (fine - write[1][:, None])
    between = jnp.where(seen, jnp.exp(jnp.where(seen, between, 0)), 0)
    total = jnp.exp(ends[0] + ends[1])
    places = [(n, p * chunk % total.shape[1]) for n in range(number) for p in range(side)]
    total = jnp.stack([total[n : n + 1, p : p + 1] for n, p in places])
    start, end = (x.reshape(number * side, chunk, 1) for x in (start, end))
    return HeadDecay(between, start, end, total)


def _ends(x: jax.Array, chunk: int) -> jax.Array:
    """[N, W]: in each head's columns its last one; [N, 1] of one head."""
    column = jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
    found = x[:, -1:]
    for stop in range(x.shape[1] - chunk, 0, -chunk):
        found = jnp.where(column < stop, x[:, stop - 1 : stop], found)
    return found


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


def scores(passes: tuple, rows: tuple, columns: jax.Array, side: int) -> list[jax.Array]:
    """rows columns^T of each head, for each of `rows`, all [H, C, D]: [N, C, W] each."""
    rows = tuple(squares.stacked(x, side) for x in rows)
    found = products("nt", passes, rows, squares.stacked(columns, side))
    return [squares.own(x, side) for x in found]


def weighted(passes: int, weights: jax.Array, values: jax.Array, side: int) -> jax.Array:
    """weights values of each head, of [N, C, W] and [H, C, D]: [H, C, D]."""
    found = squares.spread(weights, side)
    found = product("nn", passes, found, squares.stacked(values, side))
    return found.reshape(values.shape)


def decayed_products(
    passes: tuple,
    rows: tuple,
    columns: jax.Array,
    decays: list[tuple],
    diagonal: tuple,
    side: int = 1,
) -> list[jax.Array]:
    """sum_d rows_id columns_jd decay(j to i)_d for j < i, [N, C, W] for each of `rows`.

    passes, diagonal: for each of `rows`; diagonal: has rows_i . columns_i, else 0. Above the
    diagonal 0. decays: of each level, [H, C, D] for each of `rows`, alike in the earlier halves.

    A pair meets at the one level at which it straddles the border between two halves.
    """
    heads, chunk, _ = columns.shape
    i, j = positions(chunk, side)
    columns = columns.astype(FLOAT32)
    rows = tuple(x.astype(FLOAT32) for x in rows)
    found = [jnp.zeros((heads // side, chunk, side * chunk), FLOAT32)] * len(rows)
    for n, x in enumerate(rows):
        if diagonal[n]:
            same = squares.stacked(jnp.sum(x * columns, axis=2, keepdims=True), side)
            found[n] = jnp.where(i == j, squares.across(same, side), found[n])
    size = 1
    for decay in decays:
        half = squares.half(size)
        meet = straddles(size, squares.later(half, i), squares.later(half, j))
        later = tuple(squares.later(half, x * d) for x, d in zip(rows, decay, strict=True))
        each = scores(passes, later, columns * decay[0], side)
        for n, x in enumerate(each):
            x = jnp.where(meet, x, squares.later(half, found[n]))
            found[n] = squares.put_later(half, x, found[n])
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
    """(I + tril(a, -1))^-1 of each head, for a float32 [N, C, W] (see `squares`), C a power of two.

    By block doubling: with x the solved diagonal blocks of one size and l_s what joins two of size
    s, those of twice the size are x - x l_s x. In place of a, y = (all that joins blocks not yet
    solved) x is kept: its part y_s = l_s x solves the next size in one product, and the same
    product brings the rest up to date,

        x <- x - x y_s,    y <- y - y y_s,

    so that log2 C products wait for one another. See `triangular.unit_lower_inverse` for why not
    Neumann squaring.
    """
    _, chunk, width = a.shape
    side = width // chunk
    i, j = positions(chunk, side)
    joins = jnp.where(straddles(1, i, j), a, 0)
    inverse = jnp.where(i == j, 1.0, -joins)
    rest = jnp.where(i ^ j >= 2, a, 0)  # what is above the diagonal is never taken
    size = 1
    while size < chunk:
        found = []
        if size > 1:
            joins = jnp.where(straddles(size, i, j), rest, 0)
            found.append(squares.later(squares.half(size), inverse))
        start = 2 * size if (2 * size) % SUBLANES == 0 else 0  # no row before it is in the rest
        if 2 * size < chunk:
            found.append(rest[:, start:])
        each = [x.shape[1] for x in found]
        change = _product("nn", passes, jnp.concatenate(found, axis=1), squares.spread(joins, side))
        if size > 1:
            later = found[0] - change[:, : each[0]]
            inverse = squares.put_later(squares.half(size), later, inverse)
        if 2 * size < chunk:
            rest = found[-1] - change[:, -each[-1] :]
            if start:
                rest = jnp.concatenate([jnp.zeros_like(a[:, :start]), rest], axis=1)
        size *= 2
    return inverse


def _inverse_backward(passes, inverse, cotangent):
    _, chunk, width = inverse.shape
    side = width // chunk
    i, j = positions(chunk, side)
    inner = _product("nt", passes, cotangent, squares.spread(inverse, side))
    found = squares.own(_product("tn", passes, inverse, inner), side)
    return (jnp.where(i > j, -found, 0),)


def _inverse_forward(passes, a):
    inverse = unit_lower_inverse(passes, a)
    return inverse, inverse


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)
