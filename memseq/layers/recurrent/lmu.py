"""The Legendre memory unit."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.vector import VectorState
from memseq.layers.recurrent.step import Feedback, StepLayer
from memseq.layers.state_space import hippo
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class LMUState(VectorState):
    """State of `LMU`; `memory` is [batch, order + units]: m, then h."""


class LMU(StepLayer):
    """A window of one signal in Legendre polynomials, and a hidden state that writes and reads it.

        u_t = e_x . x_t + e_h . h_{t-1} + e_m . m_{t-1},  m_t = A' m_{t-1} + B' u_t,
        h_t = tanh(W_x x_t + W_h h_{t-1} + W_m m_t),  out = U h_t

    Voelker, Kajic and Eliasmith 2019, "Legendre memory units: continuous-time representation in
    recurrent neural networks" (NeurIPS), equations 1 to 8. A and B are the constants of the measure
    "lmu" of `memseq.layers.state_space.hippo`, which holds the last `window` steps of u, and A' and
    B' those of an input that is held during a step. e_m starts at 0, so that the memory does not
    write to itself; the encoders of x and h start lecun normal, the kernels glorot normal.

    Attributes (beside those of every layer and of `StepLayer`):
        order: coefficients of the window.
        window: steps that the memory holds.
    """

    order: int = 64
    window: int = 256

    PAPER: ClassVar[str] = "Voelker et al. 2019, Legendre memory units"
    MEMORY: ClassVar[str] = "vector [order + hidden_dim]"
    STATE: ClassVar[type] = LMUState

    def setup(self):
        check_count("window", self.window, 1)
        units = self.units()
        kernel, encoder = nn.initializers.glorot_normal(), nn.initializers.lecun_normal()
        self.encode = self.dense(1)
        self.input = self.dense(units, kernel_init=kernel)
        self.output = self.dense(self.features)
        self.encode_hidden = Feedback((units, 1), encoder, self.param_dtype)
        self.encode_memory = Feedback((self.order, 1), nn.initializers.zeros, self.param_dtype)
        self.from_hidden = Feedback((units, units), kernel, self.param_dtype)
        self.from_memory = Feedback((self.order, units), kernel, self.param_dtype)

    @nn.nowrap
    def memory_shape(self):
        check_count("order", self.order, 1)
        return (self.order + self.units(),)

    def feedback(self):
        from_hidden = jnp.concatenate([self.encode_hidden(), self.from_hidden()], axis=1)
        return from_hidden, self.encode_memory(), self.from_memory()

    def project(self, x):
        return jnp.concatenate([self.encode(x), self.input(x)], axis=-1)

    @nn.nowrap
    def step(self, weights, memory, inputs):
        from_hidden, encode_memory, from_memory = weights
        kept, write = hippo.discretize(*hippo.transition("lmu", self.order), 1 / self.window, "zoh")
        legendre, hidden = jnp.split(memory, [self.order], axis=-1)
        inputs = inputs + hidden @ from_hidden
        signal = inputs[:, :1] + legendre @ encode_memory
        legendre = legendre @ jnp.asarray(kept.T, memory.dtype)
        legendre = legendre + signal * jnp.asarray(write, memory.dtype)
        hidden = jnp.tanh(inputs[:, 1:] + legendre @ from_memory)
        return jnp.concatenate([legendre, hidden], axis=-1), hidden
