"""The wave RNN: memory as waves that travel around rings."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.vector import VectorState
from memseq.layers.recurrent.step import Feedback, StepLayer
from memseq.pallas_kernels.common.checks import check_choice, check_count

ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh, "identity": lambda x: x}


@state_dataclass
class WaveRNNState(VectorState):
    """State of `WaveRNN`; `memory` is [batch, rings, hidden_dim / rings]."""


class WaveRNN(StepLayer):
    """A recurrent network whose feedback is a local convolution around rings of units.

        h_t = activation(kernel (*) h_{t-1} + b + V x_t at the first unit of each ring),
        out = U h_t

    Keller et al. 2023, "Traveling waves encode the recent past", arXiv:2309.08045, equations 3 to
    5: (*) is a circular convolution of width 3 over each ring, mixing the rings. It starts as a
    shift by one unit, so that a ring of n units is a delay line: an input passes all its units, and
    is added to what enters at the first when it has come around.

    Attributes (beside those of every layer and of `StepLayer`):
        hidden_dim: units of all rings together, a multiple of `rings`; None is features.
        rings: number of rings.
        activation: "relu", "tanh" or "identity".
    """

    rings: int = 4
    activation: str = "relu"

    PAPER: ClassVar[str] = "Keller et al. 2023, arXiv:2309.08045"
    MEMORY: ClassVar[str] = "waves [rings, units]"
    STATE: ClassVar[type] = WaveRNNState

    def setup(self):
        check_choice("activation", self.activation, ACTIVATIONS)
        rings, _ = self.memory_shape()

        def shift(key, shape, dtype):
            del key
            return jnp.zeros(shape, dtype).at[0].set(jnp.eye(rings, dtype=dtype))

        self.setup_step(rings, use_bias=False)
        self.recurrent = Feedback((3, rings, rings), shift, self.param_dtype)
        self.wave_bias = self.param("wave_bias", nn.initializers.zeros, (rings,), self.param_dtype)

    @nn.nowrap
    def memory_shape(self):
        check_count("rings", self.rings, 1)
        units = self.units()
        if units % self.rings:
            raise ValueError(f"rings: expected a divisor of {units} units, got {self.rings}")
        return self.rings, units // self.rings

    def feedback(self):
        return self.recurrent(), self.wave_bias

    @nn.nowrap
    def step(self, weights, memory, inputs):
        kernel, bias = weights
        # taps at the unit before, the unit itself and the unit after
        taps = jnp.stack([jnp.roll(memory, shift, axis=2) for shift in (1, 0, -1)], axis=1)
        wave = jnp.einsum("bkru,kro->bou", taps, kernel) + bias[:, None]
        memory = ACTIVATIONS[self.activation](wave.at[:, :, 0].add(inputs))
        return memory, memory.reshape(memory.shape[0], -1)
