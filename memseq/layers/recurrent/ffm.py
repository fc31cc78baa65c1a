"""Fast and forgetful memory."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.parts import widen
from memseq.layers.common.vector import VectorLayer, VectorState
from memseq.pallas_kernels import linear_scan
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class FFMState(VectorState):
    """State of `FFM`; `memory` is [batch, trace_dim, context_dim, 2], real and imaginary parts."""


class FFM(VectorLayer):
    """Fast and forgetful memory: a few traces of the input, each fading and turning at many rates.

        S_t = gamma S_{t-1} + u_t 1^T,  gamma = exp(-|decay| + i phase_log) on a grid
        [trace_dim, context_dim],  u_t = (W_1 x_t) * sigmoid(W_2 x_t),
        y_t = LayerNorm(W_3 [Re S_t, Im S_t]) * g + (W_5 x_t) * (1 - g),  g = sigmoid(W_4 x_t)

    Morad et al. 2023, "Reinforcement learning with fast and forgetful memory", arXiv:2310.04128,
    section 4. Rates depend on the trace and turns on the context; they start as in the authors'
    code, rates linear from e down to 1e-6, periods linear from 1 to 1024 steps.

    Attributes (beside those of every layer):
        trace_dim: traces of the input.
        context_dim: turns a trace is remembered with.
    """

    trace_dim: int = 32
    context_dim: int = 4

    PAPER: ClassVar[str] = "Morad et al. 2023, arXiv:2310.04128"
    MEMORY: ClassVar[str] = "complex matrix [trace_dim, context_dim]"
    OPERATION: ClassVar[str] = "linear_scan"
    STATE: ClassVar[type] = FFMState

    def setup(self):
        traces, contexts, _ = self.memory_shape()

        def rates(key, shape):
            return jnp.linspace(math.e, 1e-6, *shape)

        def turns(key, shape):
            return 2 * jnp.pi / jnp.linspace(1.0, 1024.0, *shape)

        self.decay = self.param("decay", rates, (traces,))
        self.phase = self.param("phase", turns, (contexts,))
        self.input = self.dense(traces, use_bias=True)
        self.input_gate = self.dense(traces, use_bias=True)
        self.read = self.dense(self.features, use_bias=True)
        self.gate = self.dense(self.features, use_bias=True)
        self.skip = self.dense(self.features, use_bias=True)
        self.norm = nn.LayerNorm(
            use_scale=False, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
        )

    @nn.nowrap
    def memory_shape(self):
        check_count("trace_dim", self.trace_dim, 1)
        check_count("context_dim", self.context_dim, 1)
        return self.trace_dim, self.context_dim, 2

    def project(self, x):
        return self.input(x) * nn.sigmoid(self.input_gate(x))

    def mix(self, inputs, state, segment_ids):
        batch, time = inputs.shape[:2]
        traces, contexts, _ = self.memory_shape()
        state = enter(state, self.init_state(batch), segment_ids)
        memory = state.memory.reshape(batch, -1, 2)
        out, memory = linear_scan(
            jnp.repeat(widen(inputs), contexts, axis=-1),
            self.sow_decay(jnp.repeat(-jnp.abs(self.decay), contexts)),
            phase=jnp.tile(self.phase, traces),
            initial_state=jax.lax.complex(memory[..., 0], memory[..., 1]),
            **self.operation_options(segment_ids),
        )
        memory = jnp.stack([memory.real, memory.imag], axis=-1)
        memory = memory.reshape(batch, *self.memory_shape())
        out = self.read(jnp.concatenate([out.real, out.imag], axis=-1).astype(inputs.dtype))
        return out, self.leave_with(state, segment_ids, memory=memory, conv=state.conv)

    def finish(self, x, out):
        gate = nn.sigmoid(self.gate(x))
        return self.norm(out) * gate + self.skip(x) * (1 - gate)
