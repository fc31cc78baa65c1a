"""Softmax attention with a key-value cache."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.attention.cache import SoftmaxAttentionState, empty_cache, grown, store
from memseq.layers.common.base import SequenceLayer, enter, leave
from memseq.layers.common.parts import (
    RMSNorm,
    ShortConv,
    conv_tail,
    merge_heads,
    rotate,
    split_heads,
    widen,
)
from memseq.pallas_kernels import attention
from memseq.pallas_kernels.common.checks import check_count
from memseq.pallas_kernels.common.segments import Segments, segment_positions, segments


class SoftmaxAttention(SequenceLayer):
    """Causal softmax attention: a memory that keeps every pair it was given.

        out_t = sum_{j<=t} softmax_j(q_t . k_j / sqrt(head_dim)) v_j

    Vaswani et al. 2017, arXiv:1706.03762, equation 1; rotary positions Su et al. 2021,
    arXiv:2104.09864; sink tokens Xiao et al. 2024, arXiv:2309.17453; sink logits as in gpt-oss,
    arXiv:2508.10925.

    The state is a cache of keys and values. `init_state(batch, context)` has room for `context`
    positions of one segment, and what is read past them is NaN. The cache of `state=None` grows
    with every call. With a window the state is a ring of window + sink_tokens positions, and any
    length goes through it.

    Attributes (beside those of every layer):
        kv_heads: heads of key and value; each serves heads / kv_heads query heads. None is heads.
        head_dim: size per head; None is features / heads.
        rope: rotate queries and keys by their position in the segment; False is no positions.
        rope_base: base of the rotation's wavelengths.
        window: positions seen, the present one included; None is all.
        sink_tokens: first positions of a segment that stay visible outside the window.
        sinks: learn a logit per head that takes part in the softmax and has no value.
        qk_norm: RMS norm of queries and keys per head.
        forget_gate: see `ForgettingAttention`.
        output_gate: multiply the read-out by silu of a projection of x.
        conv_width: short convolution of query, key and value, with silu; 0 is none.
    """

    kv_heads: int | None = None
    head_dim: int | None = None
    rope: bool = True
    rope_base: float = 10_000.0
    window: int | None = None
    sink_tokens: int = 0
    sinks: bool = False
    qk_norm: bool = False
    forget_gate: bool = False
    output_gate: bool = False
    conv_width: int = 0

    PAPER: ClassVar[str] = "Vaswani et al. 2017, arXiv:1706.03762"
    MEMORY: ClassVar[str] = "keys and values 2 x [positions, kv_heads, head_dim]"
    OPERATION: ClassVar[str] = "attention"

    def setup(self):
        kv_heads, head_dim = self._dims()
        if self.rope and head_dim % 2:
            raise ValueError(f"head_dim: rotary positions need an even size, got {head_dim}")
        self.query = self.dense(self.heads * head_dim)
        self.key = self.dense(kv_heads * head_dim)
        self.value = self.dense(kv_heads * head_dim)
        self.conv = ShortConv(
            self.conv_width,
            self._channels(),
            activation="silu" if self.conv_width else None,
            implementation=self.plain_implementation(),
            param_dtype=self.param_dtype,
        )
        if self.qk_norm:
            self.query_norm = RMSNorm(param_dtype=self.param_dtype)
            self.key_norm = RMSNorm(param_dtype=self.param_dtype)
        if self.sinks:
            self.sink = self.param("sink_logits", nn.initializers.zeros, (self.heads,), jnp.float32)
        if self.forget_gate:
            self.forget = self.dense(self.heads, use_bias=True)
        self.gate = self.dense(self.heads * head_dim) if self.output_gate else None
        self.output = self.dense(self.features)

    @nn.nowrap
    def _dims(self) -> tuple[int, int]:
        """(key-value heads, size per head)."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        if kv_heads < 1 or self.heads % kv_heads:
            raise ValueError(
                f"kv_heads: heads {self.heads} must be a multiple of it, got {kv_heads}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: expected a positive number of positions, got {self.window}")
        if self.forget_gate and self.sink_tokens:
            raise ValueError(
                "sink_tokens: expected 0 with forget_gate, which would have to know every gate "
                f"since, got {self.sink_tokens}"
            )
        return kv_heads, self.split_features("head_dim", self.head_dim)

    @nn.nowrap
    def _channels(self) -> int:
        kv_heads, head_dim = self._dims()
        return (self.heads + 2 * kv_heads) * head_dim

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> SoftmaxAttentionState:
        """An empty cache of `context` positions; None is a cache that grows from nothing."""
        kv_heads, head_dim = self._dims()
        dtype = self.activation_dtype()
        check_count("context", context, 0, optional=True)
        slots = 0 if context is None else context
        if self.window is not None:
            slots = self.window + self.sink_tokens
        return empty_cache(
            batch,
            slots,
            kv_heads,
            head_dim,
            self.heads if self.forget_gate else 0,
            conv_tail(batch, self.conv_width, self._channels(), dtype),
            dtype,
            grows=context is None and self.window is None,
        )

    def project(self, x):
        """Query, key and value side by side; log forget gates [batch, time, heads], or of none."""
        mixed = jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)
        if self.forget_gate:
            return mixed, nn.log_sigmoid(widen(self.forget(x)))
        return mixed, jnp.zeros((*x.shape[:2], 0), jnp.float32)

    def mix(self, inputs, state, segment_ids):
        inputs, log_forget = inputs
        batch, time = inputs.shape[:2]
        kv_heads, head_dim = self._dims()
        # a cache's size is the state's own affair: compare with an empty one of the same size
        slots = state.position.shape[1] if isinstance(state, SoftmaxAttentionState) else None
        if slots is not None and state.grows:
            fresh = grown(self.init_state(batch), slots)
        else:
            fresh = self.init_state(batch, slots)
        first_call = state is None
        state = enter(state, fresh, segment_ids)

        mixed, conv = self.conv(inputs, state.conv, segment_ids)
        size = self.heads * head_dim
        query, key, value = jnp.split(mixed, [size, size + kv_heads * head_dim], axis=-1)
        query, key = split_heads(query, self.heads), split_heads(key, kv_heads)
        value = split_heads(value, kv_heads)

        segs = Segments(jnp.ones((batch, time), bool), jnp.zeros((batch, time), jnp.int32))
        if segment_ids is not None:
            segs = segments(segment_ids)
        position = segment_positions(segs)
        position += jnp.where(segs.index == 0, state.length[:, None], 0)
        ids = jnp.where(segs.valid, segs.index, -1)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rope:
            query = rotate(query, position, self.rope_base)
            key = rotate(key, position, self.rope_base)

        keys, values, gates, key_positions, key_segments = key, value, log_forget, position, ids
        if not first_call:
            held = jnp.where(state.position >= 0, 0, -1)
            keys = jnp.concatenate([state.key.astype(key.dtype), key], axis=1)
            values = jnp.concatenate([state.value.astype(value.dtype), value], axis=1)
            gates = jnp.concatenate([state.log_forget.astype(gates.dtype), gates], axis=1)
            key_positions = jnp.concatenate([state.position, position], axis=1)
            key_segments = jnp.concatenate([held, ids], axis=1)
        out = self.attend(
            query,
            keys,
            values,
            window=self.window,
            sinks=self.sink if self.sinks else None,
            sink_tokens=self.sink_tokens,
            log_forget=gates if self.forget_gate else None,
            query_positions=position,
            key_positions=key_positions,
            query_segments=ids,
            key_segments=key_segments,
        )
        if state.grows:
            state = grown(state, time)
        elif self.window is None:
            full = segs.valid & (position >= state.position.shape[1])
            out = jnp.where(full[..., None, None], jnp.nan, out)
        state = store(
            state,
            key,
            value,
            log_forget,
            position,
            segs.valid,
            segs.index,
            self.window,
            self.sink_tokens,
        )
        return out, state.replace(conv=conv, segment=leave(state, segment_ids))

    def attend(self, query: jax.Array, keys: jax.Array, values: jax.Array, **options) -> jax.Array:
        """The operation `attention` on this call's queries and all keys and values there are."""
        return attention(query, keys, values, implementation=self.implementation, **options)

    def finish(self, x: jax.Array, out: jax.Array) -> jax.Array:
        out = merge_heads(out)
        if self.gate is not None:
            out = out * nn.silu(self.gate(x))
        return self.output(out)


