"""Titans' memory as context: attention reads what the memory holds, and the memory what it sees."""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, leave, no_segment, state_dataclass
from memseq.layers.common.parts import RMSNorm, l2_normalize, merge_heads, rotate, split_heads
from memseq.layers.neural_memory.titans import TitansLMM, TitansMAG
from memseq.pallas_kernels import attention
from memseq.pallas_kernels.common.segments import Segments, segments
from memseq.pallas_kernels.neural_memory import MemoryState
from memseq.pallas_kernels.neural_memory.alignment import align, chunks_needed
from memseq.pallas_kernels.neural_memory.state import select


class Context(NamedTuple):
    """Keys and values of the stretch that goes on, of its tokens and of what memory said to each.

    key, value: [batch, 2, update_chunk, heads, dim], first of the memory's answers.
    """

    key: jax.Array
    value: jax.Array


jax.export.register_namedtuple_serialization(
    Context, serialized_name="memseq.layers.neural_memory.Context"
)


@state_dataclass
class TitansMACState:
    """State of `TitansMAC`.

    Attributes:
        held: the neural memory, see `memseq.pallas_kernels.neural_memory.MemoryState`.
        context: keys and values of the stretch that goes on; `held.position` of them are there.
        segment: int32 [batch], id of the segment the memory belongs to, -1 for none yet.
    """

    held: MemoryState
    context: Context
    segment: jax.Array


class Stretch(nn.Module):
    """One stretch of `TitansMAC`, of at most `update_chunk` steps of each row.

    Attributes: the layer's TitansLMM without convolution, and those of `TitansMAC`.
    """

    memory: TitansLMM
    features: int
    heads: int
    persistent_tokens: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, carry, now):
        """carry: (held, context) before the stretch to those after it; now: x and its layout.

        x [batch, update_chunk, features]; filled bool [batch, update_chunk]: a token of this call
        is there; restart bool [batch]: a segment starts; cut bool [batch]: what the memory holds
        is a constant from here on. Returns y as x, 0 where not filled.
        """
        held, context = carry
        x, filled, restart, cut = now
        batch, chunk = filled.shape
        memory = self.memory

        def dense(name):
            return nn.Dense(
                self.features, False, self.dtype, param_dtype=self.param_dtype, name=name
            )

        held = held._replace(position=jnp.where(restart, -1, held.position))
        held = select(cut, jax.lax.stop_gradient(held), held)
        read = l2_normalize(split_heads(nn.silu(memory.query(x)), self.heads))
        told = merge_heads(memory.answer(read, held)).astype(x.dtype)

        slot = jnp.broadcast_to(jnp.arange(chunk, dtype=jnp.int32), (batch, chunk))
        tokens = self.param(
            "initial_tokens",
            nn.initializers.normal(0.02),
            (self.persistent_tokens, self.features),
            jnp.float32,
        ).astype(x.dtype)
        query, key, value = dense("query"), dense("key"), dense("value")

        def heads_of(project, x, turn=True):
            x = split_heads(project(x), self.heads)
            return rotate(x, slot, 10_000.0) if turn else x

        both = Context(
            *(
                jnp.stack([heads_of(part, y, part is key) for y in (told, x)], axis=1)
                for part in (key, value)
            )
        )
        new = filled[:, None, :, None, None]
        context = jax.tree.map(lambda a, b: jnp.where(new, a.astype(b.dtype), b), both, context)
        there = filled | (slot < held.position[:, None])
        first = jnp.arange(-self.persistent_tokens, 0, dtype=jnp.int32)
        first = jnp.broadcast_to(first, (batch, self.persistent_tokens))

        def with_persistent(part, held):
            learned = split_heads(part(tokens[None]), self.heads)
            if part is key:
                learned = rotate(learned, first[:1], 10_000.0)
            learned = jnp.broadcast_to(learned, (batch, *learned.shape[1:]))
            held = held.reshape(batch, 2 * chunk, *held.shape[3:])
            return jnp.concatenate([learned, held.astype(learned.dtype)], axis=1)

        y = attention(
            heads_of(query, x),
            with_persistent(key, context.key),
            with_persistent(value, context.value),
            query_positions=slot,
            key_positions=jnp.concatenate([first, slot, slot], axis=1),
            query_segments=jnp.where(filled, 0, -1),
            key_segments=jnp.concatenate(
                [jnp.zeros_like(first), jnp.tile(jnp.where(there, 0, -1), (1, 2))], axis=1
            ),
        )
        y = dense("attention_output")(merge_heads(y))

        own, written, value = (
            split_heads(z, self.heads)
            for z in (y, nn.silu(memory.key(y)), nn.silu(memory.value(y)))
        )
        remembered, held = memory.remember(
            l2_normalize(own),
            l2_normalize(written),
            value,
            memory.memory_gates(y),
            held,
            jnp.where(filled, 0, -1),
        )
        norm, memory_norm = (
            RMSNorm(param_dtype=self.param_dtype, name=name)
            for name in ("attention_norm", "memory_norm")
        )
        y = norm(y) * nn.sigmoid(memory_norm(merge_heads(remembered).astype(y.dtype)))
        return (held, context), jnp.where(filled[..., None], y, 0)


