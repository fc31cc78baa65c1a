"""Gated linear recurrences without feedback: minGRU, minLSTM, HGRN."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import check_layer_index, enter, state_dataclass
from memseq.layers.common.parts import RMSNorm, widen
from memseq.layers.common.vector import GatedRecurrence, VectorState
from memseq.pallas_kernels import linear_scan


@state_dataclass
class MinGRUState(VectorState):
    """State of `MinGRU`."""


class MinGRU(GatedRecurrence):
    """A GRU whose gate and candidate see the input alone, so that time runs in parallel.

        h_t = (1 - z_t) h_{t-1} + z_t g(V x_t),  z_t = sigmoid(W x_t),  out = U h_t

    Feng et al. 2024, "Were RNNs all we needed?", arXiv:2410.01201, section 3.1 and appendix B,
    where g(v) = v + 1/2 from 0 on and sigmoid(v) below keeps h positive for scans of logarithms.
    The scan here is of the numbers themselves, which is exact for any sign.

    Attributes (beside those of every layer, of `VectorLayer` and of `GatedRecurrence`):
        positive: the candidate is g(V x); False takes V x as it is.
    """

    positive: bool = True

    PAPER: ClassVar[str] = "Feng et al. 2024, arXiv:2410.01201"
    MEMORY: ClassVar[str] = "vector [inner_dim]"
    STATE: ClassVar[type] = MinGRUState

    def setup(self):
        self.setup_gated()

    def candidate(self, value: jax.Array) -> jax.Array:
        value = widen(value)
        return jnp.where(value >= 0, value + 0.5, nn.sigmoid(value)) if self.positive else value

    def gates(self, mixed):
        gate, value = jnp.split(mixed, 2, axis=-1)
        gate = widen(gate)
        return nn.sigmoid(gate) * self.candidate(value), nn.log_sigmoid(-gate)


@state_dataclass
class MinLSTMState(VectorState):
    """State of `MinLSTM`."""


class MinLSTM(MinGRU):
    """An LSTM whose gates see the input alone and add up to one.

        h_t = f'_t h_{t-1} + i'_t g(V x_t),  f' = f / (f + i),  i' = i / (f + i),
        f_t = sigmoid(W_f x_t),  i_t = sigmoid(W_i x_t),  out = U h_t

    Feng et al. 2024, arXiv:2410.01201, section 3.2; g and `positive` as in `MinGRU`.
    """

    STATE: ClassVar[type] = MinLSTMState
    PARTS: ClassVar[int] = 3

    def gates(self, mixed):
        forget, gate, value = jnp.split(mixed, 3, axis=-1)
        # log of i / f
        odds = nn.log_sigmoid(widen(gate)) - nn.log_sigmoid(widen(forget))
        return nn.sigmoid(odds) * self.candidate(value), nn.log_sigmoid(-odds)


@state_dataclass
class HGRNState(VectorState):
    """State of `HGRN`."""


class HGRN(GatedRecurrence):
    """A gated linear recurrence whose forget gate has a lower bound that rises with depth.

        h_t = f_t h_{t-1} + (1 - f_t) silu(V x_t),  f_t = bound + (1 - bound) sigmoid(W x_t),
        out = U (norm(h_t) * silu(G x_t))

    Qin et al. 2023, arXiv:2311.04823, equations 3 to 6, with real states as in the code of
    flash-linear-attention; `ComplexHGRN` has the paper's. The bounds of all layers are one
    cumulative softmax in the paper; here a layer's bound is a parameter of its own that starts
    where that does, at layer_index / num_layers, and stays in (0, 1). The first layer's is 0.

    Attributes (beside those of every layer, of `VectorLayer` and of `GatedRecurrence`):
        layer_index: place of this layer among `num_layers`, from 0.
        num_layers: layers of the model.
    """

    layer_index: int = 0
    num_layers: int = 1

    PAPER: ClassVar[str] = "Qin et al. 2023, arXiv:2311.04823"
    MEMORY: ClassVar[str] = "vector [inner_dim]"
    STATE: ClassVar[type] = HGRNState

    def setup(self):
        check_layer_index(self.layer_index, self.num_layers)
        self.setup_gated()
        inner = self.memory_shape()[0]
        if self.layer_index:
            share = self.layer_index / self.num_layers
            start = nn.initializers.constant(math.log(share / (1 - share)))
            self.bound_bias = self.param("bound_bias", start, (inner,))
        self.gate = self.dense(math.prod(self.memory_shape()))
        self.norm = RMSNorm(param_dtype=self.param_dtype)

    def gates(self, mixed):
        gate, *values = jnp.split(mixed, self.PARTS, axis=-1)
        log_decay = nn.log_sigmoid(widen(gate))
        if self.layer_index:  # log(bound + (1 - bound) sigmoid)
            bound = nn.log_sigmoid(self.bound_bias)
            log_decay = jnp.logaddexp(bound, nn.log_sigmoid(-self.bound_bias) + log_decay)
        write = [-jnp.expm1(log_decay) * nn.silu(widen(value)) for value in values]
        return jax.lax.complex(*write) if len(write) == 2 else write[0], log_decay

    def finish(self, x, out):
        return self.output(self.norm(out) * nn.silu(self.gate(x)))


@state_dataclass
class ComplexHGRNState(VectorState):
    """State of `ComplexHGRN`; `memory` is [batch, inner_dim, 2], real and imaginary parts."""


class ComplexHGRN(HGRN):
    """HGRN with complex states, each of which turns by an angle of its own at every step.

        h_t = f_t exp(i phase) h_{t-1} + (1 - f_t) (silu(V x_t) + i silu(V' x_t)),
        out = U (norm([Re h_t, Im h_t]) * silu(G x_t)),  f_t as in `HGRN`

    Qin et al. 2023, arXiv:2311.04823, section 3.2. The angles are learned, do not depend on the
    input and start at 10000 ** (-2 k / inner_dim), so that they tell places as rotary positions do.

    Attributes as `HGRN`.
    """

    MEMORY: ClassVar[str] = "complex vector [inner_dim]"
    STATE: ClassVar[type] = ComplexHGRNState
    PARTS: ClassVar[int] = 3

    def setup(self):
        super().setup()

        def phase_init(key, shape):
            del key
            return 10000.0 ** (-2 * jnp.arange(shape[0]) / shape[0])

        self.phase = self.param("phase", phase_init, self.memory_shape()[:1])

    @nn.nowrap
    def memory_shape(self):
        return (*super().memory_shape(), 2)

    def mix(self, inputs, state, segment_ids):
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        mixed, conv = self.conv(inputs, state.conv, segment_ids)
        write, log_decay = self.gates(mixed)
        out, memory = linear_scan(
            write,
            self.sow_decay(log_decay),
            phase=self.phase,
            initial_state=jax.lax.complex(state.memory[..., 0], state.memory[..., 1]),
            **self.operation_options(segment_ids),
        )
        out = jnp.concatenate([out.real, out.imag], axis=-1).astype(inputs.dtype)
        memory = jnp.stack([memory.real, memory.imag], axis=-1)
        return out, self.leave_with(state, segment_ids, memory=memory, conv=conv)
