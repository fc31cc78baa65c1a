"""MesaNet."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import l2_normalize, softplus_inverse, split_heads, widen
from memseq.layers.linear_attention.gated_linear_attention import (
    check_gate_normalizer,
    sigmoid_decay,
)
from memseq.pallas_kernels import ridge_readout
from memseq.pallas_kernels.common.checks import check_count
from memseq.pallas_kernels.ridge_readout import RidgeState


@state_dataclass
class MesaNetState(MatrixState):
    """State of `MesaNet`; `gram` is float32 [batch, heads, key_dim, key_dim]."""

    gram: jax.Array


class MesaNet(MatrixLayer):
    """A memory that answers with the linear map that fits all it has been told best.

        G_t = a_t G_{t-1} + beta_t k_t k_t^T,  S_t = a_t S_{t-1} + beta_t k_t v_t^T,
        out_t = S_t^T (G_t + Diag(ridge))^-1 q_t,  |k_t| = |q_t| = 1,
        log a_t = log sigmoid(W x_t + b) / gate_normalizer,  beta_t = sigmoid(W' x_t + b'),
        ridge = min_ridge + softplus(r)

    von Oswald et al. 2025, "MesaNet: Sequence Modeling by Locally Optimal Test-Time Training",
    arXiv:2506.05233, equation 6 and section 3. The ridge starts at 1; with zero biases the memory
    starts by forgetting half a step, as in the paper's code.

    Attributes (beside those of every layer and of `MatrixLayer`):
        conv_width: short convolution, with silu, of query and key alone; 0 is silu alone.
        min_ridge: least ridge, in (0, 1). It bounds how ill-conditioned a read can be.
        iterations: the most conjugate gradient steps of a read, see `ridge_readout`.
        gate_normalizer: what the log decay is divided by; larger forgets more slowly.
    """

    conv_width: int = 4
    min_ridge: float = 0.25
    iterations: int = 30
    gate_normalizer: float = 1.0

    PAPER: ClassVar[str] = "von Oswald et al. 2025, arXiv:2506.05233"
    MEMORY: ClassVar[str] = "gram and matrix [heads, key_dim, key_dim + value_dim]"
    OPERATION: ClassVar[str] = "ridge_readout"
    STATE: ClassVar[type] = MesaNetState

    def setup(self):
        if not 0 < self.min_ridge < 1:
            raise ValueError(f"min_ridge: expected a number in (0, 1), got {self.min_ridge}")
        check_count("iterations", self.iterations, 1)
        check_gate_normalizer(self.gate_normalizer)
        self.setup_matrix()
        self.beta = self.dense(self.heads, use_bias=True)
        self.decay = self.dense(self.heads, use_bias=True)
        start = softplus_inverse(1 - self.min_ridge)
        _, key_dim, heads, _ = self.dims()
        self.ridge_bias = self.param(
            "ridge_bias", nn.initializers.constant(start), (heads, key_dim), jnp.float32
        )

    @nn.nowrap
    def _channels(self) -> int:
        key_heads, key_dim, _, _ = self.dims()
        return 2 * key_heads * key_dim

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> MesaNetState:
        _, key_dim, heads, _ = self.dims()
        gram = jnp.zeros((batch, heads, key_dim, key_dim), jnp.float32)
        return self.empty_state(batch, gram=gram)

    def project(self, x):
        pair = jnp.concatenate([self.query(x), self.key(x)], axis=-1)
        beta = nn.sigmoid(widen(self.beta(x)))
        self.sow("intermediates", "mean_beta", beta.mean())
        return pair, self.value(x), beta, sigmoid_decay(self, self.decay(x))

    def mix(self, inputs, state, segment_ids):
        pair, value, beta, log_decay = inputs
        state = enter(state, self.init_state(pair.shape[0]), segment_ids)
        pair, conv = self.conv(pair, state.conv, segment_ids)
        query, key = (split_heads(x, self.heads) for x in jnp.split(pair, 2, axis=-1))
        out, (gram, memory) = ridge_readout(
            l2_normalize(query),
            l2_normalize(key),
            split_heads(value, self.heads),
            beta,
            log_decay,
            self.min_ridge + nn.softplus(self.ridge_bias),
            iterations=self.iterations,
            scale=1.0,
            initial_state=RidgeState(state.gram, state.memory),
            **self.operation_options(segment_ids),
        )
        return out, self.leave_with(state, segment_ids, memory=memory, gram=gram, conv=conv)
