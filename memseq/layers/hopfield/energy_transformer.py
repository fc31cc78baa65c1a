"""The Energy Transformer block: a step down one energy of attention and of a Hopfield network."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.parts import hidden, split_heads
from memseq.pallas_kernels import hopfield_retrieve
from memseq.pallas_kernels.common.checks import check_array, check_count
from memseq.pallas_kernels.common.precision import products_precision


class Kernel(nn.Module):
    """A matrix [inputs, outputs] for use inside a derivative, where modules cannot be called."""

    inputs: int
    outputs: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> jax.Array:
        shape, start = (self.inputs, self.outputs), nn.initializers.lecun_normal()
        kernel = self.param("kernel", start, shape, self.param_dtype)
        return kernel if self.dtype is None else kernel.astype(self.dtype)


class EnergyTransformerBlock(nn.Module):
    """Gradient descent on an energy of all tokens (Hoover et al. 2023, arXiv:2302.07253).

        g = scale (x - mean x) / sqrt(var x + eps) + bias,   scale one number
        E(g) = -sum_{heads, q} log sum_k exp(beta (W_Q g_q) . (W_K g_k)) / beta
               - sum relu(g Xi)^2 / 2
        x <- x - step_size dE / dg       (`steps` times, the same weights)

    (equations 1 to 6). There are no values: the gradient has a second term, of the tokens that
    attend to a token. Because the norm's own derivative is positive, E falls along the flow of x,
    and with each step if step_size is small.

    Attributes:
        features, heads, implementation, chunk_size, dtype, param_dtype: as in every layer.
        head_dim: of query and key per head; None is features / heads.
        memories: patterns of the Hopfield network; None is 4 x features.
        beta: inverse temperature; None is head_dim ** -0.5.
        steps: of the descent.
        step_size: of each.
        exclude_self: a token does not attend to itself, as in the paper.
    """

    features: int
    heads: int = 4
    implementation: str = "auto"
    chunk_size: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    head_dim: int | None = None
    memories: int | None = None
    beta: float | None = None
    steps: int = 12
    step_size: float = 0.1
    exclude_self: bool = True

    PAPER: ClassVar[str] = "Hoover et al. 2023, arXiv:2302.07253"
    MEMORY: ClassVar[str] = "learned patterns [memories, features], and the set itself"
    OPERATION: ClassVar[str] = "hopfield_retrieve"

    def setup(self):
        check_count("heads", self.heads, 1)
        check_count("steps", self.steps, 1)
        head_dim = self._head_dim()
        memories = 4 * self.features if self.memories is None else self.memories
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.query = Kernel(self.features, self.heads * head_dim, **options)
        self.key = Kernel(self.features, self.heads * head_dim, **options)
        self.memory = Kernel(self.features, memories, **options)
        self.scale = self.param("scale", nn.initializers.ones, (), self.param_dtype)
        self.bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)

    @nn.nowrap
    def _head_dim(self):
        check_count("head_dim", self.head_dim, 1, optional=True)
        if self.head_dim is not None:
            return self.head_dim
        if self.features % self.heads:
            raise ValueError(
                f"heads: features {self.features} must be a multiple of it, or head_dim be given; "
                f"got heads {self.heads}"
            )
        return self.features // self.heads

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """y [batch, n, features] of tokens x, mask bool [batch, n], True takes part."""
        return self.descend(x, mask)[0]

    def descend(
        self, x: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The descent step by step.

        Returns:
            (y, energies [batch, steps + 1] before each step and after the last, tokens
            [batch, steps + 1, n, features] at the same times).
        """
        check_array("x", x, (None, None, self.features), "[batch, n, features]")
        x = hidden(x, mask)
        dtype = x.dtype if self.dtype is None else self.dtype
        kernels = self.query(), self.key(), self.memory()

        def step(x, _):
            g = self.normalize(x)
            energy, pull = jax.vjp(lambda g: self.energy(g, mask, kernels), g)
            slope = pull(jnp.ones_like(energy))[0]
            slope = hidden(slope, mask)
            return (x - self.step_size * slope).astype(dtype), (energy, x)

        y, (energies, tokens) = jax.lax.scan(step, x.astype(dtype), None, length=self.steps)
        last = self.energy(self.normalize(y), mask, kernels)
        energies = jnp.concatenate([energies, last[None]]).T
        tokens = jnp.moveaxis(jnp.concatenate([tokens, y[None]]), 0, 1)
        return hidden(y, mask), energies, tokens

    def normalize(self, x: jax.Array) -> jax.Array:
        """g of tokens x, in float32 at least."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - wide.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        return self.scale * centred * jax.lax.rsqrt(variance + 1e-5) + self.bias

    def energy(self, g: jax.Array, mask: jax.Array | None = None, kernels=None) -> jax.Array:
        """E [batch] of normed tokens g [batch, n, features]; masked tokens have no part in it.

        kernels: of query, key and memory; None is the layer's own.
        """
        of_query, of_key, of_memory = kernels or (self.query(), self.key(), self.memory())
        precision = products_precision(of_query)
        narrow = g.astype(of_query.dtype if self.dtype is not None else g.dtype)
        query, key = (
            split_heads(jnp.matmul(narrow, kernel, precision=precision), self.heads)
            for kernel in (of_query, of_key)
        )
        part = jnp.ones((1, 1, 1), bool) if mask is None else mask[:, None, :]
        if self.exclude_self:
            part = part & ~jnp.eye(g.shape[1], dtype=bool)
        part = jnp.broadcast_to(part, (g.shape[0], g.shape[1], g.shape[1]))
        _, attention = hopfield_retrieve(
            query,
            key,
            beta=self.beta,
            mask=part,
            return_energy=True,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        # the operation's energy has the state's own square beside log-sum-exp
        wide = query.astype(attention.dtype)
        attention = (attention[..., 0] - (wide * wide).sum(-1) / 2).sum(-1)
        recalled = nn.relu(jnp.matmul(narrow, of_memory, precision=precision))
        recalled = recalled.astype(attention.dtype)
        energy = attention - (recalled * recalled).sum(-1) / 2
        return (energy if mask is None else jnp.where(mask, energy, 0)).sum(-1)
