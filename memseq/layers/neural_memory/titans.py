"""Titans: a long-term memory alone, beside attention and below it."""

from typing import Any, ClassVar

import flax.linen as nn
import jax

from memseq.layers.attention.cache import SoftmaxAttentionState
from memseq.layers.common.base import SequenceLayer, leave, no_segment, state_dataclass
from memseq.layers.common.parts import RMSNorm
from memseq.layers.neural_memory.neural_memory import NeuralMemory, NeuralMemoryState
from memseq.layers.neural_memory.persistent_attention import PersistentAttention
from memseq.pallas_kernels.common.checks import check_choice


@state_dataclass
class TitansLMMState(NeuralMemoryState):
    """State of `TitansLMM`."""


class TitansLMM(NeuralMemory):
    """Titans' long-term memory without attention: an MLP, surprise with momentum, forgetting.

        S_t = momentum_t S_{t-1} - step_t grad |M(k_t) - v_t|^2,  W_t = keep_t W_{t-1} + S_t

    Behrouz et al. 2025, arXiv:2501.00663, equations 9 to 15; keep is their 1 - alpha, step twice
    their theta (the loss here has the factor 1/2), momentum their eta. What the paper leaves open
    is read so: gates are sigmoids of linear maps, one number a head and step; M(x) = x + norm of a
    two-layer MLP with GELU, four times as wide; W_0 is learned; the momentum starts at zero with
    every segment and goes on over chunks and calls; chunks of 16. Attributes as `NeuralMemory`.
    """

    PAPER: ClassVar[str] = "Behrouz et al. 2025, arXiv:2501.00663"
    STATE: ClassVar[type] = TitansLMMState


@state_dataclass
class TitansMAGState:
    """State of `TitansMAG`.

    Attributes:
        long_term: of the neural memory.
        short_term: of the attention, a ring of `window` keys and values.
        segment: int32 [batch], id of the segment both belong to, -1 for none yet.
    """

    long_term: TitansLMMState
    short_term: SoftmaxAttentionState
    segment: jax.Array


class TitansMAG(SequenceLayer):
    """Memory as a gate: attention in a window and a neural memory read the same input.

        y = W (norm(attention(x)) * sigmoid(norm(memory(x))))

        x --+--> attention, `window` steps, persistent tokens --> norm ----------+
            |                                                                    * --> W --> y
            +--> TitansLMM, the whole segment ----------------> norm, sigmoid ---+

    Behrouz et al. 2025, arXiv:2501.00663, section 4.2, equations 26 to 28. The paper's prefix of
    persistent tokens is in the attention; in the memory, which would be written with the same
    tokens before every segment, the learned W_0 stands for what they leave. Each branch has its
    own projections.

    Attributes (beside those of every layer):
        window: positions that attention sees, the present one included.
        persistent_tokens: learned tokens that attention always sees.
        update_chunk: of the memory, part of the model.
        max_segments: the most segments of a row in one call; a row with more gives NaN, see
            `NeuralMemory`.
        memory_options: further attributes of `TitansLMM`, by name.
    """

    window: int = 64
    persistent_tokens: int = 4
    update_chunk: int = 16
    max_segments: int | None = 8
    memory_options: Any = ()

    PAPER: ClassVar[str] = "Behrouz et al. 2025, arXiv:2501.00663"
    MEMORY: ClassVar[str] = "weights of a network a head; keys and values of a window"
    OPERATION: ClassVar[str] = "neural_memory"
    STATE: ClassVar[type] = TitansMAGState

    def setup(self):
        self.long_term = self.make_memory()
        self.short_term = self.make_attention()
        self.memory_norm = RMSNorm(param_dtype=self.param_dtype)
        self.attention_norm = RMSNorm(param_dtype=self.param_dtype)
        self.output = self.dense(self.features)

    @nn.nowrap
    def _common(self) -> dict[str, Any]:
        return {
            "features": self.features,
            "heads": self.heads,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "max_segments": self.max_segments,
            "parent": None,
        }

    @nn.nowrap
    def make_memory(self) -> TitansLMM:
        options = {"update_chunk": self.update_chunk, "implementation": self.implementation}
        return TitansLMM(**self._common() | options | dict(self.memory_options))

    @nn.nowrap
    def make_attention(self) -> PersistentAttention:
        return PersistentAttention(
            **self._common(),
            implementation=self.plain_implementation(),
            window=self.window,
            persistent_tokens=self.persistent_tokens,
        )

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> Any:
        """Nothing remembered, over the long or the short term; `context` changes nothing."""
        return self.STATE(
            long_term=self.make_memory().init_state(batch),
            short_term=self.make_attention().init_state(batch),
            segment=no_segment(batch),
        )

    def project(self, x):
        return x

    def mix(self, inputs, state, segment_ids):
        given = self._parts(state)
        remembered, long_term = self.long_term(inputs, given[0], segment_ids)
        attended, short_term = self.short_term(inputs, given[1], segment_ids)
        out = self.attention_norm(attended) * nn.sigmoid(self.memory_norm(remembered))
        return out, self._after(state, inputs.shape[0], long_term, short_term, segment_ids)

    def _parts(self, state) -> tuple[Any, Any]:
        """The states of memory and attention, which know for themselves where they restart."""
        if state is None:
            return None, None
        if type(state) is not self.STATE:
            raise ValueError(f"state: expected {self.STATE.__name__}, got {type(state).__name__}")
        return state.long_term, state.short_term

    def _after(self, state, batch, long_term, short_term, segment_ids):
        segment = leave(self.init_state(batch) if state is None else state, segment_ids)
        return self.STATE(long_term=long_term, short_term=short_term, segment=segment)

    def finish(self, x, out):
        return self.output(out)


@state_dataclass
class TitansMALState(TitansMAGState):
    """State of `TitansMAL`."""


class TitansMAL(TitansMAG):
    """Memory as a layer: a neural memory, and attention in a window on what it gives.

        y = W attention(norm(memory(x)))

    Behrouz et al. 2025, arXiv:2501.00663, section 4.3, equations 29 to 31. Persistent tokens as in
    `TitansMAG`.

    Attributes (beside those of `TitansMAG`):
        order: "memory_first", the paper's, or "attention_first": memory(norm(attention(x))).
    """

    order: str = "memory_first"

    STATE: ClassVar[type] = TitansMALState

    def setup(self):
        check_choice("order", self.order, ("memory_first", "attention_first"))
        self.long_term = self.make_memory()
        self.short_term = self.make_attention()
        self.norm = RMSNorm(param_dtype=self.param_dtype)
        self.output = self.dense(self.features)

    def mix(self, inputs, state, segment_ids):
        long_term, short_term = self._parts(state)
        x = inputs
        if self.order == "memory_first":
            x, long_term = self.long_term(x, long_term, segment_ids)
            out, short_term = self.short_term(self.norm(x), short_term, segment_ids)
        else:
            x, short_term = self.short_term(x, short_term, segment_ids)
            out, long_term = self.long_term(self.norm(x), long_term, segment_ids)
        return out, self._after(state, inputs.shape[0], long_term, short_term, segment_ids)
