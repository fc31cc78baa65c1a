"""What layers have in common that read what a layer below them left in `shared`."""

from typing import Any, ClassVar

import flax.linen as nn
import jax

from memseq.layers.attention.cache import Seen
from memseq.layers.common.base import SequenceLayer, enter, leave, no_segment, state_dataclass
from memseq.layers.common.parts import take_step


@state_dataclass
class ReaderState:
    """State of a layer that holds nothing of its own.

    Attributes:
        segment: int32 [batch], id of the last segment, -1 for none yet.
    """

    segment: jax.Array


class SharedReader(SequenceLayer):
    """A layer without a memory: it reads that of a layer below it, of the same call.

    Subclasses write `project`, `recall_shared` and `finish`. They stand in
    `memseq.layers.SHARED_LAYERS`, as they work above a layer that shares and nowhere else.
    """

    OPERATION: ClassVar[str | None] = None
    STATE: ClassVar[type] = ReaderState
    SHARES: ClassVar[bool] = True
    READS: ClassVar[str]  # the key in `shared`, which is named as the layer that leaves it

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> ReaderState:
        """The segment's id alone; `context` changes nothing."""
        return ReaderState(no_segment(batch))

    def mix(self, inputs, state, segment_ids, shared):
        if self.READS not in shared:
            raise ValueError(
                f"pattern: expected a layer {self.READS!r} below {type(self).__name__}, which "
                "reads what that leaves, got none"
            )
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        out = self.recall_shared(inputs, shared[self.READS])
        return out, ReaderState(leave(state, segment_ids))

    def recall_shared(self, inputs: jax.Array, held: Any) -> jax.Array:
        """The read-out, from what `project` gave and what the layer below left."""
        raise NotImplementedError(f"{type(self).__name__} has no recall_shared")


def read_at(shared: dict[str, Any], position: jax.Array) -> dict[str, Any]:
    """What was left in `shared`, for the readers of one step of each row: time is 1.

    position: int32 [batch], that step. Of a cache all keys and values stay.
    """

    def step(held):
        if not isinstance(held, Seen):
            return take_step(held, position)
        return held._replace(
            query_positions=take_step(held.query_positions, position),
            query_segments=take_step(held.query_segments, position),
        )

    return {name: step(held) for name, held in shared.items()}
