"""What is the same on every TPU that the kernels are for."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

LANES = 128
SUBLANES = 8  # of 32-bit numbers in a register
VMEM_LIMIT = 56 * 2**20  # bytes; v5e and v5p grant 16 MiB unasked, every target has at least 64


def kernel_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What an array of this dtype is in a kernel: TPUs know no float16."""
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def operands_vjp(make: Callable, arrays: tuple) -> tuple:
    """(made, pull, rest) of `make(arrays) -> (made, rest)`, by the arrays that are floating.

    pull(cotangents of made): one cotangent for each of `arrays`, None for integers, booleans, None.
    """
    places = [x is not None and jnp.issubdtype(x.dtype, jnp.inexact) for x in arrays]

    def of_floating(*known):
        left = iter(known)
        return make(tuple(next(left) if own else x for own, x in zip(places, arrays, strict=True)))

    known = (x for own, x in zip(places, arrays, strict=True) if own)
    made, pull, rest = jax.vjp(of_floating, *known, has_aux=True)

    def pull_all(cotangents):
        left = iter(pull(cotangents))
        return tuple(next(left) if own else None for own in places)

    return made, pull_all, rest
