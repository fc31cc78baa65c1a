"""Longhorn."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import widen
from memseq.pallas_kernels import delta_rule


@state_dataclass
class LonghornState(MatrixState):
    """State of `Longhorn`."""


class Longhorn(MatrixLayer):
    """Each step solves an online regression exactly: stay close to the memory, fit the new pair.

        S_t = argmin |S - S_{t-1}|^2 + beta_t |S^T k_t - v_t|^2
            = S_{t-1} + step_t k_t (v_t - S_{t-1}^T k_t)^T,  step_t = beta_t / (1 + beta_t |k_t|^2),
        out_t = S_t^T q_t / sqrt(key_dim),  beta_t = sigmoid(W x_t)

    Liu et al. 2024, "Longhorn: State Space Models are Amortized Online Learners",
    arXiv:2407.14207, theorem 3.1, with a beta for each head. The paper has one for each value
    channel and keeps of k k^T only the diagonal, so that its recurrence is elementwise; here the
    solution is the exact one. Keys need no norm: the step shrinks what they hold to
    1 / (1 + beta |k|^2) of itself, whatever their length.
    """

    output_gate: bool = True
    conv_width: int = 4

    PAPER: ClassVar[str] = "Liu et al. 2024, arXiv:2407.14207"
    MEMORY: ClassVar[str] = "matrix [heads, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "delta_rule"
    STATE: ClassVar[type] = LonghornState

    def setup(self):
        self.setup_matrix()
        self.beta = self.dense(self.heads)

    def gates(self, x):
        beta = nn.sigmoid(widen(self.beta(x)))
        self.sow("intermediates", "mean_beta", beta.mean())
        return (beta,)

    def operate(self, query, key, value, beta, **options):
        step = beta / (1 + beta * jnp.sum(widen(key) ** 2, axis=-1))
        return delta_rule(query, key, value, step, **options)
