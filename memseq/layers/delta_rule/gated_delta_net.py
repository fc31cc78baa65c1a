"""Gated DeltaNet."""

from typing import ClassVar

import flax.linen as nn

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import MambaGate, l2_normalize
from memseq.layers.delta_rule.delta_net import check_max_beta, write_strength
from memseq.pallas_kernels import delta_rule
from memseq.pallas_kernels.common.checks import check_count, check_heads


@state_dataclass
class GatedDeltaNetState(MatrixState):
    """State of `GatedDeltaNet`."""


class GatedDeltaNet(MatrixLayer):
    """The delta rule on a memory that can also forget everything at once.

        S'_t = a_t S_{t-1},  S_t = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T,
        out_t = S_t^T q_t / sqrt(key_dim),  log a_t = -exp(A_log) softplus(W x_t + dt_bias)

    Yang et al. 2025, "Gated Delta Networks", arXiv:2412.06464, equation 10 and section 3.4.

    Attributes (beside those of every layer and of `MatrixLayer`):
        key_dim: size of a key per head; None is 3/4 of features / heads.
        value_dim: size of a value per value head; None is twice the key's.
        value_heads: a multiple of `heads`; several value heads, each with its own memory, decay
            and write strength, then share a query and key head. None is `heads`.
        max_beta: largest write strength, in (0, 2]: 1 replaces, 2 reflects.
    """

    output_gate: bool = True
    conv_width: int = 4
    value_heads: int | None = None
    max_beta: float = 1.0

    PAPER: ClassVar[str] = "Yang et al. 2025, arXiv:2412.06464"
    MEMORY: ClassVar[str] = "matrix [value_heads, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "delta_rule"
    STATE: ClassVar[type] = GatedDeltaNetState

    def setup(self):
        check_max_beta(self.max_beta)
        value_heads = self.dims()[2]
        check_heads(self.heads, value_heads, "value_heads")
        self.setup_matrix()
        self.beta = self.dense(value_heads)
        self.decay = self.dense(value_heads)
        self.decay_gate = MambaGate(value_heads)

    @nn.nowrap
    def dims(self):
        key_dim = self.split_features("key_dim", self.key_dim)
        if self.key_dim is None:
            key_dim = max(3 * key_dim // 4, 1)
        value_dim = 2 * key_dim if self.value_dim is None else self.value_dim
        value_dim = self.split_features("value_dim", value_dim)
        value_heads = self.heads if self.value_heads is None else self.value_heads
        check_count("value_heads", value_heads, 1)
        return self.heads, key_dim, value_heads, value_dim

    def gates(self, x):
        _, log_decay = self.decay_gate(self.decay(x))
        return write_strength(self, self.beta(x)), self.sow_decay(log_decay)

    def operate(self, query, key, value, beta, log_decay, **options):
        query, key = l2_normalize(query), l2_normalize(key)
        return delta_rule(query, key, value, beta, log_decay, **options)
