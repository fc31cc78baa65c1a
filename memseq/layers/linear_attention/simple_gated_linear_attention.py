"""Gated linear attention with one gate a head."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.pallas_kernels import linear_attention


@state_dataclass
class SimpleGatedLinearAttentionState(MatrixState):
    """State of `SimpleGatedLinearAttention`."""


class SimpleGatedLinearAttention(MatrixLayer):
    """A matrix memory that forgets as a whole, at a rate that depends on the input.

        S_t = a_t S_{t-1} + k_t v_t^T,  out_t = S_t^T q_t / sqrt(key_dim),
        log a_t = log sigmoid(W x_t) / gate_normalizer

    The scalar case of Yang et al. 2024, arXiv:2312.06635, section 4.1 (its table 1 lists it as the
    recurrence of Mamba-2 and RetNet too), with the short convolution that later layers have.

    Attributes (beside those of every layer and of `MatrixLayer`):
        gate_normalizer: what the log decay is divided by; larger forgets more slowly.
    """

    output_gate: bool = True
    conv_width: int = 4
    gate_normalizer: float = 16.0

    PAPER: ClassVar[str] = "Yang et al. 2024, arXiv:2312.06635"
    MEMORY: ClassVar[str] = "matrix [heads, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "linear_attention"
    STATE: ClassVar[type] = SimpleGatedLinearAttentionState

    def setup(self):
        if not self.gate_normalizer > 0:
            raise ValueError(
                f"gate_normalizer: expected a positive number, got {self.gate_normalizer}"
            )
        self.setup_matrix()
        self.decay = self.dense(self.heads)

    def project(self, x):
        gate = self.decay(x)
        gate = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
        log_decay = nn.log_sigmoid(gate) / self.gate_normalizer
        self.sow("intermediates", "mean_decay", jnp.exp(log_decay).mean())
        return self.project_all(x), log_decay

    def mix(self, inputs, state, segment_ids):
        mixed, log_decay = inputs
        state = enter(state, self.init_state(mixed.shape[0]), segment_ids)
        query, key, value, conv = self.convolve(mixed, state, segment_ids)
        out, memory = linear_attention(
            query,
            key,
            value,
            log_decay,
            initial_state=state.memory,
            **self.operation_options(segment_ids),
        )
        return out, self.leave_with(memory, conv, state, segment_ids)
