"""A digest of arrays that does not depend on how they are spread over devices."""

import jax
import jax.numpy as jnp


def digest(arrays: dict[str, jax.Array]) -> tuple[dict[str, str], list[str]]:
    """({name: 64-bit digest in hexadecimal}, names of the arrays that are not finite).

    Computed on the devices that hold the arrays, whatever their sharding: a sum over all 32-bit
    words of a hash of word and position. A change of any single word changes it with certainty.
    """
    sums, finite = jax.device_get(_digest(arrays))
    texts = {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in sums.items()}
    return texts, [name for name, ok in finite.items() if not ok]


@jax.jit
def _digest(arrays):
    return {k: _hash_sum(x) for k, x in arrays.items()}, {
        k: _is_finite(x) for k, x in arrays.items()
    }


def _hash_sum(x: jax.Array) -> jax.Array:
    words = _words(x)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    lanes = [_mix(words ^ _mix(index ^ jnp.uint32(seed))) for seed in (0x243F6A88, 0xB7E15163)]
    return jnp.stack([jnp.sum(lane, dtype=jnp.uint32) for lane in lanes])


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32; narrower numbers take one word each, wider ones several."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x).astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of 32-bit words that spreads every bit over all (the last step of murmur3)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.asarray(True)
