"""Inverse of a unit lower-triangular matrix by block doubling."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.products import weighted

_HIGHEST = jax.lax.Precision.HIGHEST


@jax.custom_jvp
def unit_lower_inverse(a: jax.Array) -> jax.Array:
    """(I + tril(a, -1))^-1 for a [..., n, n], n a power of two, float32 or float64.

    Doubles the size of solved diagonal blocks: the inverse of [[1, 0], [x, 1]] with inverted
    diagonal blocks p, q is [[p, 0], [-q x p, q]]. As accurate as forward substitution for any a;
    Neumann squaring is not: for correlated keys its powers of `a` grow before they vanish.
    """
    n = a.shape[-1]
    if n & (n - 1):
        raise ValueError(f"unit_lower_inverse needs a power of two as size, got {n}")
    inverse = jnp.ones((*a.shape[:-2], n, 1, 1), a.dtype)
    size = 1
    while size < n:
        pairs = n // (2 * size)
        lower = diagonal_blocks(a, size)
        top, bottom = jnp.split(inverse.reshape(*a.shape[:-2], pairs, 2, size, size), 2, axis=-3)
        top, bottom = top[..., 0, :, :], bottom[..., 0, :, :]
        product = jnp.einsum("...ij,...jk->...ik", bottom, lower, precision=_HIGHEST)
        product = jnp.einsum("...ij,...jk->...ik", product, top, precision=_HIGHEST)
        inverse = assemble_halves(top, -product, bottom)
        size *= 2
    return inverse[..., 0, :, :]


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    (a,), (da,) = primals, tangents
    inverse = unit_lower_inverse(a)
    da = jnp.tril(da, -1)
    return inverse, -weighted(weighted(inverse, da, _HIGHEST), inverse, _HIGHEST)


def diagonal_blocks(a: jax.Array, size: int) -> jax.Array:
    """The lower-left quarters of the diagonal blocks of 2 x size: [..., n / 2size, size, size]."""
    n = a.shape[-1]
    pairs = n // (2 * size)
    blocks = a.reshape(*a.shape[:-2], pairs, 2, size, pairs, 2, size)[..., 1, :, :, 0, :]
    return jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)


def assemble_halves(top: jax.Array, lower: jax.Array, bottom: jax.Array) -> jax.Array:
    """[..., s, s] quarters to [..., 2s, 2s]: [[top, 0], [lower, bottom]]."""
    upper = jnp.concatenate([top, jnp.zeros_like(top)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([lower, bottom], axis=-1)], axis=-2)
