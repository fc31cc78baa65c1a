"""U-Hop: retrieval in the space of a learned map that keeps stored patterns apart."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from memseq.layers.hopfield.hopfield import Hopfield


class UHopfield(Hopfield):
    """Similarity of W x and W y instead of x and y (Wu et al. 2024, arXiv:2404.03827, section 2).

        out = softmax(beta (W x) . (W y)) y

    The patterns that are read are not mapped, and a step lowers the energy in the norm of W^T W.
    W is trained first, to keep what is stored apart: minimise `separation_loss`.
    """

    heads: int = 1
    project: tuple[bool, bool, bool, bool] = (True, True, False, False)
    shared_map: bool = True
    normalize: tuple[bool, bool, bool] = (False, False, False)

    PAPER: ClassVar[str] = "Wu et al. 2024, arXiv:2404.03827"

    def separation_loss(
        self, stored: jax.Array, mask: jax.Array | None = None, temperature: float = 2.0
    ) -> jax.Array:
        """`separation_loss` of the mapped patterns, [batch], of stored [batch, patterns, dim]."""
        state = self.store(stored, None, mask)
        return separation_loss(state.key[:, :, 0], state.mask, temperature)


def separation_loss(
    patterns: jax.Array, mask: jax.Array | None = None, temperature: float = 2.0
) -> jax.Array:
    """How close patterns are on the unit sphere: log mean_{i != j} exp(-t |u_i - u_j|^2).

    Wu et al. 2024, arXiv:2404.03827, equation 3.1 (the uniformity loss of Wang and Isola 2020,
    arXiv:2005.10242); its minimum is an optimal spherical code (arXiv:2410.23126).

    Args:
        patterns: [batch, patterns, dim]; each is divided by its norm.
        mask: bool [batch, patterns], True takes part.
        temperature: t.

    Returns:
        The loss [batch], at most 0; 0 with fewer than two patterns.
    """
    wide = patterns.astype(jnp.promote_types(patterns.dtype, jnp.float32))
    unit = wide * jax.lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + 1e-12)
    products = jnp.einsum("bnd,bmd->bnm", unit, unit, precision=jax.lax.Precision.HIGHEST)
    pairs = ~jnp.eye(patterns.shape[1], dtype=bool)
    if mask is not None:
        pairs &= mask[:, :, None] & mask[:, None, :]
    pairs = jnp.broadcast_to(pairs, products.shape)
    count = pairs.sum((1, 2))
    near = jax.nn.logsumexp(
        jnp.where(pairs, -2 * temperature * (1 - products), -jnp.inf),
        axis=(1, 2),
        where=pairs | (count == 0)[:, None, None],
    )
    return jnp.where(count > 0, near - jnp.log(jnp.maximum(count, 1)), 0)
