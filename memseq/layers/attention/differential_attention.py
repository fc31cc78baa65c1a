"""Differential attention: what two softmaxes agree on cancels."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.attention.cache import Sizes
from memseq.layers.attention.softmax_attention import SoftmaxAttention
from memseq.layers.common.base import check_layer_index
from memseq.layers.common.parts import RMSNorm


class DifferentialAttention(SoftmaxAttention):
    """Two softmax attentions over one set of values, the second subtracted from the first.

        out_t = (1 - start) norm(sum_{j<=t} (map^1_tj - share map^2_tj) v_j),
        map^i_tj = softmax_j(q^i_t . k^i_j / sqrt(head_dim)),
        share = exp(a_1 . b_1) - exp(a_2 . b_2) + start,  start = 0.8 - 0.6 exp(-0.3 layer_index)

    Ye et al. 2024, "Differential Transformer", arXiv:2410.05258, equations 1 to 3: the noise that
    both spread over the context goes, and what one alone looks at stays. The norm is RMS, per head
    and of one scale; the vectors a and b are the layer's and start normal with deviation 0.1.

    Attributes (beside those of `SoftmaxAttention`; sinks and forget gates serve both softmaxes):
        heads, kv_heads: pairs of queries, and pairs of keys with their value.
        head_dim: size of a query and of a key; a value has twice that. None is half of features /
            heads.
        layer_index: place of this layer among `num_layers`, from 0.
        num_layers: layers of the model.
    """

    layer_index: int = 0
    num_layers: int = 1

    PAPER: ClassVar[str] = "Ye et al. 2024, arXiv:2410.05258"
    MEMORY: ClassVar[str] = "key pairs and values [positions, kv_heads, 4 head_dim]"

    def setup(self):
        super().setup()
        check_layer_index(self.layer_index, self.num_layers)
        shape, normal = (2, self.sizes().key_dim), nn.initializers.normal(0.1)
        self.query_log = self.param("query_log", normal, shape, jnp.float32)
        self.key_log = self.param("key_log", normal, shape, jnp.float32)
        self.norm = RMSNorm(param_dtype=self.param_dtype)

    @nn.nowrap
    def sizes(self) -> Sizes:
        """Of all queries and keys: those of the first softmax, then those of the second."""
        heads, kv_heads, dim, _, _ = super().sizes()
        if self.head_dim is None:
            if dim % 2:
                raise ValueError(
                    f"heads: features {self.features} must be a multiple of twice as many, "
                    f"or head_dim be given; got heads {self.heads}"
                )
            dim //= 2
        return Sizes(2 * heads, 2 * kv_heads, dim, kv_heads, 2 * dim)

    @nn.nowrap
    def start(self) -> float:
        """The share that is subtracted at the start of training."""
        return 0.8 - 0.6 * math.exp(-0.3 * self.layer_index)

    def attend(self, query, keys, values, *, sinks, log_forget, **options) -> jax.Array:
        def twice(x, axis):
            return None if x is None else jnp.concatenate([x, x], axis=axis)

        both = super().attend(
            query,
            keys,
            twice(values, 2),
            sinks=twice(sinks, 0),
            log_forget=twice(log_forget, 2),
            **options,
        )
        first, second = jnp.split(both, 2, axis=2)
        more, less = jnp.exp(jnp.sum(self.query_log * self.key_log, axis=-1))
        share = more - less + self.start()
        self.sow("intermediates", "mean_share", share)
        return (first - share * second).astype(both.dtype)

    def finish(self, x, out):
        return super().finish(x, self.norm(out) * (1 - self.start()))
