"""PaTH attention: positions made of data, by reflections along the way from a key to a query."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.attention.softmax_attention import SoftmaxAttention
from memseq.layers.common.parts import l2_normalize, split_heads, widen
from memseq.pallas_kernels import path_attention
from memseq.pallas_kernels.common.checks import check_count


class PathAttention(SoftmaxAttention):
    """Softmax attention whose keys are reflected by every token that comes after them.

        out_t = sum_{j<=t} softmax_j(q_t . H_t H_{t-1} ... H_{j+1} k_j / sqrt(head_dim)) v_j,
        H_t = I - beta_t w_t w_t^T,  w_t = unit(silu(conv(W_2 W_1 x_t))),  beta_t = 2 sigmoid(u x_t)

    Yang et al. 2025, "PaTH Attention", arXiv:2505.16381, section 3: the products take the place of
    positions, and can track what plain attention cannot. The paper's best form has forget gates as
    well (`forget_gate`). Directions and beta belong to key-value heads.

    The state is a cache whose keys have been moved to the last step, in float32: each call moves
    all of them, in place of the paper's rule for one token.

    Attributes (beside those of `SoftmaxAttention`, which the cache and its options are):
        direction_rank: inner size of the directions' projection; None is one full matrix, which
            the authors take where key-value heads are shared.
        conv_width: short convolution of the directions alone, with silu; 0 is none.
    """

    rope: bool = False
    conv_width: int = 3
    direction_rank: int | None = 32

    PAPER: ClassVar[str] = "Yang et al. 2025, arXiv:2505.16381"
    MEMORY: ClassVar[str] = "moved keys and values 2 x [positions, kv_heads, head_dim]"
    OPERATION: ClassVar[str] = "path_attention"
    MOVES_KEYS: ClassVar[bool] = True

    def setup(self):
        super().setup()
        check_count("direction_rank", self.direction_rank, 1, optional=True)
        if self.direction_rank is not None:
            self.direction_in = self.dense(self.direction_rank)
        self.direction = self.dense(self.conv_channels())
        self.beta = self.dense(self.sizes().key_heads, use_bias=True)

    @nn.nowrap
    def conv_channels(self) -> int:
        sizes = self.sizes()
        return sizes.key_heads * sizes.key_dim

    def project(self, x):
        """As `SoftmaxAttention`, with the directions behind the values, and float32 beta."""
        mixed, log_forget = super().project(x)
        inner = x if self.direction_rank is None else self.direction_in(x)
        mixed = jnp.concatenate([mixed, self.direction(inner)], axis=-1)
        beta = 2 * nn.sigmoid(widen(self.beta(x)))
        self.sow("intermediates", "mean_beta", beta.mean())
        return mixed, log_forget, beta

    def convolve(self, mixed, tail, segment_ids):
        mixed, direction = jnp.split(mixed, [mixed.shape[-1] - self.conv_channels()], axis=-1)
        direction, tail = self.conv(direction, tail, segment_ids)
        direction = split_heads(widen(direction), self.sizes().key_heads)
        return (*self.split(mixed), l2_normalize(direction)), tail

    def attend(
        self, query, keys, values, direction, beta, **options
    ) -> tuple[jax.Array, jax.Array]:
        return path_attention(
            query,
            keys,
            values,
            direction,
            beta,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
            **options,
        )
