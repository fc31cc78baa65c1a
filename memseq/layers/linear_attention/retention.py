"""Linear attention whose heads forget at fixed rates: retention and lightning attention."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memseq.layers.common.base import check_layer_index, enter, state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import count_positions, rotate
from memseq.pallas_kernels import linear_attention


@state_dataclass
class RetentionState(MatrixState):
    """A matrix memory and how far its segment has come.

    Attributes (beside those of `MatrixState`):
        position: int32 [batch], positions of the segment so far.
    """

    position: jax.Array


class Retention(MatrixLayer):
    """A matrix memory a head, each with its own fixed rate of forgetting, and rotary positions.

        S_t = gamma_h S_{t-1} + k_t v_t^T,  out_t = S_t^T q_t / sqrt(key_dim),
        gamma_h = 1 - 2^(-5 - h)

    Sun et al. 2023, "Retentive Network", arXiv:2307.08621, equations 3, 6 and 8. Queries and keys
    are rotated by their position in the segment (the paper's xPos without its scaling, which
    gamma takes over).

    Attributes (beside those of every layer and of `MatrixLayer`):
        value_dim: size of a value per head; None is twice features / heads.
        rope_base: base of the rotation's wavelengths.
    """

    output_gate: bool = True
    rope_base: float = 10_000.0

    PAPER: ClassVar[str] = "Sun et al. 2023, arXiv:2307.08621"
    MEMORY: ClassVar[str] = "matrix [heads, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "linear_attention"
    STATE: ClassVar[type] = RetentionState

    def setup(self):
        if self.dims()[1] % 2:
            raise ValueError(f"key_dim: rotary positions need an even size, got {self.dims()[1]}")
        self.setup_matrix(activation=None)

    @nn.nowrap
    def dims(self):
        key_heads, key_dim, heads, value_dim = super().dims()
        return key_heads, key_dim, heads, 2 * value_dim if self.value_dim is None else value_dim

    @nn.nowrap
    def log_decay(self) -> np.ndarray:
        """[heads], natural logarithms of what each head keeps a step."""
        return np.log1p(-(2.0 ** (-5.0 - np.arange(self.heads))))

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> Any:
        return self.empty_state(batch, position=jnp.zeros((batch,), jnp.int32))

    def mix(self, inputs, state, segment_ids):
        (mixed,) = inputs
        batch, time = mixed.shape[:2]
        state = enter(state, self.init_state(batch), segment_ids)
        query, key, value, conv = self.convolve(mixed, state, segment_ids)
        position, reached = count_positions(state.position, time, segment_ids)
        out, memory = linear_attention(
            rotate(query, position, self.rope_base),
            rotate(key, position, self.rope_base),
            value,
            jnp.asarray(self.log_decay(), jnp.promote_types(mixed.dtype, jnp.float32)),
            initial_state=state.memory,
            **self.operation_options(segment_ids),
        )
        fields = {"memory": memory, "conv": conv, "position": reached}
        return out, self.leave_with(state, segment_ids, **fields)


@state_dataclass
class LightningAttentionState(MatrixState):
    """State of `LightningAttention`."""


class LightningAttention(MatrixLayer):
    """A matrix memory a head, each with its own fixed rate of forgetting, slower in later layers.

        S_t = lambda_h S_{t-1} + k_t v_t^T,  out_t = S_t^T q_t / sqrt(key_dim),
        log lambda_h = -(8 / heads) h (1 - layer_index / num_layers),  h = 0 ... heads - 1

    Qin et al. 2024, "Lightning Attention-2", arXiv:2401.04658, equation 2, with the layer of
    MiniMax-01 (MiniMax 2025, arXiv:2501.08313, section 2.2.1): silu on queries, keys and values,
    RMS norm of the read-out and a sigmoid gate.

    Attributes (beside those of every layer and of `MatrixLayer`):
        layer_index: place of this layer among `num_layers`, from 0.
        num_layers: layers of the model.
    """

    output_gate: bool = True
    gate_activation: str = "sigmoid"
    layer_index: int = 0
    num_layers: int = 1

    PAPER: ClassVar[str] = "Qin et al. 2024, arXiv:2401.04658"
    MEMORY: ClassVar[str] = "matrix [heads, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "linear_attention"
    STATE: ClassVar[type] = LightningAttentionState

    def setup(self):
        check_layer_index(self.layer_index, self.num_layers)
        self.setup_matrix()

    @nn.nowrap
    def log_decay(self) -> np.ndarray:
        """[heads], natural logarithms of what each head keeps a step."""
        slower = 1 - self.layer_index / self.num_layers
        return -8.0 / self.heads * np.arange(self.heads) * slower

    def operate(self, query, key, value, **options):
        dtype = jnp.promote_types(query.dtype, jnp.float32)
        return linear_attention(query, key, value, jnp.asarray(self.log_decay(), dtype), **options)
