"""A dense associative memory of fixed size: patterns as a sum of random features."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.pallas_kernels.common.checks import check_array, check_count

HIGHEST = jax.lax.Precision.HIGHEST


@state_dataclass
class RandomFeatureState:
    """Attributes: memory, float32 [batch, 2 * random_features], sum of the patterns' features."""

    memory: jax.Array


class RandomFeatureMemory(nn.Module):
    """sum_patterns exp(-beta |x - xi|^2 / 2), approximately, in a memory that does not grow.

        phi(x) = (cos(W x), sin(W x)) / sqrt(R),  W ~ N(0, beta) [R, features],
        phi(x) . phi(xi) ~ exp(-beta |x - xi|^2 / 2),   T = sum phi(xi)

    Hoover et al. 2024, arXiv:2410.24153; random features Rahimi and Recht 2007. The relative error
    falls as R ** -0.5. What was written is erased exactly by subtracting it again. W is drawn from
    `seed` and not learned.

    Attributes:
        features: size of a state and a pattern.
        random_features: R.
        beta: inverse temperature.
        seed: of W.
    """

    features: int
    random_features: int = 1024
    beta: float = 1.0
    seed: int = 0

    def init_state(self, batch: int) -> RandomFeatureState:
        """An empty memory."""
        return RandomFeatureState(jnp.zeros((batch, 2 * self.random_features), jnp.float32))

    def encode(self, x: jax.Array) -> jax.Array:
        """phi, float32 at least [batch, n, 2 R], of x [batch, n, features]."""
        check_array("x", x, (None, None, self.features), "[batch, n, features]")
        check_count("random_features", self.random_features, 1)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        shape = (self.features, self.random_features)
        directions = jax.random.normal(jax.random.key(self.seed), shape, jnp.float32)
        angles = jnp.matmul(x, directions.astype(x.dtype), precision=HIGHEST) * self.beta**0.5
        both = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return both * self.random_features**-0.5

    def write(
        self, state: RandomFeatureState, patterns: jax.Array, mask: jax.Array | None = None
    ) -> RandomFeatureState:
        """Adds patterns [batch, n, features] where mask bool [batch, n] is True."""
        return RandomFeatureState(state.memory + self._sum(patterns, mask))

    def erase(
        self, state: RandomFeatureState, patterns: jax.Array, mask: jax.Array | None = None
    ) -> RandomFeatureState:
        """Takes out patterns that were written before."""
        return RandomFeatureState(state.memory - self._sum(patterns, mask))

    def kernel_sum(self, state: RandomFeatureState, x: jax.Array) -> jax.Array:
        """sum_patterns exp(-beta |x - xi|^2 / 2), approximately: [batch, n]."""
        return jnp.einsum("bnr,br->bn", self.encode(x), state.memory, precision=HIGHEST)

    def energy(self, state: RandomFeatureState, x: jax.Array) -> jax.Array:
        """-log(kernel_sum) / beta, [batch, n]; the sum is held above 1e-6."""
        return -jnp.log(jnp.maximum(self.kernel_sum(state, x), 1e-6)) / self.beta

    def retrieve(
        self, state: RandomFeatureState, x: jax.Array, steps: int = 20, step_size: float = 0.5
    ) -> jax.Array:
        """States x [batch, n, features] after `steps` of gradient descent on the energy.

        Near a pattern the energy is beta / 2 times the squared distance over beta: a step_size of
        1 would end in it at once.
        """
        check_count("steps", steps, 1)

        def step(x, _):
            slope = jax.grad(lambda x: self.energy(state, x).sum())(x)
            return x - step_size * slope, None

        return jax.lax.scan(step, x, None, length=steps)[0]

    def _sum(self, patterns, mask):
        encoded = self.encode(patterns)
        if mask is not None:
            encoded = jnp.where(mask[..., None], encoded, 0)
        return encoded.sum(1).astype(jnp.float32)
