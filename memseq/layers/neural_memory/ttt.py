"""TTT: memories trained by mini-batch gradient descent, a matrix or a two-layer network."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.parts import merge_heads, rotate
from memseq.layers.neural_memory.neural_memory import NeuralMemory, NeuralMemoryState
from memseq.pallas_kernels.common.segments import Segments, segment_positions, segments


@state_dataclass
class TTTLinearState(NeuralMemoryState):
    """State of `TTTLinear`."""


class TTTLinear(NeuralMemory):
    """A matrix a head, trained to reconstruct values from keys in mini-batches of 16.

        M(x; W, b) = x + norm(x W + b),  (W, b)_i = (W, b)_0 - r_i sum_{j<=i} step_j grad_j,
        grad_j = gradient at (W, b)_0 of |M(k_j) - v_j|^2 / 2,  r_i = max(1 / i + learned_i, 0)

    with i from 1 within each mini-batch (`update_chunk`), whose last (W, b) the next one starts
    from. Sun et al. 2024, arXiv:2407.04620, section 2.4 and appendix, in the form of the authors'
    JAX code: step_j = max_step sigmoid(w x_j + c) / head_dim, rotary positions that count within
    the mini-batch, norms' scale and offset learned, W_0 normal of deviation 0.02. Queries and keys
    have projections of their own and no convolution, as in the authors' Transformer backbone; the
    read-out has a layer norm over all heads and a gate with GELU. Attributes as `NeuralMemory`.
    """

    conv_width: int = 0
    conv_activation: str | None = None
    output_norm: bool = False
    depth: int = 1
    memory_bias: bool = True
    initial_std: float | None = 0.02
    use_keep: bool = False
    use_momentum: bool = False
    initial_step: float = 0.5
    unit_keys: bool = False

    PAPER: ClassVar[str] = "Sun et al. 2024, arXiv:2407.04620"
    STATE: ClassVar[type] = TTTLinearState

    def setup(self):
        super().setup()
        zeros = nn.initializers.zeros
        self.share_bias = self.param("share_bias", zeros, (self.update_chunk,), jnp.float32)
        self.post_norm = nn.LayerNorm(1e-6, dtype=self.dtype, param_dtype=self.param_dtype)

    def map_keys(self, query, key, state, segment_ids):
        batch, time = query.shape[:2]
        if query.shape[3] % 2:
            raise ValueError(f"key_dim: rotary positions need an even size, got {query.shape[3]}")
        segs = Segments(jnp.ones((batch, time), bool), jnp.zeros((batch, time), jnp.int32))
        if segment_ids is not None:
            segs = segments(segment_ids)
        before = jnp.where(segs.index == 0, jnp.maximum(state.held.position, 0)[:, None], 0)
        position = (segment_positions(segs) + before) % self.update_chunk
        return rotate(query, position, 10_000.0), rotate(key, position, 10_000.0)

    def remember(self, query, key, value, gates, held, segment_ids, **options: Any):
        share = 1 / jnp.arange(1, self.update_chunk + 1, dtype=self.share_bias.dtype)
        share = jnp.maximum(share + self.share_bias, 0)
        options = {"position_scale": share} | options
        return super().remember(query, key, value, gates, held, segment_ids, **options)

    def finish(self, x: jax.Array, out: jax.Array) -> jax.Array:
        return self.output(self.post_norm(merge_heads(out)) * nn.gelu(self.gate(x)))


@state_dataclass
class TTTMLPState(NeuralMemoryState):
    """State of `TTTMLP`."""


class TTTMLP(TTTLinear):
    """`TTTLinear` with a network of two layers, four times as wide between them, with GELU.

    Sun et al. 2024, arXiv:2407.04620, section 2.4; its largest step is 0.1, which the authors
    approach from 0.01 in the first tenth of training (a schedule that is not part of the layer).
    """

    depth: int = 2
    max_step: float = 0.1

    STATE: ClassVar[type] = TTTMLPState
