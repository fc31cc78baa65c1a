"""The baselines with nonlinear gates: LSTM and GRU, and xLSTM's sLSTM."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.parts import RMSNorm, merge_heads, split_heads, widen
from memseq.layers.common.vector import VectorState
from memseq.layers.recurrent.step import Feedback, StepLayer


@state_dataclass
class LSTMState(VectorState):
    """State of `LSTM`; `memory` is [batch, 2, units]: what is read (hidden), and the cell."""


class LSTM(StepLayer):
    """Long short-term memory with forget gates.

        c_t = f c_{t-1} + i tanh(g),  h_t = o tanh(c_t),  f, i, o = sigmoid(their pre-activations),
        all four pre-activations W x_t + R h_{t-1} + b,  out = U h_t

    Hochreiter and Schmidhuber 1997 (Neural Computation 9:8), forget gates of Gers et al. 2000. The
    forget gate's bias starts at 1.

    Attributes (beside those of every layer and of `StepLayer`): none; `heads` is not used.
    """

    PAPER: ClassVar[str] = "Hochreiter and Schmidhuber 1997"
    MEMORY: ClassVar[str] = "vectors [2, hidden_dim]"
    STATE: ClassVar[type] = LSTMState

    def setup(self):
        units = self.units()
        self.setup_step(4 * units, use_bias=False)
        self.recurrent = Feedback((units, 4 * units), orthogonal_blocks, self.param_dtype)

        def bias_init(key, shape, dtype):
            return jnp.zeros(shape, dtype).at[:units].set(1)

        self.gate_bias = self.param("gate_bias", bias_init, (4 * units,), self.param_dtype)

    @nn.nowrap
    def memory_shape(self):
        return 2, self.units()

    def feedback(self):
        return self.recurrent(), self.gate_bias

    @nn.nowrap
    def step(self, weights, memory, inputs):
        kernel, bias = weights
        forget, write, out, value = jnp.split(inputs + memory[:, 0] @ kernel + bias, 4, axis=-1)
        cell = nn.sigmoid(forget) * memory[:, 1] + nn.sigmoid(write) * jnp.tanh(value)
        hidden = nn.sigmoid(out) * jnp.tanh(cell)
        return jnp.stack([hidden, cell], axis=1), hidden


def orthogonal_blocks(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
    """[units, n units]: n orthogonal matrices side by side."""
    units, size = shape
    one = nn.initializers.orthogonal()
    keys = jax.random.split(key, size // units)
    return jnp.concatenate([one(k, (units, units), dtype) for k in keys], axis=1)


@state_dataclass
class GRUState(VectorState):
    """State of `GRU`; `memory` is [batch, units]."""


class GRU(StepLayer):
    """The gated recurrent unit.

        h_t = (1 - z) n + z h_{t-1},  n = tanh(W_n x_t + b_n + r (R_n h_{t-1} + c_n)),
        r, z = sigmoid(W x_t + R h_{t-1} + b),  out = U h_t

    Cho et al. 2014, arXiv:1406.1078, with the reset after the feedback's product, as in cuDNN.

    Attributes (beside those of every layer and of `StepLayer`): none; `heads` is not used.
    """

    PAPER: ClassVar[str] = "Cho et al. 2014, arXiv:1406.1078"
    MEMORY: ClassVar[str] = "vector [hidden_dim]"
    STATE: ClassVar[type] = GRUState

    def setup(self):
        units = self.units()
        self.setup_step(3 * units)
        self.recurrent = Feedback((units, 3 * units), orthogonal_blocks, self.param_dtype)
        self.reset_bias = self.param(
            "reset_bias", nn.initializers.zeros, (units,), self.param_dtype
        )

    @nn.nowrap
    def memory_shape(self):
        return (self.units(),)

    def feedback(self):
        return self.recurrent(), self.reset_bias

    @nn.nowrap
    def step(self, weights, memory, inputs):
        kernel, bias = weights
        reset, keep, value = jnp.split(inputs, 3, axis=-1)
        of_reset, of_keep, of_value = jnp.split(memory @ kernel, 3, axis=-1)
        value = jnp.tanh(value + nn.sigmoid(reset + of_reset) * (of_value + bias))
        keep = nn.sigmoid(keep + of_keep)
        memory = (1 - keep) * value + keep * memory
        return memory, memory


@state_dataclass
class SLSTMState(VectorState):
    """State of `SLSTM`; `memory` is [batch, 4, units]: hidden, cell, normaliser, stabiliser.

    A unit whose normaliser is 0 has not been written to.
    """


class SLSTM(StepLayer):
    """The scalar memory of xLSTM: exponential gates, and feedback that mixes each head's units.

        c_t = f c_{t-1} + i tanh(z),  n_t = f n_{t-1} + i,  h_t = sigmoid(o) c_t / n_t,
        f = sigmoid(f~), i = exp(i~), all pre-activations W u_t + R h_{t-1} + b, R by heads,
        out = U norm(h_t)

    Beck et al. 2024, "xLSTM", arXiv:2405.04517, equations 8 to 18. i and f see the convolved and
    activated input, z and o the input itself. c and n are held times exp(-m), with the paper's
    stabiliser m_t = max(log f + m_{t-1}, log i); a unit's first write sets m to log i by a mask of
    its own, whatever its batch-mates do. R starts at 0 and the forget gate's bias rises from -5
    (as the authors' code, for a first layer) to 7 over the units of a head.

    Attributes (beside those of every layer and of `StepLayer`):
        heads: blocks of R, and of the norm of the read-out.
        conv_width: short convolution before the gates i and f.
    """

    conv_width: int = 4

    PAPER: ClassVar[str] = "Beck et al. 2024, arXiv:2405.04517"
    MEMORY: ClassVar[str] = "vectors [4, hidden_dim]"
    STATE: ClassVar[type] = SLSTMState

    def setup(self):
        units = self.units()
        if self.heads < 1 or units % self.heads:
            raise ValueError(f"heads: expected a divisor of {units} units, got {self.heads}")
        self.conv = self.make_conv()
        self.input = self.dense(2 * units)  # z and o
        self.gate = self.dense(2 * units)  # i and f
        size = units // self.heads
        shape = (self.heads, size, 4 * size)
        self.recurrent = Feedback(shape, nn.initializers.zeros, self.param_dtype)

        def bias_init(key, shape, dtype):
            rise = jnp.tile(jnp.linspace(0.0, 1.0, size, dtype=dtype) ** 0.3, self.heads)
            return jnp.zeros(shape, dtype).at[3].set(-5 + 12 * rise)

        self.gate_bias = self.param("gate_bias", bias_init, (4, units), self.param_dtype)
        self.norm = RMSNorm(param_dtype=self.param_dtype)
        self.output = self.dense(self.features)

    @nn.nowrap
    def memory_shape(self):
        return 4, self.units()

    @nn.nowrap
    def conv_channels(self):
        return self.features

    def feedback(self):
        return self.recurrent(), self.gate_bias

    def project(self, x):
        return self.input(x), x if self.dtype is None else x.astype(self.dtype)

    def mix(self, inputs, state, segment_ids):
        mixed, x = inputs
        state = enter(state, self.init_state(x.shape[0]), segment_ids)
        convolved, conv = self.conv(x, state.conv, segment_ids)
        taken = jnp.concatenate([mixed, self.gate(convolved)], axis=-1)
        out, memory = self.run_steps(widen(taken), state, segment_ids)
        out = out.astype(taken.dtype)
        return out, self.leave_with(state, segment_ids, memory=memory, conv=conv)

    @nn.nowrap
    def step(self, weights, memory, inputs):
        kernel, bias = weights
        hidden, cell, total, level = jnp.moveaxis(memory, 1, 0)
        mixed = jnp.einsum("bhi,hio->bho", split_heads(hidden, self.heads), kernel)
        mixed = jnp.moveaxis(mixed.reshape(*mixed.shape[:2], 4, -1), 2, 1)
        gates = inputs.reshape(inputs.shape[0], 4, -1) + merge_heads(mixed) + bias
        value, out, log_input, forget = jnp.moveaxis(gates, 1, 0)
        empty = total == 0
        log_forget = jnp.where(empty, 0, nn.log_sigmoid(forget) + level)
        # m cancels in c / n: a constant to the gradient
        reached = jnp.where(empty, log_input, jnp.maximum(log_forget, log_input))
        reached = jax.lax.stop_gradient(reached)
        keep = jnp.where(empty, 0, jnp.exp(jnp.where(empty, 0, log_forget - reached)))
        write = jnp.exp(log_input - reached)
        cell = keep * cell + write * jnp.tanh(value)
        total = keep * total + write
        hidden = nn.sigmoid(out) * cell / total
        return jnp.stack([hidden, cell, total, reached], axis=1), hidden

    def finish(self, x, out):
        return self.output(merge_heads(self.norm(split_heads(out, self.heads))))
