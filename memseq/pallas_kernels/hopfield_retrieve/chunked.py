"""`hopfield_retrieve` by tiles: queries go through all steps a tile at a time.

For softmax the stored patterns are streamed in tiles too, with the running maximum and sum of
online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135),
so no score outlives its pair of tiles. The other separations need a row's scores together: those
of one tile of queries are held at a time.
"""

import functools

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.precision import products_precision
from memseq.pallas_kernels.common.sharded import vary_together
from memseq.pallas_kernels.hopfield_retrieve.iterate import follow, retrieve
from memseq.pallas_kernels.hopfield_retrieve.reference import score, visible, whole_rows
from memseq.pallas_kernels.hopfield_retrieve.separation import STREAMED

PATTERNS = 512  # stored patterns of a tile; a tile has a quarter as many queries


def chunked(
    query,
    stored,
    values,
    beta,
    alpha,
    sink,
    mask,
    position,
    *,
    separation,
    budget,
    dtype,
    chunk_size,
    **options,
):
    """See `reference`."""
    precision = products_precision(query, stored, *([] if values is None else [values]))
    result = query.dtype if values is None else values.dtype
    chunk = PATTERNS if chunk_size is None else chunk_size
    streams = separation in STREAMED
    # wide before the tiles: gradients add up over them before they are rounded
    stored, values = (None if x is None else x.astype(dtype) for x in (stored, values))
    patterns, size = stored.shape[1], min(chunk, stored.shape[1])
    if streams:
        stored, values = _flat_tiles(stored, size), _flat_tiles(values, size)
        attend = streamed(size, patterns, precision)
    else:
        attend = whole_rows(separation, budget, precision)
    shared = {"values": values, "beta": beta, "alpha": alpha, "sink": sink}

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_tile(lead, query, by_query):
        memory = shared | by_query | {"stored": follow(stored, lead)}
        out, energies, lead = retrieve(attend, query, memory, **options)
        return lead, (out, energies)

    queries, tile = query.shape[1], max(chunk // 4, 1)
    query = query.astype(dtype)
    if queries <= tile:
        _, (out, energies) = one_tile(stored, query, {"mask": mask, "position": position})
        return out.astype(result), energies

    def to_tiles(x):
        x = jnp.pad(x, [(0, 0), (0, -queries % tile)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, tile, *x.shape[2:]), 1, 0)

    def from_tiles(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :queries]

    each = mask is not None and mask.shape[1] > 1  # a mask of every query goes with its tile
    whole = {} if each else {"mask": mask}
    split = {"position": position} | ({"mask": mask} if each else {})
    _, (out, energies) = jax.lax.scan(
        lambda lead, tiles: one_tile(lead, tiles[0], tiles[1] | whole),
        stored,
        (to_tiles(query), jax.tree.map(to_tiles, split)),
    )
    return from_tiles(out).astype(result), None if energies is None else from_tiles(energies)


def streamed(size: int, patterns: int, precision: jax.lax.Precision):
    """`attend` of `retrieve` for softmax, over tiles of `size` of the stored patterns."""

    def attend(state, memory, read):
        # one argument for patterns that are scored and summed: their gradients meet in the tile
        values = None if read == "stored" else memory["values"]
        mask = memory["mask"]
        if patterns % size and mask is None:
            mask = jnp.ones((1, 1, patterns), bool)
        arrays = (memory["stored"], values, memory["beta"], memory["sink"])
        out, total = _online_softmax(
            (size, precision), state, *arrays, _tiles(mask, 2, size), memory["position"]
        )
        return jnp.moveaxis(out, 3, 1), jnp.moveaxis(total, 3, 1)

    return attend


def _tiles(x, axis, size):
    """[..., patterns, ...] -> [tiles, ..., size, ...], the patterns lying along `axis`."""
    if x is None:
        return None
    x = jnp.pad(x, [(0, -x.shape[i] % size if i == axis else 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _flat_tiles(x, size):
    """[batch, patterns, heads, dim] -> [tiles, all of a tile].

    Flat because compilers before jax 0.12 copy a large array if loops want its axes of size 1 in
    another order.
    """
    return None if x is None else _tiles(x, 1, size).reshape(-(-x.shape[1] // size), -1)


def _of_tile(x, size, state):
    """One of `_flat_tiles` -> [batch, size, heads, dim]; state [batch, queries, heads, ...]."""
    return None if x is None else x.reshape(state.shape[0], size, state.shape[2], -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _online_softmax(static, state, stored, values, beta, sink, mask, position):
    """(out [batch, heads, group, queries, value_dim], log of the total [..., queries]).

    stored and values come as `_flat_tiles`, mask as `_tiles`; values None reads `stored`. Both are
    0 where a query sees nothing and has no sink.
    """
    size, precision = static
    low = jnp.finfo(state.dtype).min

    # nothing of a tile is kept: not its scores, nor what it is in another shape
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(carry, tile):
        top, total, summed = carry
        first, keys, reads, mask = tile
        keys, reads = _of_tile(keys, size, state), _of_tile(reads, size, state)
        scores = score(state, keys, beta, precision)
        part = visible(mask, position, first, keys.shape[1])
        scores = jnp.where(part, scores, low)
        new = jnp.maximum(top, scores.max(-1))
        raised = jnp.where(part, jnp.exp(scores - new[..., None]), 0)
        kept = jnp.exp(top - new)
        total = total * kept + raised.sum(-1)
        reads = keys if reads is None else reads
        more = jnp.einsum("bhgqn,bnhv->bhgqv", raised, reads, precision=precision)
        return (new, total, summed * kept[..., None] + more), None

    shape = (state.shape[0], *state.shape[2:4], state.shape[1])
    each = state.shape[0] * state.shape[2] * size
    dim = (stored if values is None else values).shape[1] // each
    first = size * jnp.arange(stored.shape[0], dtype=jnp.int32)
    top, total = jnp.full(shape, low, state.dtype), jnp.zeros(shape, state.dtype)
    if sink is not None:
        top = jnp.maximum(top, sink[..., None])
        total = jnp.exp(sink[..., None] - top)
    start = (top, total, jnp.zeros((*shape, dim), state.dtype))
    start = vary_together((*start, state))[:3]
    (top, total, summed), _ = jax.lax.scan(add, start, (first, stored, values, mask))
    held = total > 0
    total = jnp.where(held, total, 1)
    return summed / total[..., None], jnp.where(held, top + jnp.log(total), 0)


@_online_softmax.defjvp
def _online_softmax_jvp(static, primals, tangents):
    """With weights p = exp(scores - total): d total = sum p d scores, d out = sum p (d value +
    d scores value) - out d total. Scores are taken again, so the backward pass holds none either.
    """
    size, precision = static
    state, stored, values, beta, sink, mask, position = primals
    d_state, d_stored, d_values, d_beta, d_sink = tangents[:5]
    out, total = _online_softmax(static, *primals)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def change(tile, d_tile, d_state, d_beta):
        first, keys, reads, mask = tile
        keys, reads, d_keys, d_reads = (_of_tile(x, size, state) for x in (keys, reads, *d_tile))
        scores = score(state, keys, beta, precision)
        part = visible(mask, position, first, keys.shape[1])
        p = jnp.where(part, jnp.exp(jnp.where(part, scores - total[..., None], 0)), 0)
        d_scores = (
            score(d_state, keys, beta, precision)
            + score(state, d_keys, beta, precision)
            + score(state, keys, d_beta, precision)
        )
        weighted = p * d_scores
        reads, d_reads = (keys, d_keys) if reads is None else (reads, d_reads)
        read = jnp.einsum("bhgqn,bnhv->bhgqv", weighted, reads, precision=precision)
        read += jnp.einsum("bhgqn,bnhv->bhgqv", p, d_reads, precision=precision)
        return weighted.sum(-1), read

    def add(carry, both):
        d_total, d_out = change(*both, d_state, d_beta)
        return (carry[0] + d_total, carry[1] + d_out), None

    start = vary_together((jnp.zeros_like(total), jnp.zeros_like(out), state))[:2]
    first = size * jnp.arange(stored.shape[0], dtype=jnp.int32)
    tiles = ((first, stored, values, mask), (d_stored, d_values))
    (d_total, d_out), _ = jax.lax.scan(add, start, tiles)
    if sink is not None:
        held = jnp.exp(sink[..., None] - total)
        d_total = d_total + held * d_sink[..., None]
    return (out, total), (d_out - out * d_total[..., None], d_total)
