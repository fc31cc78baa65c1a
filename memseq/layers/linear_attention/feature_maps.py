"""Feature maps of linear attention: what queries and keys become, so that a product is a kernel."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class FeatureMap(NamedTuple):
    """One map, on [..., dim].

    size: features for `dim` numbers. signed: products of features can be negative, so that they
    cannot be normalised. make: the map's module from (dim, param_dtype), None for `apply`.
    """

    size: Callable[[int], int]
    apply: Callable[[jax.Array], jax.Array] | None = None
    make: Callable[..., nn.Module] | None = None
    signed: bool = False


class Projected(nn.Module):
    """A map of linear projections of a head's vector, the same for all heads; they start as the
    identity.
    """

    combine: Callable[..., jax.Array]
    projections: tuple[str, ...]
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = x.shape[-1]

        def identity(key, shape, dtype):
            return jnp.eye(*shape, dtype=dtype)

        kernels = (
            self.param(f"{name}_kernel", identity, (dim, dim), self.param_dtype)
            for name in self.projections
        )
        return self.combine(*(x @ kernel.astype(x.dtype) for kernel in kernels))


class Rebased(nn.Module):
    """All products of two numbers of a normed and shifted vector, over sqrt(dim).

    The layer norm has a scale and a bias of its own for queries and for keys. Features of q and k
    multiply to (q . k)^2 / dim (Aksenov et al. 2024, arXiv:2402.10644, section 4). The square of a
    small product is a difference of large features: a normaliser of few keys is inexact.
    """

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normed = nn.LayerNorm(epsilon=1e-5, param_dtype=self.param_dtype)(x)
        return _pairs(normed.astype(x.dtype)) * x.shape[-1] ** -0.5


def dpfp(x: jax.Array, nu: int = 4) -> jax.Array:
    """Products of the positive and negative parts with their neighbours at distance 1 ... nu.

    Schlag et al. 2021, arXiv:2102.11174, equation 37.
    """
    parts = jnp.concatenate([nn.relu(x), nn.relu(-x)], axis=-1)
    return jnp.concatenate([parts * jnp.roll(parts, j, axis=-1) for j in range(1, nu + 1)], axis=-1)


def taylor(x: jax.Array) -> jax.Array:
    """The exponential's series to its second term: features of q and k multiply to 1 + s + s^2 / 2.

    With s = q . k / sqrt(dim). Arora et al. 2024 (Based), arXiv:2402.18668, section 4.1.
    """
    dim = x.shape[-1]
    return jnp.concatenate(
        [jnp.ones_like(x[..., :1]), x * dim**-0.25, _pairs(x) * (2 * dim) ** -0.5], axis=-1
    )


def _pairs(x: jax.Array) -> jax.Array:
    """All products x_i x_j, [..., dim] -> [..., dim * dim]."""
    return (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)


def _hedgehog(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return nn.softmax(jnp.concatenate([2 * wide, -2 * wide], axis=-1), axis=-1).astype(x.dtype)


def _projected(combine: Callable[..., jax.Array], *names: str) -> Callable[..., nn.Module]:
    return lambda param_dtype: Projected(combine, names, param_dtype)


FEATURE_MAPS = {
    "identity": FeatureMap(lambda d: d, lambda x: x, signed=True),
    "elu+1": FeatureMap(lambda d: d, lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))),
    "relu": FeatureMap(lambda d: d, nn.relu),
    "dpfp": FeatureMap(lambda d: 8 * d, dpfp),
    "taylor": FeatureMap(lambda d: 1 + d + d * d, taylor),
    "rebased": FeatureMap(lambda d: d * d, make=lambda param_dtype: Rebased(param_dtype)),
    # Zhang et al. 2024, arXiv:2402.04347, equation 7
    "hedgehog": FeatureMap(lambda d: 2 * d, make=_projected(_hedgehog, "map")),
    # Kasai et al. 2021, arXiv:2103.13076, equation 3
    "t2r": FeatureMap(lambda d: d, make=_projected(nn.relu, "map")),
    "elementwise_product": FeatureMap(
        lambda d: d, make=_projected(jnp.multiply, "first", "second"), signed=True
    ),
}
