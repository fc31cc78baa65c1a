"""Log-linear Mamba-2 and Gated DeltaNet."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import SequenceLayer, state_dataclass
from memseq.layers.common.parts import l2_normalize, split_heads, widen
from memseq.layers.delta_rule.gated_delta_net import GatedDeltaNet, GatedDeltaNetState
from memseq.layers.state_space.mamba2 import Mamba2, Mamba2State
from memseq.pallas_kernels import log_linear_attention
from memseq.pallas_kernels.common.checks import check_count
from memseq.pallas_kernels.log_linear_attention import LogLinearState


class LogLinear(SequenceLayer):
    """What turns a layer's memory into memories of the last 1, 2, 4, ... steps.

    A read weighs them by level_weight_t = softplus(level_scale * (W x_t)), of which each head has
    one a level; level_scale starts at 1.

    Attributes:
        max_length: steps up to which every level is its own: 1 + log2 of it levels. What is older
            joins the last level; calls and sequences can be longer.
    """

    max_length: int = 16384

    def setup_levels(self, heads: int) -> None:
        size = (heads, self.levels())
        self.level = self.dense(heads * self.levels())
        self.level_scale = self.param("level_scale", nn.initializers.ones, size, jnp.float32)

    @nn.nowrap
    def levels(self) -> int:
        check_count("max_length", self.max_length, 2)
        return 1 + (self.max_length - 1).bit_length()

    def level_weights(self, x: jax.Array) -> jax.Array:
        """[batch, time, heads, levels]; sows their mean."""
        logits = widen(split_heads(self.level(x), self.level_scale.shape[0]))
        weights = nn.softplus(self.level_scale * logits)
        self.sow("intermediates", "mean_level_weight", weights.mean())
        return weights

    @nn.nowrap
    def empty_levels(self, batch: int, *shape: int) -> dict[str, jax.Array]:
        """The state's fields `memory` and `position` for memories of shape (heads, key, value)."""
        heads, *matrix = shape
        memory = jnp.zeros((batch, heads, self.levels() - 1, *matrix), jnp.float32)
        return {"memory": memory, "position": jnp.zeros((batch,), jnp.int32)}

    @nn.nowrap
    def recall(self, state: Any) -> LogLinearState:
        return LogLinearState(state.memory, state.position)

    @nn.nowrap
    def keep(self, memory: LogLinearState) -> dict[str, jax.Array]:
        return {"memory": memory.memories, "position": memory.position}


@state_dataclass
class LogLinearMamba2State(Mamba2State):
    """`memory` is [batch, heads, levels - 1, state_dim, head_dim], `position` int32 [batch]."""

    position: jax.Array


class LogLinearMamba2(Mamba2, LogLinear):
    """Mamba-2 with a memory for each scale of the past, see `log_linear_attention`.

    Guo et al. 2025, "Log-Linear Attention", arXiv:2506.04761, section 3.4. Attributes as `Mamba2`
    and `LogLinear`.
    """

    PAPER: ClassVar[str] = "Guo et al. 2025, arXiv:2506.04761"
    MEMORY: ClassVar[str] = "matrices [heads, levels - 1, state_dim, head_dim]"
    OPERATION: ClassVar[str] = "log_linear_attention"
    STATE: ClassVar[type] = LogLinearMamba2State

    def setup(self):
        super().setup()
        self.setup_levels(self._dims()[1])

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> LogLinearMamba2State:
        """Empty memories at position 0; `context` changes nothing."""
        _, heads, head_dim = self._dims()
        return self.empty_state(batch, **self.empty_levels(batch, heads, self.state_dim, head_dim))

    def project(self, x):
        return *super().project(x), self.level_weights(x)

    def operate(self, query, key, value, log_decay, weights, **options):
        return log_linear_attention(query, key, value, weights, log_decay, **options)


@state_dataclass
class LogLinearGatedDeltaNetState(GatedDeltaNetState):
    """`memory` is [batch, heads, levels - 1, key_dim, value_dim], `position` int32 [batch]."""

    position: jax.Array


class LogLinearGatedDeltaNet(GatedDeltaNet, LogLinear):
    """Gated DeltaNet with a memory for each scale of the past, see `log_linear_attention`.

    Every memory forgets and is corrected as the one memory of Gated DeltaNet is. Guo et al. 2025,
    "Log-Linear Attention", arXiv:2506.04761, section 3.4. Attributes as `GatedDeltaNet` and
    `LogLinear`.
    """

    PAPER: ClassVar[str] = "Guo et al. 2025, arXiv:2506.04761"
    MEMORY: ClassVar[str] = "matrices [value_heads, levels - 1, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "log_linear_attention"
    STATE: ClassVar[type] = LogLinearGatedDeltaNetState

    def setup(self):
        super().setup()
        self.setup_levels(self.dims()[2])

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> LogLinearGatedDeltaNetState:
        """Empty memories at position 0; `context` changes nothing."""
        _, key_dim, heads, value_dim = self.dims()
        return self.empty_state(batch, **self.empty_levels(batch, heads, key_dim, value_dim))

    def gates(self, x):
        return *super().gates(x), self.level_weights(x)

    def operate(self, query, key, value, beta, log_decay, weights, **options):
        query, key = l2_normalize(query), l2_normalize(key)
        return log_linear_attention(query, key, value, weights, log_decay, beta, **options)
