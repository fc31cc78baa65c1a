"""Stacks of small matrix products, laid out for a CPU in the backward pass too.

XLA gives a CPU's cores together to a stack of products if the left matrix is contracted over its
last axis, and takes it on one core, at a third of the speed, if over the first. The backward pass
of a product is such a one, so the derivatives here transpose that matrix in memory first. Each
tangent is a product with the tangent on the left: its transpose, which is what the backward pass
computes, then has its operands in the order wanted. Forward mode and higher derivatives are those
of any product.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def scores(a: jax.Array, b: jax.Array, precision: jax.lax.Precision) -> jax.Array:
    """a b^T: [..., i, d], [..., j, d] -> [..., i, j]."""
    return jnp.einsum("...id,...jd->...ij", a, b, precision=precision)


@scores.defjvp
def _scores_jvp(precision, primals, tangents):
    (a, b), (da, db) = primals, tangents
    by_column = _swap(_in_memory(jnp.einsum("...jd,...id->...ji", db, a, precision=precision)))
    left = jnp.einsum("...id,...jd->...ij", da, b, precision=precision)
    return scores(a, b, precision), left + by_column


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def weighted(a: jax.Array, b: jax.Array, precision: jax.lax.Precision) -> jax.Array:
    """a b: [..., i, j], [..., j, d] -> [..., i, d]."""
    return jnp.einsum("...ij,...jd->...id", a, b, precision=precision)


@weighted.defjvp
def _weighted_jvp(precision, primals, tangents):
    (a, b), (da, db) = primals, tangents
    right = jnp.einsum("...jd,...ji->...di", db, _in_memory(_swap(a)), precision=precision)
    left = jnp.einsum("...ij,...jd->...id", da, b, precision=precision)
    return weighted(a, b, precision), left + _swap(right)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def outer_sum(a: jax.Array, b: jax.Array, precision: jax.lax.Precision) -> jax.Array:
    """a^T b: [..., i, d], [..., i, e] -> [..., d, e]."""
    return jnp.einsum("...di,...ie->...de", _in_memory(_swap(a)), b, precision=precision)


@outer_sum.defjvp
def _outer_sum_jvp(precision, primals, tangents):
    (a, b), (da, db) = primals, tangents
    right = jnp.einsum("...ie,...id->...ed", db, a, precision=precision)
    left = jnp.einsum("...id,...ie->...de", da, b, precision=precision)
    return outer_sum(a, b, precision), left + _swap(right)


def _swap(x):
    return jnp.swapaxes(x, -1, -2)


def _in_memory(x):
    """x as it is, not as another array's transpose, on a CPU."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
