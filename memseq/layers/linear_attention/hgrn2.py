"""HGRN2."""

import math
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from memseq.layers.common.base import check_layer_index, state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import merge_heads, split_heads, widen
from memseq.pallas_kernels import linear_attention


@state_dataclass
class HGRN2State(MatrixState):
    """State of `HGRN2`."""


class HGRN2(MatrixLayer):
    """A gated recurrent network whose state is expanded by an outer product.

        S_t = Diag(a_t) S_{t-1} + (1 - a_t) v_t^T,  out_t = S_t^T q_t / sqrt(key_dim),
        a_t = bound + (1 - bound) sigmoid(W x_t)

    Qin et al. 2024, "HGRN2", arXiv:2404.07904, equations 4 and 5: what is not kept is written, so a
    key needs no projection of its own. Later layers have a higher bound, so that they hold longer.
    In the paper the bounds of all layers are one cumulative softmax; here a layer's bound is a
    parameter of its own that starts where that does, at layer_index / num_layers, and stays in
    (0, 1). The first layer's is 0.

    Attributes (beside those of every layer and of `MatrixLayer`):
        output_norm: RMS norm over all heads of the read-out.
        layer_index: place of this layer among `num_layers`, from 0.
        num_layers: layers of the model.
    """

    layer_index: int = 0
    num_layers: int = 1

    PAPER: ClassVar[str] = "Qin et al. 2024, arXiv:2404.07904"
    MEMORY: ClassVar[str] = "matrix [heads, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "linear_attention"
    STATE: ClassVar[type] = HGRN2State

    def setup(self):
        check_layer_index(self.layer_index, self.num_layers)
        self.setup_matrix(None, None)
        if self.layer_index:
            share = self.layer_index / self.num_layers
            start = nn.initializers.constant(math.log(share / (1 - share)))
            _, key_dim, heads, _ = self.dims()
            self.bound_bias = self.param("bound_bias", start, (heads, key_dim))

    def operate(self, query, key, value, **options):
        log_decay = nn.log_sigmoid(widen(key))
        if self.layer_index:  # log(bound + (1 - bound) sigmoid)
            bound = nn.log_sigmoid(self.bound_bias)
            log_decay = jnp.logaddexp(bound, nn.log_sigmoid(-self.bound_bias) + log_decay)
        self.sow_decay(log_decay)
        written = -jnp.expm1(log_decay).astype(value.dtype)
        return linear_attention(nn.silu(query), written, value, log_decay, **options)

    def finish(self, x, out):
        return super().finish(x, split_heads(merge_heads(out), 1))