class TitansMAC(TitansMAG):
    """Memory as context: attention over a stretch sees what the memory says to each of its steps.

        h_t = M_start(q_t),  y_t = attention([persistent, h_{<=t}, x_{<=t}] of the stretch)
        M_t = M_{t-1} written with y_t,  out_t = W (norm(y_t) * sigmoid(norm(M_t(y_t))))

        stretch n    x ---> query --> M at its start --> h --+
                     x --------------------------------------+--> attention --> y --> * --> W
                                                             |                 |     ^
                     persistent tokens ----------------------+     writes M <--+--> M(y)

    Behrouz et al. 2025, arXiv:2501.00663, section 4.1, equations 21 to 25. Stretches are the
    memory's update chunks: `update_chunk` steps, counted from a segment's start. Read so, where
    the paper is open: attention at step t sees the answers h up to its own (all of them would show
    it later inputs), the memory is written token by token with gradients at the stretch's start,
    and the gate reads it as of its own step, so that nothing leaks; a token and the answer to it
    share a rotary position. `TitansMAL` is the order that public code calls MAC: memory first.

    Attributes as `TitansMAG`; a stretch takes the place of `window`. The memory's `outer_grad`
    counts stretches as its chunks: by default no gradient goes further back than 8 of them.
    """

    STATE: ClassVar[type] = TitansMACState

    def setup(self):
        body = nn.scan(
            nn.remat(Stretch, prevent_cse=False),
            variable_broadcast="params",
            variable_axes={"intermediates": 0},
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        self.stretch = body(
            self.make_memory(),
            self.features,
            self.heads,
            self.persistent_tokens,
            self.dtype,
            self.param_dtype,
        )
        self.output = self.dense(self.features)

    @nn.nowrap
    def make_memory(self):
        options = {"conv_width": 0, "output_gate": False, "output_norm": False, "max_segments": 1}
        return super().make_memory().clone(**options, parent=None)

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> TitansMACState:
        """Nothing remembered, and no stretch begun; `context` changes nothing."""
        memory = self.make_memory()
        dim = memory.dims()[1]
        held = (batch, 2, self.update_chunk, self.heads, dim)
        return TitansMACState(
            held=memory.init_state(batch).held,
            context=Context(*(jnp.zeros(held, self.activation_dtype()) for _ in range(2))),
            segment=no_segment(batch),
        )

    def mix(self, inputs, state, segment_ids):
        batch, time = inputs.shape[:2]
        state = enter(state, self.init_state(batch), segment_ids)
        segs = Segments(jnp.ones((batch, time), bool), jnp.zeros((batch, time), jnp.int32))
        most = 1
        if segment_ids is not None:
            segs = segments(segment_ids)
            most = time if self.max_segments is None else self.max_segments
        count = chunks_needed(time, self.update_chunk, True, most)
        layout = align(
            segs,
            jnp.maximum(state.held.position, 0),
            jnp.zeros((batch,), jnp.int32),
            0,
            self.update_chunk,
            count,
        )
        by_stretch = (batch, count, self.update_chunk)
        x = layout.gather(inputs).reshape(*by_stretch, self.features)
        # a stretch is one call of the memory, which by itself could not count to n
        outer_grad, cut = self.make_memory().outer_grad, jnp.zeros_like(layout.full)
        if isinstance(outer_grad, tuple | list):
            cut = (layout.number > 0) & (layout.number % outer_grad[1] == 0)
        now = (x, layout.filled.reshape(by_stretch), layout.restart, cut)
        carry = (state.held, state.context)
        if inputs.dtype == jnp.float64:  # then so are the sums, and what is added to them
            carry = jax.tree.map(
                lambda s: (
                    s.astype(jnp.result_type(s, jnp.float64))
                    if jnp.issubdtype(s.dtype, jnp.floating)
                    else s
                ),
                carry,
            )
        (held, context), y = self.stretch(carry, now)
        out = layout.scatter(y.reshape(batch, -1, self.features))
        if segment_ids is not None and self.max_segments is not None:
            too_many = segs.index[:, -1] >= self.max_segments
            out = jnp.where(too_many[:, None, None], jnp.nan, out)
        # what a finished or left stretch held is never read again
        live = jnp.arange(self.update_chunk) < held.position[:, None]
        context = jax.tree.map(lambda c: jnp.where(live[:, None, :, None, None], c, 0), context)
        return out, TitansMACState(held=held, context=context, segment=leave(state, segment_ids))
