"""OmegaNet: a memory that learns from a window of tokens at once, with polynomial keys."""

import itertools
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.parts import l2_normalize, widen
from memseq.layers.neural_memory.neural_memory import NeuralMemory, NeuralMemoryState
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class OmegaNetState(NeuralMemoryState):
    """State of `OmegaNet`. It also holds the last window - 1 keys, mapped, and values."""


class OmegaNet(NeuralMemory):
    """A memory whose every step reduces the error on the last few tokens, not on one.

        W_t = keep_t W_{t-1} - sum_{i = t - window + 1 ... t} step_ti grad |M(p(k_i)) - v_i|^2

    with p(k) the products of up to `degree` of k's entries, those of j entries times a learned
    number that starts at 1 / j!. Behrouz et al. 2025, "Atlas", arXiv:2505.23735, equations 9 and
    25. Read so, where the paper is open: the window is 4 (the paper tries 2 to 16) and reaches
    over chunk borders, the gradients of all its tokens taken at the present chunk's start; degree
    2 of 16 channels, (16 + 2) choose 2 = 153 inputs of the network; no residual, since p(k) has
    another size than a value; the norm stands in the network and not at the ends of chunks.
    Attributes as `NeuralMemory`, and degree: 1 takes keys as they are, with a constant.
    """

    key_dim: int | None = 16
    degree: int = 2
    window: int = 4
    residual: bool = False
    use_momentum: bool = False

    PAPER: ClassVar[str] = "Behrouz et al. 2025, arXiv:2505.23735"
    STATE: ClassVar[type] = OmegaNetState

    def setup(self):
        super().setup()

        def inverse_factorials(key, shape, dtype):
            return jnp.array([1 / math.factorial(i) for i in range(shape[0])], dtype)

        self.degree_scale = self.param(
            "degree_scale", inverse_factorials, (self.degree + 1,), jnp.float32
        )

    @nn.nowrap
    def input_dim(self):
        check_count("degree", self.degree, 1)
        return math.comb(self.dims()[1] + self.degree, self.degree)

    def map_keys(self, query, key, state, segment_ids):
        return self.monomials(query), self.monomials(key)

    def monomials(self, x: jax.Array) -> jax.Array:
        """p(x / |x|): [..., key_dim] to [..., input_dim], in float32 at least."""
        x = widen(l2_normalize(x))
        columns = range(x.shape[-1])
        parts = [jnp.broadcast_to(self.degree_scale[0], (*x.shape[:-1], 1))]
        for degree in range(1, self.degree + 1):
            chosen = jnp.array(list(itertools.combinations_with_replacement(columns, degree)))
            parts.append(self.degree_scale[degree] * jnp.prod(x[..., chosen], axis=-1))
        return jnp.concatenate(parts, axis=-1)
