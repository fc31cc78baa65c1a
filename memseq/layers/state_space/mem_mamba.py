"""MemMamba: Mamba beside notes of tokens that were worth one."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import SequenceLayer, enter, no_segment, state_dataclass
from memseq.layers.common.parts import merge_heads, split_heads, widen
from memseq.layers.recurrent.step import scan_steps
from memseq.layers.state_space.kept_tokens import attend, enqueue, mamba_of, pair_of
from memseq.layers.state_space.mamba import MambaState
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class MemMambaState:
    """State of `MemMamba`.

    Attributes:
        fading: state of the Mamba layer.
        memory: float32 [batch, notes, 2, heads, head_dim], keys and values of notes, oldest first.
        filled: float32 [batch, notes], what a note was worth; 0 for an empty slot.
        segment: int32 [batch].
    """

    fading: MambaState
    memory: jax.Array
    filled: jax.Array
    segment: jax.Array


class MemMamba(SequenceLayer):
    """Mamba with a pool of notes: tokens worth one leave it, steps in need of one read them.

        out_t = f_t + [r_t > recall_above] r_t W attend(q_t, notes),  f = mamba(x),
        a note (K x_t, s_t V x_t) is left where s_t > note_above,
        s_t = sigmoid(w_s x_t),  r_t = sigmoid(w_r f_t),  q_t = Q f_t

    Wang et al. 2025, "MemMamba: rethinking memory patterns in state space model",
    arXiv:2510.03279; no code was published. This is its note block and its attention across
    tokens; `LayeredMemMamba` adds attention across layers. A full pool drops its oldest note.
    Thresholds have no gradient, but s and r weigh what passes them, so both are learned.

    Attributes (beside those of every layer):
        notes: size of the pool.
        note_above, recall_above: thresholds, in [0, 1).
        state_dim: of the Mamba layer.
    """

    notes: int = 32
    note_above: float = 0.5
    recall_above: float = 0.5
    state_dim: int = 16

    PAPER: ClassVar[str] = "Wang et al. 2025, arXiv:2510.03279"
    MEMORY: ClassVar[str] = "vectors [channels, state_dim] and notes"
    OPERATION: ClassVar[str] = "selective_scan"
    STATE: ClassVar[type] = MemMambaState

    def setup(self):
        self._dims()
        for name in ("note_above", "recall_above"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= threshold < 1, got {getattr(self, name)}")
        self.fading = mamba_of(self)
        for name in ("query", "key", "value"):
            setattr(self, name, self.dense(self.features))
        self.worth = self.dense(1, use_bias=True)
        self.need = self.dense(1, use_bias=True)
        self.output = self.dense(self.features)

    @nn.nowrap
    def _dims(self) -> tuple[int, int]:
        """(heads, head_dim)."""
        check_count("notes", self.notes, 1)
        return self.heads, self.split_features("heads", None)

    @nn.nowrap
    def init_state(self, batch, context=None):
        """An empty memory and an empty pool; `context` changes nothing."""
        heads, head_dim = self._dims()
        return self.STATE(
            fading=mamba_of(self, parent=None).init_state(batch),
            memory=jnp.zeros((batch, self.notes, 2, heads, head_dim), jnp.float32),
            filled=jnp.zeros((batch, self.notes), jnp.float32),
            segment=no_segment(batch),
        )

    def project(self, x):
        return x, self.key(x), self.value(x), nn.sigmoid(widen(self.worth(x)))

    def mix(self, inputs, state, segment_ids):
        x, key, value, worth = inputs
        heads, _ = self._dims()
        fresh = self.init_state(x.shape[0])
        state = enter(state, fresh, segment_ids)
        faded, fading = self.fading(x, state.fading, segment_ids)
        need = nn.sigmoid(widen(self.need(faded)))
        self.sow("intermediates", "mean_worth", worth.mean())
        self.sow("intermediates", "mean_need", need.mean())
        note = pair_of(widen(key), worth * widen(value), heads)
        query = split_heads(widen(self.query(faded)), heads)
        dtype = jnp.result_type(note, query, state.memory)

        def step(carried, inputs):
            memory, filled = carried
            note, worth, query = inputs
            left = worth > self.note_above
            filled = jnp.where(left, enqueue(filled, worth[:, 0]), filled)
            memory = jnp.where(left[:, :, None, None, None], enqueue(memory, note), memory)
            return (memory, filled), attend(query, memory, filled > 0)

        out, (memory, filled) = scan_steps(
            step,
            (state.memory.astype(dtype), state.filled.astype(dtype)),
            (note.astype(dtype), worth.astype(dtype), query.astype(dtype)),
            segment_ids,
            (fresh.memory.astype(dtype), fresh.filled.astype(dtype)),
        )
        recalled = jnp.where(need > self.recall_above, need, 0) * merge_heads(out)
        out = faded, recalled.astype(faded.dtype)
        return out, self.leave_with(state, segment_ids, fading=fading, memory=memory, filled=filled)

    def finish(self, x, out):
        faded, recalled = out
        return faded + self.output(recalled)
