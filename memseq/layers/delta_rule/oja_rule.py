"""Oja's rule: the delta rule with the roles of key and value exchanged."""

from typing import ClassVar

import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.interleave import at_step, repeat_ids, taken_at
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import l2_normalize, widen
from memseq.layers.delta_rule.delta_net import check_max_beta, write_strength
from memseq.layers.delta_rule.kimi_delta_attention import ChannelGate
from memseq.pallas_kernels import delta_rule, linear_attention
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class OjaRuleState(MatrixState):
    """State of `OjaRule`."""


class OjaRule(MatrixLayer):
    """A matrix memory that corrects which key it holds under a value.

        S'_t = S_{t-1} Diag(a_t),  S_t = S'_t + beta_t (k_t - S'_t v_t) v_t^T,
        out_t = S_t^T q_t / sqrt(key_dim),  log a_t = -exp(A_log) softplus(W2 W1 x_t + dt_bias)

    Oja 1982, "A simplified neuron model as a principal component analyzer", J. Math. Biology 15, as
    a rule for fast weights (Irie et al. 2022, arXiv:2206.01649), with a decay of value
    channels. Queries, keys and values are unit vectors: those of values keep the memory bounded.

    The errors k - S' v are the delta rule's, of the transposed memory; the read-out is linear
    attention over them. Each token takes the delta rule two steps: one that decays and reads, one
    that writes.

    Attributes (beside those of every layer and of `MatrixLayer`):
        gate_rank: inner size of the decay's projection; None is value_dim.
        max_beta: largest write strength, in (0, 2].
    """

    output_gate: bool = True
    conv_width: int = 4
    gate_rank: int | None = None
    max_beta: float = 1.0

    PAPER: ClassVar[str] = "Irie et al. 2022, arXiv:2206.01649"
    MEMORY: ClassVar[str] = "matrix [heads, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "delta_rule"
    STATE: ClassVar[type] = OjaRuleState

    def setup(self):
        check_max_beta(self.max_beta)
        check_count("gate_rank", self.gate_rank, 1, optional=True)
        _, _, heads, value_dim = self.dims()
        self.setup_matrix()
        self.beta = self.dense(heads)
        self.decay_in = self.dense(value_dim if self.gate_rank is None else self.gate_rank)
        self.decay_out = self.dense(heads * value_dim)
        self.decay_gate = ChannelGate(heads, value_dim)

    def gates(self, x):
        log_decay = self.sow_decay(self.decay_gate(self.decay_out(self.decay_in(x))))
        return write_strength(self, self.beta(x)), log_decay

    def operate(self, query, key, value, beta, log_decay, *, initial_state, segment_ids, **options):
        query, key, value = (l2_normalize(x) for x in (query, key, value))
        wide = widen(key)  # so that what is read leaves in float32, and errors are taken in it
        read, transposed = delta_rule(
            at_step(value, 0, 2),
            at_step(value, 1, 2),
            at_step(wide, 1, 2),
            at_step(beta, 1, 2),
            at_step(log_decay, 0, 2),
            scale=1.0,
            initial_state=jnp.swapaxes(initial_state, -1, -2),
            segment_ids=repeat_ids(segment_ids, 2),
            **options,
        )
        error = beta[..., None] * (wide - taken_at(read, 0, 2))
        out, _ = linear_attention(
            query,
            error.astype(query.dtype),
            value,
            value_log_decay=log_decay,
            initial_state=initial_state,
            segment_ids=segment_ids,
            **options,
        )
        return out, jnp.swapaxes(transposed, -1, -2)
