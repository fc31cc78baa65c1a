"""Writes that are a softmax over all time so far: LightNet, attention with bounded memory."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import count_positions, merge_heads, rotate, split_heads, widen
from memseq.layers.linear_attention.gated_slot_attention import (
    GatedSlotAttentionState,
    two_passes,
)
from memseq.pallas_kernels import linear_attention
from memseq.pallas_kernels.common import context
from memseq.pallas_kernels.common.checks import check_count
from memseq.pallas_kernels.common.segments import begins

NOTHING = -1e30  # the logarithm of a sum of nothing, finite so that gradients are


def cumulative_softmax(
    logits: jax.Array, total: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The softmax over a segment's positions so far, as what is written and what is kept.

    With z_t = log sum_{s <= t} exp(logits_s), a sum of values weighted by that softmax takes
    exp(logits_t - z_t) of the present one and keeps exp(z_{t-1} - z_t) of itself.

    Args:
        logits: [batch, time, ...].
        total: [batch, ...], z before the first position; `NOTHING` where there was none.
        segment_ids: int32 [batch, time], as everywhere.

    Returns:
        (written, log decay, z after the last position), float32 at least. At padding nothing is
        kept or written that an operation would see.
    """
    logits = widen(logits)
    total = total.astype(logits.dtype)
    restart = jnp.zeros(logits.shape[:2], bool)
    if segment_ids is not None:
        restart = begins(segment_ids)
        logits = jnp.where(_outer(segment_ids >= 0, logits), logits, NOTHING)

    def joined(old, new_segment, new):
        return jnp.where(_outer(new_segment, new), new, jnp.logaddexp(old, new))

    def combine(first, second):
        return first[0] | second[0], joined(first[1], *second)

    def running(total):
        """z before the first position, and after each."""
        carried = jnp.concatenate([total[:, None], logits], axis=1)
        starts = jnp.pad(restart, ((0, 0), (1, 0)))
        return jax.lax.associative_scan(combine, (starts, carried), axis=1)[1]

    split = context.axis() is not None
    if split:
        added = running(jnp.full_like(total, NOTHING))[:, -1]
        total = context.carried_in(
            total,
            (restart.any(axis=1), added),
            lambda stretch, z: joined(z, *stretch),
            None,
        )
    sums = running(total)
    last = context.at_the_end(sums[:, -1]) if split else sums[:, -1]
    before, after = sums[:, :-1], sums[:, 1:]
    empty = _outer(restart, before) | (before <= NOTHING / 2)
    log_decay = jnp.where(empty, 0, before - after)
    return jnp.exp(logits - after), jnp.minimum(log_decay, 0), last


def _outer(mask: jax.Array, like: jax.Array) -> jax.Array:
    """mask [batch] or [batch, time] with axes for the rest of `like`."""
    return mask.reshape(*mask.shape, *[1] * (like.ndim - mask.ndim))


@state_dataclass
class LightNetState(MatrixState):
    """A matrix memory and what its keys have been normalised by.

    Attributes (beside those of `MatrixState`):
        total: float32 [batch, heads, key_dim], log of the sum of exp(key) so far.
    """

    total: jax.Array


class LightNet(MatrixLayer):
    """Each key channel holds the mean of the values, weighted by a softmax over the past.

        z_t = log sum_{s <= t} exp(k_s),
        S_t = Diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(k_t - z_t) v_t^T,
        out_t = S_t^T silu(q_t) / sqrt(key_dim)

    Qin et al. 2024, "You Only Scan Once: LightNet", arXiv:2405.21022 (its additive
    decay), without the paper's positional encodings. Nothing about the decay is learned: it is that
    of a mean, 1 - 1/t for equal keys.

    Attributes (beside those of every layer and of `MatrixLayer`):
        output_norm: RMS norm over all heads of the read-out.
        gate_rank: inner size of the output gate's projection.
    """

    output_gate: bool = True
    gate_rank: int = 128

    PAPER: ClassVar[str] = "Qin et al. 2024, arXiv:2405.21022"
    MEMORY: ClassVar[str] = "matrix and normaliser [heads, key_dim, value_dim + 1]"
    OPERATION: ClassVar[str] = "linear_attention"
    STATE: ClassVar[type] = LightNetState

    def setup(self):
        check_count("gate_rank", self.gate_rank, 1)
        self.setup_matrix(activation=None)

    @nn.nowrap
    def make_gate(self, size):
        return nn.Sequential([self.dense(self.gate_rank), self.dense(size)])

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> LightNetState:
        key_heads, key_dim, _, _ = self.dims()
        return self.empty_state(batch, total=jnp.full((batch, key_heads, key_dim), NOTHING))

    def mix(self, inputs, state, segment_ids):
        (mixed,) = inputs
        state = enter(state, self.init_state(mixed.shape[0]), segment_ids)
        query, key, value, conv = self.convolve(mixed, state, segment_ids)
        written, log_decay, total = cumulative_softmax(key, state.total, segment_ids)
        out, memory = linear_attention(
            nn.silu(query),
            written.astype(value.dtype),
            value,
            self.sow_decay(log_decay),
            initial_state=state.memory,
            **self.operation_options(segment_ids),
        )
        return out, self.leave_with(state, segment_ids, memory=memory, conv=conv, total=total)

    def finish(self, x, out):
        return super().finish(x, split_heads(merge_heads(out), 1))


