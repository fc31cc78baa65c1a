"""Chunkwise-parallel ridge read-out: conjugate gradients on all steps of a chunk at once.

With G and S the two sums at the chunk's start, D_ij the decay from j to i and x_i what solves
step i's system (von Oswald et al. 2025, arXiv:2506.05233, section 3), a product with that system,

    (G_i + Diag(ridge)) x_i = D_i G x_i + sum_{j<=i} (x_i k_j D_ij beta_j) k_j + ridge * x_i,

is linear attention with keys as values: no step's matrix is ever made. The read-out is the same
sum with values in place of keys.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common import decay
from memseq.pallas_kernels.common.chunks import (
    chunk_length,
    chunk_masks,
    from_chunks,
    to_chunks,
    whole_or_by_stretch,
)
from memseq.pallas_kernels.common.precision import products_precision
from memseq.pallas_kernels.linear_attention.chunked import scan_chunks

HIGHEST = jax.lax.Precision.HIGHEST


def chunked(
    query,
    key,
    value,
    beta,
    log_decay,
    ridge,
    initial_state,
    index,
    *,
    scale,
    iterations,
    chunk_size=None,
):
    """See `ridge_readout` and `reference`; heads equal, padding zeroed."""
    chunk = chunk_length(chunk_size, query.shape[1])
    form = functools.partial(_form, ridge=ridge, scale=scale, iterations=iterations, chunk=chunk)
    arrays = (query, key, value, beta, log_decay)
    return whole_or_by_stretch(form, arrays, initial_state, index, chunk)


def _form(arrays, initial_state, index, *, ridge, scale, iterations, chunk):
    query, key, value, beta, log_decay = arrays
    time, key_dim, dtype = query.shape[1], query.shape[3], initial_state.dtype
    precision = products_precision(query, key, value)
    masks = chunk_masks(index, time, chunk)
    q, k, v, b = (to_chunks(x.astype(dtype), chunk) for x in (query, key, value, beta))

    if log_decay is None:
        weights, start, end = jnp.ones((chunk, chunk), dtype), jnp.ones_like(b), b
        carry = jnp.ones((1, 1, 1), dtype)
    else:
        g = to_chunks(log_decay, chunk)
        weights = decay.masked_exp(decay.pair_sums(g), masks.pairs)
        start = jnp.exp(decay.sums_from_start(g, -1))
        end = b * jnp.exp(decay.sums_to_end(g, -1))
        carry = jnp.exp(g.sum(-1))
    weights = jnp.where(masks.pairs, weights * b[..., None, :], 0)
    start = jnp.where(masks.from_start, start, 0)[..., None]
    end = jnp.where(masks.to_end, end, 0)[..., None]
    carry = jnp.where(masks.carried, carry, 0)[..., None, None]

    # float32 products: a gram of rounded products can have negative eigenvalues
    pairs = jnp.concatenate([k, v], axis=-1)
    written = jnp.einsum("bhnjk,bhnjv->bhnkv", end * k, pairs, precision=HIGHEST)
    starts, state = scan_chunks(carry, written, initial_state)
    gram, memory = starts[..., :key_dim], starts[..., key_dim:]
    ridge = ridge[:, None, None, :]

    def read(x, memory, values, precision):
        past = jnp.einsum("bhnik,bhnkv->bhniv", x, memory, precision=precision)
        scores = weights * jnp.einsum("bhnik,bhnjk->bhnij", x, k, precision=precision)
        own = jnp.einsum("bhnij,bhnjv->bhniv", scores, values, precision=precision)
        return start * past + own

    diagonal = start * jnp.diagonal(gram, axis1=-2, axis2=-1)[..., None, :] + ridge
    diagonal += jnp.einsum("bhnij,bhnjk->bhnik", weights, k * k, precision=HIGHEST)
    solved = jax.lax.custom_linear_solve(
        lambda x: read(x, gram, k, HIGHEST) + ridge * x,
        q,
        functools.partial(conjugate_gradients, diagonal=diagonal, iterations=iterations),
        symmetric=True,
    )
    out = read(solved, memory, v, precision)
    return from_chunks(scale * out, time).astype(value.dtype), state


def conjugate_gradients(
    product: Callable[[jax.Array], jax.Array],
    right: jax.Array,
    *,
    diagonal: jax.Array,
    iterations: int,
) -> jax.Array:
    """x of A x = right for symmetric, positive definite systems A along the last axis.

    product: x -> A x, of all systems; diagonal: of each A, the preconditioner. A system that is
    solved to rounding stays as it is, so that its steps do not depend on other systems.
    """
    # right sides of size one: squares of small cotangents would vanish
    size = jnp.max(jnp.abs(right), axis=-1, keepdims=True)
    size = jnp.where(size > 0, size, 1)
    residual = right / size
    direction = residual / diagonal
    left = jnp.sum(residual * direction, axis=-1, keepdims=True)
    enough = left * jnp.finfo(right.dtype).eps ** 2

    def step(_, carried):
        x, residual, direction, left = carried
        moved = product(direction)
        curvature = jnp.sum(direction * moved, axis=-1, keepdims=True)
        going = (left > enough) & (curvature > 0)
        length = jnp.where(going, left / jnp.where(going, curvature, 1), 0)
        x += length * direction
        residual -= length * moved
        scaled = residual / diagonal
        after = jnp.sum(residual * scaled, axis=-1, keepdims=True)
        ratio = jnp.where(going, after / jnp.where(going, left, 1), 0)
        direction = jnp.where(going, scaled + ratio * direction, direction)
        return x, residual, direction, jnp.where(going, after, left)

    carried = (jnp.zeros_like(right), residual, direction, left)
    return size * jax.lax.fori_loop(0, iterations, step, carried)[0]
