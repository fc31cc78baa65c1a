"""Comba."""

from typing import ClassVar

import flax.linen as nn

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import MambaGate, l2_normalize
from memseq.layers.delta_rule.delta_net import check_max_beta, write_strength
from memseq.pallas_kernels import delta_rule


@state_dataclass
class CombaState(MatrixState):
    """State of `Comba`."""


class Comba(MatrixLayer):
    """The delta rule as closed-loop control: what the memory held before it decayed is fed back.

        S_t = a_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T,  p_t = sigmoid(b) k_t,
        out_t = S_t^T (q_t - d k_t) / sqrt(key_dim),
        log a_t = -exp(A_log) softplus(W x_t + dt_bias)

    Hu et al. 2025, "Comba", arXiv:2506.02475, equations 9 and 10. b and d are a number a head. Keys
    are unit vectors, queries after their correction; p keeps the factor sigmoid(b), which a norm of
    p would cancel.

    Attributes (beside those of every layer and of `MatrixLayer`):
        correction: where d starts; the paper takes 1, and 0.02 for small models.
        max_beta: largest write strength, in (0, 2].
    """

    output_gate: bool = True
    gate_activation: str = "sigmoid"
    conv_width: int = 4
    correction: float = 1.0
    max_beta: float = 1.0

    PAPER: ClassVar[str] = "Hu et al. 2025, arXiv:2506.02475"
    MEMORY: ClassVar[str] = "matrix [heads, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "delta_rule"
    STATE: ClassVar[type] = CombaState

    def setup(self):
        check_max_beta(self.max_beta)
        self.setup_matrix()
        self.beta = self.dense(self.heads)
        self.decay = self.dense(self.heads)
        self.decay_gate = MambaGate(self.heads)
        ones = nn.initializers.ones
        self.feedback_bias = self.param("feedback_bias", ones, (self.heads,))
        start = nn.initializers.constant(self.correction)
        self.query_bias = self.param("query_bias", start, (self.heads,))

    def gates(self, x):
        _, log_decay = self.decay_gate(self.decay(x))
        return write_strength(self, self.beta(x)), self.sow_decay(log_decay)

    def operate(self, query, key, value, beta, log_decay, **options):
        feedback = nn.sigmoid(self.feedback_bias)[:, None].astype(key.dtype)
        key = l2_normalize(key)
        query = l2_normalize(query) - self.query_bias[:, None].astype(key.dtype) * key
        return delta_rule(
            l2_normalize(query),
            key,
            value,
            beta,
            log_decay,
            erase_key=feedback * key,
            erase="undecayed",
            **options,
        )