@state_dataclass
class ABCState(GatedSlotAttentionState):
    """Slots, what they have been normalised by, and how far their segment has come.

    Attributes (beside those of `GatedSlotAttentionState`):
        total: float32 [batch, heads, slots], log of the sum of exp(logit) so far.
        position: int32 [batch], positions of the segment so far.
    """

    total: jax.Array
    position: jax.Array


class ABC(MatrixLayer):
    """Softmax attention over slots, each a mean of the keys and values that chose it.

        w_s,t = exp(l_s - z_t),  z_t = log sum_{s <= t} exp(l_s),  l_t = W x_t for each slot,
        K_t = sum_{s <= t} k_s w_s,t^T,  V_t = sum_{s <= t} w_s,t v_s^T,
        out_t = V_t^T softmax(K_t^T q_t / sqrt(key_dim))

    Peng et al. 2022, "ABC: Attention with Bounded-memory Control", arXiv:2110.02488 (its learned
    strategy, normalised over the past): `GatedSlotAttention` in which the normaliser takes the
    gates' place. Queries and keys are rotated by their position in the segment; logits are cut to
    +-32.

    Attributes (beside those of every layer and of `MatrixLayer`):
        key_dim: size of a key per head; None is half of features / heads.
        slots: keys and values a head's memory holds.
        rope_base: base of the rotation's wavelengths.
    """

    output_gate: bool = True
    slots: int = 64
    rope_base: float = 10_000.0

    PAPER: ClassVar[str] = "Peng et al. 2022, arXiv:2110.02488"
    MEMORY: ClassVar[str] = "slots [heads, slots, key_dim + value_dim]"
    OPERATION: ClassVar[str] = "linear_attention"
    STATE: ClassVar[type] = ABCState

    def setup(self):
        check_count("slots", self.slots, 1)
        if self.dims()[1] % 2:
            raise ValueError(f"key_dim: rotary positions need an even size, got {self.dims()[1]}")
        self.setup_matrix(activation=None)
        self.choice = self.dense(self.heads * self.slots)

    @nn.nowrap
    def dims(self):
        key_heads, key_dim, heads, value_dim = super().dims()
        return key_heads, key_dim // 2 if self.key_dim is None else key_dim, heads, value_dim

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> Any:
        _, key_dim, heads, value_dim = self.dims()
        return self.empty_state(
            batch,
            memory=jnp.zeros((batch, heads, self.slots, value_dim), jnp.float32),
            keys=jnp.zeros((batch, heads, key_dim, self.slots), jnp.float32),
            total=jnp.full((batch, heads, self.slots), NOTHING),
            position=jnp.zeros((batch,), jnp.int32),
        )

    def gates(self, x):
        return (split_heads(jnp.clip(widen(self.choice(x)), -32.0, 32.0), self.heads),)

    def mix(self, inputs, state, segment_ids):
        mixed, logits = inputs
        state = enter(state, self.init_state(mixed.shape[0]), segment_ids)
        query, key, value, conv = self.convolve(mixed, state, segment_ids)
        position, reached = count_positions(state.position, mixed.shape[1], segment_ids)
        written, log_decay, total = cumulative_softmax(logits, state.total, segment_ids)
        out, keys, values = two_passes(
            rotate(query, position, self.rope_base),
            rotate(key, position, self.rope_base),
            value,
            written,
            self.sow_decay(log_decay),
            state,
            scale=query.shape[-1] ** -0.5,
            **self.operation_options(segment_ids),
        )
        fields = {"memory": values, "keys": keys, "total": total, "position": reached}
        return out, self.leave_with(state, segment_ids, conv=conv, **fields)
