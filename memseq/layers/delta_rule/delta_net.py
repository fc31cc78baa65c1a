"""DeltaNet."""

from typing import ClassVar

import flax.linen as nn

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import l2_normalize, widen
from memseq.pallas_kernels import delta_rule


@state_dataclass
class DeltaNetState(MatrixState):
    """State of `DeltaNet`."""


class DeltaNet(MatrixLayer):
    """A matrix memory that replaces what it holds under a key.

        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,  out_t = S_t^T q_t / sqrt(key_dim),
        beta_t = max_beta sigmoid(W x_t),  |k_t| = |q_t| = 1

    Schlag et al. 2021, arXiv:2102.11174, equation 23; as a layer Yang et al. 2024, "Parallelizing
    Linear Transformers with the Delta Rule", arXiv:2406.06484, section 3.3. With max_beta 2 the
    transition has eigenvalues in [-1, 1] and can track states such as parity (Grazzi et al. 2025,
    arXiv:2411.12537).

    Attributes (beside those of every layer and of `MatrixLayer`):
        max_beta: largest write strength, in (0, 2]: 1 replaces, 2 reflects.
    """

    conv_width: int = 4
    max_beta: float = 1.0

    PAPER: ClassVar[str] = "Yang et al. 2024, arXiv:2406.06484"
    MEMORY: ClassVar[str] = "matrix [heads, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "delta_rule"
    STATE: ClassVar[type] = DeltaNetState

    def setup(self):
        check_max_beta(self.max_beta)
        self.setup_matrix()
        self.beta = self.dense(self.heads)

    def gates(self, x):
        return (write_strength(self, self.beta(x)),)

    def operate(self, query, key, value, beta, **options):
        return delta_rule(l2_normalize(query), l2_normalize(key), value, beta, **options)


def check_max_beta(max_beta: float) -> None:
    """Raises ValueError unless 0 < max_beta <= 2: beyond 2 a step with a unit key grows."""
    if not 0 < max_beta <= 2:
        raise ValueError(f"max_beta: expected a write strength in (0, 2], got {max_beta}")


def write_strength(layer: nn.Module, logits):
    """max_beta sigmoid(logits), in float32 at least; sows its mean."""
    beta = layer.max_beta * nn.sigmoid(widen(logits))
    layer.sow("intermediates", "mean_beta", beta.mean())
    return beta
