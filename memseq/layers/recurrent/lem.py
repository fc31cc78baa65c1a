"""Long expressive memory."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.vector import VectorState
from memseq.layers.recurrent.step import Feedback, StepLayer


@state_dataclass
class LEMState(VectorState):
    """State of `LEM`; `memory` is [batch, 2, units]: y, which is read, and z."""


class LEM(StepLayer):
    """Long expressive memory: two vectors that drive each other, with learned time steps.

        z_t = (1 - a) z_{t-1} + a tanh(W_z y_{t-1} + V_z x_t + b_z),
        y_t = (1 - b) y_{t-1} + b tanh(W_y z_t + V_y x_t + b_y),  out = U y_t,
        a, b = dt sigmoid(W y_{t-1} + V x_t + b), each with its own weights

    Rusch et al. 2022, arXiv:2110.04744, equation 3. All weights start uniform in
    +- hidden_dim ** -0.5. With dt <= 1 both vectors stay within [-1, 1].

    Attributes (beside those of every layer and of `StepLayer`):
        dt: largest time step, in (0, 1]; small ones remember longer.
    """

    dt: float = 1.0

    PAPER: ClassVar[str] = "Rusch et al. 2022, arXiv:2110.04744"
    MEMORY: ClassVar[str] = "vectors [2, hidden_dim]"
    STATE: ClassVar[type] = LEMState

    def setup(self):
        if not 0 < self.dt <= 1:
            raise ValueError(f"dt: expected 0 < dt <= 1, got {self.dt}")
        units = self.units()
        bound = units**-0.5

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        def dense(size, use_bias=False):
            return nn.Dense(
                size,
                use_bias=use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=uniform,
                bias_init=uniform,
            )

        self.input = dense(4 * units, True)
        self.output = self.dense(self.features)
        self.from_y = Feedback((units, 3 * units), uniform, self.param_dtype)
        self.from_z = Feedback((units, units), uniform, self.param_dtype)

    @nn.nowrap
    def memory_shape(self):
        return 2, self.units()

    def feedback(self):
        return self.from_y(), self.from_z()

    @nn.nowrap
    def step(self, weights, memory, inputs):
        from_y, from_z = weights
        y, z = memory[:, 0], memory[:, 1]
        step_y, step_z, into_z, into_y = jnp.split(inputs, 4, axis=-1)
        of_step_y, of_step_z, of_z = jnp.split(y @ from_y, 3, axis=-1)
        step_y, step_z = (
            self.dt * nn.sigmoid(gate) for gate in (step_y + of_step_y, step_z + of_step_z)
        )
        z = (1 - step_z) * z + step_z * jnp.tanh(into_z + of_z)
        y = (1 - step_y) * y + step_y * jnp.tanh(into_y + z @ from_z)
        return jnp.stack([y, z], axis=1), y
