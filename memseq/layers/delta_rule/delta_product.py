"""DeltaProduct: several steps of the delta rule a token."""

from typing import ClassVar

import flax.linen as nn

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.interleave import at_step, repeat_ids, taken_at
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import MambaGate, l2_normalize
from memseq.layers.delta_rule.delta_net import check_max_beta, write_strength
from memseq.pallas_kernels import delta_rule
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class DeltaProductState(MatrixState):
    """State of `DeltaProduct`."""


class DeltaProduct(MatrixLayer):
    """A matrix memory that a token corrects under several keys, one after another.

        S <- S + beta_{t,i} k_{t,i} (v_{t,i} - S^T k_{t,i})^T for i = 1 ... steps,
        out_t = S_t^T q_t / sqrt(key_dim)

    Siems et al. 2025, "DeltaProduct", arXiv:2502.10297, equation 3. The transition of a token is a
    product of `steps` generalised Householder matrices: with max_beta 2 and two of them it can
    rotate, and track words of groups such as S3 that one cannot.

    Attributes (beside those of every layer and of `MatrixLayer`):
        steps: keys, values and write strengths a token; 1 is DeltaNet.
        max_beta: largest write strength, in (0, 2]: 1 replaces, 2 reflects.
    """

    conv_width: int = 4
    steps: int = 2
    max_beta: float = 2.0

    PAPER: ClassVar[str] = "Siems et al. 2025, arXiv:2502.10297"
    MEMORY: ClassVar[str] = "matrix [heads, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "delta_rule"
    STATE: ClassVar[type] = DeltaProductState

    def setup(self):
        check_count("steps", self.steps, 1)
        check_max_beta(self.max_beta)
        self.setup_matrix()
        self.beta = self.dense(self.steps * self.heads)

    @nn.nowrap
    def writes(self) -> int:
        return self.steps

    def gates(self, x):
        return (write_strength(self, self.beta(x)),)

    def operate(self, query, key, value, beta, log_decay=None, *, segment_ids, **options):
        batch, time = query.shape[:2]

        def one_after_another(x):
            """[batch, time, steps * heads, ...] -> [batch, time * steps, heads, ...]."""
            return x.reshape(batch, time * self.steps, self.heads, *x.shape[3:])

        last = self.steps - 1
        out, memory = delta_rule(
            at_step(l2_normalize(query), last, self.steps),
            one_after_another(l2_normalize(key)),
            one_after_another(value),
            one_after_another(beta),
            None if log_decay is None else at_step(log_decay, 0, self.steps),
            segment_ids=repeat_ids(segment_ids, self.steps),
            **options,
        )
        return taken_at(out, last, self.steps), memory


@state_dataclass
class GatedDeltaProductState(MatrixState):
    """State of `GatedDeltaProduct`."""


class GatedDeltaProduct(DeltaProduct):
    """DeltaProduct whose memory decays once a token, before its first step.

    log a_t = -exp(A_log) softplus(W x_t + dt_bias), one a head, as in Gated DeltaNet. Siems et al.
    2025, arXiv:2502.10297, section 3. Attributes as `DeltaProduct`.
    """

    output_gate: bool = True

    STATE: ClassVar[type] = GatedDeltaProductState

    def setup(self):
        super().setup()
        self.decay = self.dense(self.heads)
        self.decay_gate = MambaGate(self.heads)

    def gates(self, x):
        _, log_decay = self.decay_gate(self.decay(x))
        return *super().gates(x), self.sow_decay(log_decay)
