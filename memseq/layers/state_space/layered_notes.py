"""MemMamba whose layers read one another."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from memseq.layers.common.base import check_layer_index, state_dataclass
from memseq.layers.common.parts import merge_heads, split_heads
from memseq.layers.state_space.kept_tokens import attend
from memseq.layers.state_space.mem_mamba import MemMamba, MemMambaState
from memseq.pallas_kernels.common.checks import check_count

_SUMMARIES = "layered_mem_mamba"


@state_dataclass
class LayeredMemMambaState(MemMambaState):
    """State of `LayeredMemMamba`; as `MemMambaState`."""


class LayeredMemMamba(MemMamba):
    """MemMamba with attention across layers: every few layers one reads those below it.

        out_t = (MemMamba's) + W' attend(Q' f_t, {(K' s^j_t, V' s^j_t): layers j up to this one}),
        s^j_t = f^j_t + [r_t > recall_above] r_t attend(q_t, notes), as in `MemMamba`

    Wang et al. 2025, "MemMamba: rethinking memory patterns in state space model",
    arXiv:2510.03279, has cross-layer attention at fixed intervals of depth, over summaries of the
    layers' states. No code was published; here the summary of a layer is what its fading memory
    and its notes gave at the same step, so a step of the layer needs nothing of other steps and the
    state is that of `MemMamba`.

    Attributes (beside those of `MemMamba`):
        every: layers every, 2 every, ... of a model read across; the others only leave a summary.
        layer_index, num_layers: place of this layer among those of a model, from 0.
    """

    every: int = 2
    layer_index: int = 0
    num_layers: int = 1

    STATE: ClassVar[type] = LayeredMemMambaState
    SHARES: ClassVar[bool] = True

    def setup(self):
        super().setup()
        check_count("every", self.every, 1)
        check_layer_index(self.layer_index, self.num_layers)
        if self._reads():
            for name in ("across_query", "across_key", "across_value", "across_output"):
                setattr(self, name, self.dense(self.features))

    def _reads(self) -> bool:
        return (self.layer_index + 1) % self.every == 0

    def mix(self, inputs, state, segment_ids, shared):
        (faded, recalled), state = super().mix(inputs, state, segment_ids)
        found = shared[_SUMMARIES] = (*shared.get(_SUMMARIES, ()), faded + recalled)
        if not self._reads():
            return (faded, recalled, None), state
        summaries = jnp.stack(found, axis=2)  # [batch, time, layers, features]
        pairs = [
            split_heads(part(summaries), self.heads)
            for part in (self.across_key, self.across_value)
        ]
        pairs = jnp.stack(pairs, axis=3)
        query = split_heads(self.across_query(faded), self.heads)
        seen = jnp.ones((query.shape[0], len(found)), bool)
        read = jax.vmap(attend, (1, 1, None), 1)(query, pairs, seen)
        return (faded, recalled, merge_heads(read).astype(faded.dtype)), state

    def finish(self, x, out):
        faded, recalled, across = out
        y = super().finish(x, (faded, recalled))
        return y if across is None else y + self.across_output(across)
