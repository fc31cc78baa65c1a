"""The linear transformer's attention."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import mean_with, widen
from memseq.layers.linear_attention.feature_maps import FEATURE_MAPS
from memseq.pallas_kernels import linear_attention
from memseq.pallas_kernels.common.checks import check_choice


@state_dataclass
class LinearAttentionState(MatrixState):
    """Where the layer normalises, `memory` has one more value column: the sum of the keys."""


class LinearAttention(MatrixLayer):
    """Attention with a feature map in place of softmax, so that its past is one matrix.

        S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),
        out_t = S_t^T phi(q_t) / (z_t . phi(q_t))

    Katharopoulos et al. 2020, "Transformers are RNNs", arXiv:2006.16236, equations 16 to 20.

    Attributes (beside those of every layer and of `MatrixLayer`):
        feature_map: phi: "elu+1" (the paper's), "relu", "identity", "dpfp", "taylor", "rebased",
            "hedgehog", "t2r" or "elementwise_product", see `feature_maps`. The last four have
            parameters, one set for queries and one for keys. A head's memory is as high as phi has
            features: 1 + key_dim + key_dim^2 for "taylor".
        normalize: divide by z . phi(q), which a map with negative values does not allow.
        output_norm: off, as in the paper; turn it on where `normalize` is off.
        mimetic: the query's projection starts as the mean of its own draw and the key's, so that
            what is like is found: what is left of the mimetic start of `Mamba` (Trockman et al.
            2024, arXiv:2410.11135), which makes a state space resemble this layer.
    """

    feature_map: str = "elu+1"
    normalize: bool = True
    output_norm: bool = False
    mimetic: bool = False

    PAPER: ClassVar[str] = "Katharopoulos et al. 2020, arXiv:2006.16236"
    MEMORY: ClassVar[str] = "matrix and normaliser [heads, key_dim, value_dim + 1]"
    OPERATION: ClassVar[str] = "linear_attention"
    STATE: ClassVar[type] = LinearAttentionState

    def setup(self):
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        phi = FEATURE_MAPS[self.feature_map]
        if self.normalize and phi.signed:
            raise ValueError(
                f"normalize: expected False with feature_map {self.feature_map!r}, whose values "
                "can be negative, got True"
            )
        self.setup_matrix(activation=None)
        if phi.make is not None:
            self.query_map = phi.make(self.param_dtype)
            self.key_map = phi.make(self.param_dtype)
        else:
            self.query_map = self.key_map = phi.apply

    @nn.nowrap
    def make_query(self, size):
        return (
            self.dense(size, kernel_init=mean_with(self.key)) if self.mimetic else self.dense(size)
        )

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> LinearAttentionState:
        _, key_dim, heads, value_dim = self.dims()
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        size = FEATURE_MAPS[self.feature_map].size(key_dim), value_dim + int(self.normalize)
        memory = jnp.zeros((batch, heads, *size), jnp.float32)
        return self.empty_state(batch, memory=memory)

    def operate(self, query, key, value, **options):
        query, key, dtype = self.query_map(query), self.key_map(key), value.dtype
        if not self.normalize:
            return linear_attention(query, key, value, **options)
        # read-out and normaliser leave in float32: their quotient is taken before rounding
        value = widen(value)
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
        out, memory = linear_attention(query, key, value, scale=1.0, **options)
        return (out[..., :-1] / jnp.maximum(out[..., -1:], 1e-6)).astype(dtype), memory


@state_dataclass
class BasedState(LinearAttentionState):
    """State of `Based`."""


class Based(LinearAttention):
    """Linear attention with the exponential's series to its second term, on small keys.

    Arora et al. 2024, "Simple linear attention language models balance the recall-throughput
    tradeoff", arXiv:2402.18668. Attributes as `LinearAttention`.
    """

    feature_map: str = "taylor"
    key_dim: int | None = 16

    PAPER: ClassVar[str] = "Arora et al. 2024, arXiv:2402.18668"
    MEMORY: ClassVar[str] = "matrix and normaliser [heads, 1 + key_dim + key_dim^2, value_dim + 1]"
    STATE: ClassVar[type] = BasedState
