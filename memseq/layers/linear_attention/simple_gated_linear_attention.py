"""Gated linear attention with one gate a head."""

from typing import ClassVar

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.linear_attention.gated_linear_attention import (
    check_gate_normalizer,
    sigmoid_decay,
)
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
        check_gate_normalizer(self.gate_normalizer)
        self.setup_matrix()
        self.decay = self.dense(self.heads)

    def gates(self, x):
        return (sigmoid_decay(self, self.decay(x)),)

    def operate(self, query, key, value, log_decay, **options):
        return linear_attention(query, key, value, log_decay, **options)