class SlidingWindowAttention(SoftmaxAttention):
    """Softmax attention over the last positions: exact recall of what is near.

        out_t = sum_{t-window<j<=t} softmax_j(q_t . k_j / sqrt(head_dim)) v_j

    Beltagy et al. 2020, "Longformer", arXiv:2004.05150, section 3.1. `SoftmaxAttention` with a
    window, and its state a ring of that many positions: the partner of a recurrent memory in
    hybrids such as Samba (Ren et al. 2024, arXiv:2406.07522).
    """

    window: int | None = 512

    PAPER: ClassVar[str] = "Beltagy et al. 2020, arXiv:2004.05150"
    MEMORY: ClassVar[str] = "keys and values 2 x [window, kv_heads, head_dim]"


class ForgettingAttention(SoftmaxAttention):
    """Softmax attention that forgets: keys lose weight as gates close behind them.

        out_t = sum_{j<=t} softmax_j(q_t . k_j / sqrt(head_dim) + sum_{j<l<=t} log f_l) v_j,
        f_t = sigmoid(W x_t + b), a number a head

    Lin et al. 2025, "Forgetting Transformer", arXiv:2503.02130, equation 5 and section 4: no
    positions, which the gates supply, and norms of queries and keys. b starts at 0.
    """

    rope: bool = False
    qk_norm: bool = True
    forget_gate: bool = True

    PAPER: ClassVar[str] = "Lin et al. 2025, arXiv:2503.02130"
    MEMORY: ClassVar[str] = "keys, values and gates [positions, kv_heads, 2 head_dim]"
