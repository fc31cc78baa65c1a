"""Gated linear attention."""

from typing import ClassVar

import flax.linen as nn
import jax

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import split_heads, widen
from memseq.pallas_kernels import linear_attention
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class GatedLinearAttentionState(MatrixState):
    """State of `GatedLinearAttention`."""


class GatedLinearAttention(MatrixLayer):
    """A matrix memory in which every key channel forgets at its own, data-dependent rate.

        S_t = Diag(a_t) S_{t-1} + k_t v_t^T,  out_t = S_t^T q_t / sqrt(key_dim),
        log a_t = log sigmoid(W2 W1 x_t + b) / gate_normalizer

    Yang et al. 2024, "Gated Linear Attention Transformers", arXiv:2312.06635, equations 4 and 7.
    At the start b is 0: log a is about -0.043 a step.

    Attributes (beside those of every layer and of `MatrixLayer`):
        key_dim: size of a key per head; None is half of features / heads.
        gate_rank: inner size of the decay's projection.
        gate_normalizer: what the log decay is divided by; larger forgets more slowly.
    """

    output_gate: bool = True
    gate_rank: int = 16
    gate_normalizer: float = 16.0

    PAPER: ClassVar[str] = "Yang et al. 2024, arXiv:2312.06635"
    MEMORY: ClassVar[str] = "matrix [heads, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "linear_attention"
    STATE: ClassVar[type] = GatedLinearAttentionState

    def setup(self):
        key_heads, key_dim, _, _ = self.dims()
        check_count("gate_rank", self.gate_rank, 1)
        check_gate_normalizer(self.gate_normalizer)
        self.setup_matrix(activation=None)
        self.decay_in = self.dense(self.gate_rank)
        self.decay_out = self.dense(key_heads * key_dim, use_bias=True)

    @nn.nowrap
    def dims(self):
        key_heads, key_dim, heads, value_dim = super().dims()
        return (
            key_heads,
            max(key_dim // 2, 1) if self.key_dim is None else key_dim,
            heads,
            value_dim,
        )

    def gates(self, x):
        log_decay = sigmoid_decay(self, self.decay_out(self.decay_in(x)))
        return (split_heads(log_decay, self.heads),)

    def operate(self, query, key, value, log_decay, **options):
        return linear_attention(query, key, value, log_decay, **options)


def check_gate_normalizer(gate_normalizer: float) -> None:
    """Raises ValueError unless gate_normalizer > 0."""
    if not gate_normalizer > 0:
        raise ValueError(f"gate_normalizer: expected a positive number, got {gate_normalizer}")


def sigmoid_decay(layer: MatrixLayer, logits: jax.Array) -> jax.Array:
    """log sigmoid(logits) / gate_normalizer, in float32 at least; sows the mean decay."""
    return layer.sow_decay(nn.log_sigmoid(widen(logits)) / layer.gate_normalizer)
