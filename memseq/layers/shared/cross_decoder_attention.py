"""One key-value cache for many layers: the cross-decoder of YOCO and SambaY."""

from typing import ClassVar

import flax.linen as nn
import jax

from memseq.layers.attention.cache import Seen
from memseq.layers.attention.softmax_attention import SoftmaxAttention
from memseq.layers.common.parts import RMSNorm, merge_heads, rotate, split_heads
from memseq.layers.shared.reader import SharedReader
from memseq.pallas_kernels import attention


class SharedAttention(SoftmaxAttention):
    """Softmax attention whose cache the layers above it read as well.

    The layer between the two halves of a decoder-decoder: Sun et al. 2024, "You Only Cache Once",
    arXiv:2405.05254, where it makes keys and values without attending itself; Ren et al. 2025,
    arXiv:2507.06607 (SambaY), where it attends, as here. `CrossDecoderAttention` reads it.
    """

    PAPER: ClassVar[str] = "Sun et al. 2024, arXiv:2405.05254"
    SHARES: ClassVar[bool] = True

    @nn.nowrap
    def sizes(self):
        if self.window is not None:
            raise ValueError(
                "window: expected None, as the layers above read all keys of one call and would "
                f"miss what a ring has dropped in the next, got {self.window}"
            )
        return super().sizes()

    def mix(self, inputs, state, segment_ids, shared):
        out, state, shared["shared_attention"] = self.read(inputs, state, segment_ids)
        return out, state


class CrossDecoderAttention(SharedReader):
    """Softmax attention of own queries on the keys and values of the `SharedAttention` below.

        out_t = sum_{j<=t} softmax_j(q_t . k_j / sqrt(head_dim)) v_j,  k and v of that layer

    Sun et al. 2024, arXiv:2405.05254, equation 5; Ren et al. 2025, arXiv:2507.06607. However many
    such layers a model has, it keeps one cache. Forget gates are those of the keys.

    Attributes (beside those of every layer):
        heads: a multiple of the shared layer's kv_heads.
        head_dim: size per head, that of the shared keys; None is features / heads.
        rope, rope_base, qk_norm: as the shared layer has them.
        output_gate: multiply the read-out by silu of a projection of x.
    """

    head_dim: int | None = None
    rope: bool = True
    rope_base: float = 10_000.0
    qk_norm: bool = False
    output_gate: bool = False

    PAPER: ClassVar[str] = "Sun et al. 2024, arXiv:2405.05254"
    MEMORY: ClassVar[str] = "that of the shared attention below"
    OPERATION: ClassVar[str] = "attention"
    READS: ClassVar[str] = "shared_attention"

    def setup(self):
        size = self.heads * self.split_features("head_dim", self.head_dim)
        self.query = self.dense(size)
        self.query_norm = RMSNorm(param_dtype=self.param_dtype) if self.qk_norm else None
        self.gate = self.dense(size) if self.output_gate else None
        self.output = self.dense(self.features)

    def project(self, x):
        return split_heads(self.query(x), self.heads)

    def recall_shared(self, inputs: jax.Array, held: Seen) -> jax.Array:
        query = inputs if self.query_norm is None else self.query_norm(inputs)
        if self.rope:
            query = rotate(query, held.query_positions, self.rope_base)
        return attention(
            query,
            held.keys,
            held.values,
            log_forget=held.log_forget if held.log_forget.shape[-1] else None,
            query_positions=held.query_positions,
            key_positions=held.key_positions,
            query_segments=held.query_segments,
            key_segments=held.key_segments,
            implementation=self.implementation,
        )

    def finish(self, x, out):
        out = merge_heads(out)
        if self.gate is not None:
            out = out * nn.silu(self.gate(x))
        return self.output(out)
