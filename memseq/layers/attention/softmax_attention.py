"""Softmax attention with a key-value cache."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.attention.cache import (
    Seen,
    Sizes,
    SoftmaxAttentionState,
    empty_cache,
    grown,
    store,
)
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
    MOVES_KEYS: ClassVar[bool] = False  # keys of the past change with every step

    def setup(self):
        sizes = self.sizes()
        if self.rope and sizes.key_dim % 2:
            raise ValueError(f"head_dim: rotary positions need an even size, got {sizes.key_dim}")
        self.query = self.dense(sizes.heads * sizes.key_dim)
        self.key = self.dense(sizes.key_heads * sizes.key_dim)
        self.value = self.dense(sizes.value_heads * sizes.value_dim)
        self.conv = ShortConv(
            self.conv_width,
            self.conv_channels(),
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
        self.gate = self.dense(self.heads * sizes.value_dim) if self.output_gate else None
        self.output = self.dense(self.features)

    @nn.nowrap
    def sizes(self) -> Sizes:
        """Of queries, keys and values; `kv_heads` and `head_dim` with their defaults."""
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
        head_dim = self.split_features("head_dim", self.head_dim)
        return Sizes(self.heads, kv_heads, head_dim, kv_heads, head_dim)

    @nn.nowrap
    def conv_channels(self) -> int:
        """Channels of the short convolution."""
        return sum(self._split())

    @nn.nowrap
    def _split(self) -> tuple[int, int, int]:
        """Channels of queries, keys and values."""
        sizes = self.sizes()
        keys = sizes.key_heads * sizes.key_dim
        return sizes.heads * sizes.key_dim, keys, sizes.value_heads * sizes.value_dim

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> SoftmaxAttentionState:
        """An empty cache of `context` positions; None is a cache that grows from nothing."""
        dtype = self.activation_dtype()
        check_count("context", context, 0, optional=True)
        slots = 0 if context is None else context
        if self.window is not None:
            slots = self.window + self.sink_tokens
        return empty_cache(
            batch,
            slots,
            self.sizes(),
            self.heads if self.forget_gate else 0,
            conv_tail(batch, self.conv_width, self.conv_channels(), dtype),
            jnp.float32 if self.MOVES_KEYS else dtype,
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
        out, state, _ = self.read(inputs, state, segment_ids)
        return out, state

    def read(self, inputs, state, segment_ids) -> tuple[jax.Array, SoftmaxAttentionState, Seen]:
        """What `mix` gives, and what its queries saw."""
        inputs, log_forget, *more = inputs
        batch, time = inputs.shape[:2]
        # a cache's size is the state's own affair: compare with an empty one of the same size
        slots = state.position.shape[1] if isinstance(state, SoftmaxAttentionState) else None
        if slots is not None and state.grows:
            fresh = grown(self.init_state(batch), slots)
        else:
            fresh = self.init_state(batch, slots)
        first_call = state is None
        state = enter(state, fresh, segment_ids)

        (query, key, value, *moves), conv = self.convolve(inputs, state.conv, segment_ids)
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
        if self.MOVES_KEYS:
            key = widen(key)

        seen = Seen(key, value, log_forget, position, position, ids, ids)
        if not first_call:
            held = jnp.where(state.position >= 0, 0, -1)
            seen = Seen(
                jnp.concatenate([state.key.astype(key.dtype), key], axis=1),
                jnp.concatenate([state.value.astype(value.dtype), value], axis=1),
                jnp.concatenate([state.log_forget.astype(log_forget.dtype), log_forget], axis=1),
                position,
                jnp.concatenate([state.position, position], axis=1),
                ids,
                jnp.concatenate([held, ids], axis=1),
            )
        out = self.attend(query, seen.keys, seen.values, *moves, *more, **self.options(seen))
        if self.MOVES_KEYS:
            out, moved = out
            before, key = jnp.split(moved, [moved.shape[1] - time], axis=1)
            state = state if first_call else state.replace(key=before.astype(state.key.dtype))
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
        return out, state.replace(conv=conv, segment=leave(state, segment_ids)), seen

    def convolve(self, mixed: jax.Array, tail: jax.Array, segment_ids: jax.Array | None):
        """What `project` gave, by heads after the short convolution, and the convolution's tail."""
        mixed, tail = self.conv(mixed, tail, segment_ids)
        return self.split(mixed), tail

    def split(self, mixed: jax.Array) -> tuple[jax.Array, ...]:
        """Query, key, value [batch, time, heads, dim], side by side in `mixed`."""
        query, keys, _ = self._split()
        sizes = self.sizes()
        query, key, value = jnp.split(mixed, [query, query + keys], axis=-1)
        return (
            split_heads(query, sizes.heads),
            split_heads(key, sizes.key_heads),
            split_heads(value, sizes.value_heads),
        )

    def options(self, seen: Seen) -> dict[str, Any]:
        """What `attend` is told beside query, keys and values."""
        return {
            "window": self.window,
            "sinks": self.sink if self.sinks else None,
            "sink_tokens": self.sink_tokens,
            "log_forget": seen.log_forget if self.forget_gate else None,
            "query_positions": seen.query_positions,
            "key_positions": seen.key_positions,
            "query_segments": seen.query_segments,
            "key_segments": seen.key_segments,
        }

    def attend(self, query: jax.Array, keys: jax.Array, values: jax.Array, **options) -> Any:
        """The operation `attention` on this call's queries and all keys and values there are.

        A layer that `MOVES_KEYS` returns the read-out and all keys as they are after the call.
        """
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
