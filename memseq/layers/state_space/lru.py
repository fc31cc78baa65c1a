"""The linear recurrent unit."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.parts import widen
from memseq.layers.common.vector import VectorState
from memseq.layers.state_space.block import StateSpaceLayer
from memseq.pallas_kernels import linear_scan
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class LRUState(VectorState):
    """State of `LRU`; `memory` is [batch, state_dim, 2], real and imaginary parts."""


class LRU(StateSpaceLayer):
    """The linear recurrent unit: complex channels that turn and fade at fixed rates.

        h_t = lambda h_{t-1} + gain B x_t,  y_t = Re(C h_t) + D x_t,
        lambda = exp(-exp(decay_log) + i exp(phase_log)),  gain = exp(gain_log)

    Orvieto et al. 2023, "Resurrecting recurrent neural networks for long sequences",
    arXiv:2303.06349, section 3. |lambda| < 1 whatever the parameters are. lambda starts uniform on
    the ring between the radii r_min and r_max, and gain at sqrt(1 - |lambda|^2), which keeps the
    size of white noise.

    Attributes (beside those of every layer, of `VectorLayer` and of `StateSpaceLayer`):
        state_dim: complex channels; None is features.
        r_min, r_max: least and largest |lambda| at the start, 0 <= r_min < r_max <= 1.
        max_phase: largest angle of a step at the start, in radians.
    """

    state_dim: int | None = None
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 2 * math.pi

    PAPER: ClassVar[str] = "Orvieto et al. 2023, arXiv:2303.06349"
    MEMORY: ClassVar[str] = "complex vector [state_dim]"
    OPERATION: ClassVar[str] = "linear_scan"
    STATE: ClassVar[type] = LRUState

    def setup(self):
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ValueError(
                f"r_min: expected 0 <= r_min < r_max <= 1, got {self.r_min} and {self.r_max}"
            )
        if self.max_phase <= 0:
            raise ValueError(f"max_phase: expected a positive angle, got {self.max_phase}")
        size = self.memory_shape()[0]

        def decay_log_init(key, shape):
            low, high = self.r_min**2, self.r_max**2
            square = low + (high - low) * jax.random.uniform(key, shape, minval=1e-6)
            return jnp.log(jnp.maximum(-0.5 * jnp.log(square), 1e-6))

        def phase_log_init(key, shape):
            return jnp.log(self.max_phase * jax.random.uniform(key, shape, minval=1e-6))

        self.decay_log = self.param("decay_log", decay_log_init, (size,))
        self.phase_log = self.param("phase_log", phase_log_init, (size,))
        kept = -jnp.exp(self.decay_log)
        self.gain_log = self.param("gain_log", lambda key: 0.5 * jnp.log(-jnp.expm1(2 * kept)))
        self.write = self._complex_dense(2 * size, 2 * self.features)
        self.read = self._complex_dense(self.features, size)
        self.setup_read_out()

    @nn.nowrap
    def _complex_dense(self, features: int, fan: int) -> nn.Dense:
        """Real and imaginary parts side by side, normal with variance 1 / fan."""
        return nn.Dense(
            features,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(fan**-0.5),
        )

    @nn.nowrap
    def memory_shape(self):
        check_count("state_dim", self.state_dim, 1, optional=True)
        return (self.features if self.state_dim is None else self.state_dim, 2)

    def project(self, x):
        return self.write(x)

    def mix(self, inputs, state, segment_ids):
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        log_decay = self.sow_decay(-jnp.exp(self.decay_log))
        write = jnp.tile(jnp.exp(self.gain_log), 2) * widen(inputs)
        out, memory = linear_scan(
            jax.lax.complex(*jnp.split(write, 2, axis=-1)),
            log_decay,
            phase=jnp.exp(self.phase_log),
            initial_state=jax.lax.complex(state.memory[..., 0], state.memory[..., 1]),
            **self.operation_options(segment_ids),
        )
        # the read-out's second half takes the imaginary parts, so its kernel is -Im C
        out = self.read(jnp.concatenate([out.real, out.imag], axis=-1).astype(inputs.dtype))
        memory = jnp.stack([memory.real, memory.imag], axis=-1)
        return out, self.leave_with(state, segment_ids, memory=memory, conv=state.conv)
