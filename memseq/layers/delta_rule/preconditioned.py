"""Delta rule layers whose writes are scaled by the curvature of what they have seen."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.matrix import MatrixState
from memseq.layers.common.parts import MambaGate, l2_normalize, widen
from memseq.layers.delta_rule.gated_delta_net import GatedDeltaNet
from memseq.layers.delta_rule.kimi_delta_attention import KimiDeltaAttention
from memseq.pallas_kernels import delta_rule, linear_scan


@state_dataclass
class PreconditionedState(MatrixState):
    """A matrix memory and the curvature of its keys.

    Attributes (beside those of `MatrixState`):
        curvature: float32 [batch, heads, key_dim], a decaying sum of squared keys.
    """

    curvature: jax.Array


class Preconditioned:
    """A mixin before a delta rule layer: writes under k * m, with a scale m of each key channel.

        A_t = c_t A_{t-1} + rate_t k_t^2,  m_t = bound^-softsign(log(A_t + 1e-6) - center),
        S'_t = decay_t * S_{t-1},  S_t = S'_t + beta_t (m_t * k_t) (v_t - S'_t^T k_t)^T

    Tumma et al. 2026, "Preconditioned DeltaNet", arXiv:2604.21100: the diagonal of the inverse Gram
    matrix of the keys, squashed to [1 / bound, bound]. Channels that keys used a lot are written
    with less, others with more. The curvature has a gate and a rate of its own, and a learned
    centre, each a number a head.

    The layer has a field `bound`: the largest scale, in [1, 2]; 1 is the layer without.
    """

    A_MIN: ClassVar[float] = 0.0

    def setup_curvature(self):
        """What `setup` of a layer adds: Linen sees a setup in modules alone, not in a mixin."""
        if not 1 <= self.bound <= 2:
            raise ValueError(f"bound: expected a factor in [1, 2], got {self.bound}")
        self.curvature_decay = self.dense(self.heads)
        self.curvature_gate = MambaGate(self.heads, a_min=self.A_MIN)
        self.curvature_rate = self.dense(self.heads)
        start = nn.initializers.constant(-0.2)
        self.center_bias = self.param("center_bias", start, (self.heads,), jnp.float32)

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> PreconditionedState:
        heads, key_dim, _, _ = self.dims()
        return self.empty_state(batch, curvature=jnp.zeros((batch, heads, key_dim), jnp.float32))

    def gates(self, x):
        _, log_keep = self.curvature_gate(self.curvature_decay(x))
        return *super().gates(x), log_keep, nn.sigmoid(widen(self.curvature_rate(x)))

    def mix(self, inputs, state, segment_ids):
        mixed, beta, log_decay, log_keep, rate = inputs
        state = enter(state, self.init_state(mixed.shape[0]), segment_ids)
        query, key, value, conv = self.convolve(mixed, state, segment_ids)
        key = l2_normalize(key)
        batch, time, heads, key_dim = key.shape
        seen, curvature = linear_scan(
            (rate[..., None] * widen(key) ** 2).reshape(batch, time, -1),
            jnp.repeat(log_keep, key_dim, axis=-1),
            initial_state=state.curvature.reshape(batch, -1),
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
            implementation=self.plain_implementation(),
        )
        surplus = jnp.log(seen.reshape(key.shape) + 1e-6) - self.center_bias[:, None]
        scale = jnp.exp(-math.log(self.bound) * nn.soft_sign(surplus))
        self.sow("intermediates", "mean_scale", scale.mean())
        out, memory = delta_rule(
            l2_normalize(query),
            (scale * key).astype(key.dtype),
            value,
            beta,
            log_decay,
            erase_key=key,
            initial_state=state.memory,
            **self.operation_options(segment_ids),
        )
        fields = {"memory": memory, "curvature": curvature.reshape(batch, heads, key_dim)}
        return out, self.leave_with(state, segment_ids, conv=conv, **fields)


@state_dataclass
class PreconditionedGatedDeltaNetState(PreconditionedState):
    """State of `PreconditionedGatedDeltaNet`."""


class PreconditionedGatedDeltaNet(Preconditioned, GatedDeltaNet):
    """`GatedDeltaNet` with `Preconditioned` writes.

    Attributes (beside those of `GatedDeltaNet`):
        bound: largest scale of a write's key, in [1, 2].
    """

    bound: float = 1.5

    PAPER: ClassVar[str] = "Tumma et al. 2026, arXiv:2604.21100"
    MEMORY: ClassVar[str] = "matrix [value_heads, key_dim, value_dim] and curvature"
    STATE: ClassVar[type] = PreconditionedGatedDeltaNetState

    def setup(self):
        super().setup()
        self.setup_curvature()


@state_dataclass
class PreconditionedKimiDeltaAttentionState(PreconditionedState):
    """State of `PreconditionedKimiDeltaAttention`."""


class PreconditionedKimiDeltaAttention(Preconditioned, KimiDeltaAttention):
    """`KimiDeltaAttention` with `Preconditioned` writes.

    Attributes (beside those of `KimiDeltaAttention`):
        bound: largest scale of a write's key, in [1, 2].
    """

    bound: float = 1.5

    PAPER: ClassVar[str] = "Tumma et al. 2026, arXiv:2604.21100"
    MEMORY: ClassVar[str] = "matrix [value_heads, key_dim, value_dim] and curvature"
    STATE: ClassVar[type] = PreconditionedKimiDeltaAttentionState
    A_MIN: ClassVar[float] = 1.0

    def setup(self):
        super().setup()
        self.setup_curvature()
