"""Gated slot attention."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import merge_heads, split_heads
from memseq.layers.linear_attention.gated_linear_attention import (
    check_gate_normalizer,
    sigmoid_decay,
)
from memseq.pallas_kernels import linear_attention
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class GatedSlotAttentionState(MatrixState):
    """`memory` holds the slots' values, float32 [batch, heads, slots, value_dim].

    Attributes (beside those of `MatrixState`):
        keys: float32 [batch, heads, key_dim, slots], the slots' keys.
    """

    keys: jax.Array


class GatedSlotAttention(MatrixLayer):
    """Softmax attention over a fixed number of slots that tokens fill and gates empty.

        K_t = K_{t-1} Diag(a_t) + k_t (1 - a_t)^T,  V_t = Diag(a_t) V_{t-1} + (1 - a_t) v_t^T,
        out_t = V_t^T softmax(K_t^T q_t),  log a_t = log sigmoid(W x_t) / gate_normalizer

    Zhang et al. 2024, "Gated Slot Attention", arXiv:2409.07146, equations 8 to 10: two passes of
    gated linear attention, the first with a decay of value channels. Queries, keys and values are
    activated by silu; the read-out is activated, normed over all heads and projected.

    Attributes (beside those of every layer and of `MatrixLayer`):
        slots: keys and values a head's memory holds.
        gate_normalizer: what the log decay is divided by; larger forgets more slowly.
    """

    slots: int = 64
    gate_normalizer: float = 8.0

    PAPER: ClassVar[str] = "Zhang et al. 2024, arXiv:2409.07146"
    MEMORY: ClassVar[str] = "slots [heads, slots, key_dim + value_dim]"
    OPERATION: ClassVar[str] = "linear_attention"
    STATE: ClassVar[type] = GatedSlotAttentionState

    def setup(self):
        check_count("slots", self.slots, 1)
        check_gate_normalizer(self.gate_normalizer)
        self.setup_matrix()
        self.decay = self.dense(self.heads * self.slots)

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> Any:
        _, key_dim, heads, value_dim = self.dims()
        values = jnp.zeros((batch, heads, self.slots, value_dim), jnp.float32)
        keys = jnp.zeros((batch, heads, key_dim, self.slots), jnp.float32)
        return self.empty_state(batch, memory=values, keys=keys)

    def gates(self, x):
        return (split_heads(sigmoid_decay(self, self.decay(x)), self.heads),)

    def mix(self, inputs, state, segment_ids):
        mixed, log_decay = inputs
        state = enter(state, self.init_state(mixed.shape[0]), segment_ids)
        query, key, value, conv = self.convolve(mixed, state, segment_ids)
        written = -jnp.expm1(log_decay)  # 1 - a, in float32 at least, as are the scores
        options = self.operation_options(segment_ids) | {"scale": 1.0}
        out, keys, values = two_passes(query, key, value, written, log_decay, state, **options)
        return out, self.leave_with(state, segment_ids, memory=values, conv=conv, keys=keys)

    def finish(self, x, out):
        out = nn.silu(merge_heads(out))
        if self.norm is not None:
            out = self.norm(out)
        if self.gate is not None:
            out = out * nn.silu(self.gate(x))
        return self.output(out)


def two_passes(query, key, value, written, log_decay, state, *, scale, **options):
    """Slots that keep exp(log_decay) and take `written` of a token, read by softmax attention.

    written, log_decay [batch, time, heads, slots], float32 at least; state: has `keys`, and as
    `memory` the values. Returns (read-out, keys, values).
    """
    scores, keys = linear_attention(
        query,
        key,
        written,
        value_log_decay=log_decay,
        scale=scale,
        initial_state=state.keys,
        **options,
    )
    out, values = linear_attention(
        nn.softmax(scores, axis=-1).astype(value.dtype),
        written.astype(value.dtype),
        value,
        log_decay,
        scale=1.0,
        initial_state=state.memory,
        **options,
    )
    return out, keys, values
