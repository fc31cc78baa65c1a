"""Mamba."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.parts import dt_bias_init, widen
from memseq.layers.common.vector import VectorLayer, VectorState
from memseq.pallas_kernels import selective_scan
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class MambaState(VectorState):
    """State of `Mamba`; `memory` is [batch, expand * features, state_dim]."""


class Mamba(VectorLayer):
    """A selective state space: every channel holds `state_dim` numbers with rates of their own.

        h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = C_t . h_t + D u_t,  out = y * silu(z),
        u = silu(conv(W_u x)),  dt_t = softplus(W_2 W_1 u_t + dt_bias),  A = -exp(A_log)

    Gu and Dao 2023, arXiv:2312.00752, section 3 and algorithm 2; B and C are projections of u_t.
    B is discretised by Euler's rule (dt B), as in the authors' code. Start values are theirs:
    A = -1 to -state_dim in every channel, dt log-uniform in [0.001, 0.1], D = 1, and the step
    size's second projection uniform in +- dt_rank ** -0.5.

    Attributes (beside those of every layer and of `VectorLayer`):
        expand: inner channels per feature.
        state_dim: numbers that each inner channel remembers.
        dt_rank: inner size of the step size's projection; None is features / 16, rounded up.
    """

    conv_width: int = 4
    expand: int = 2
    state_dim: int = 16
    dt_rank: int | None = None

    PAPER: ClassVar[str] = "Gu and Dao 2023, arXiv:2312.00752"
    MEMORY: ClassVar[str] = "vectors [channels, state_dim]"
    OPERATION: ClassVar[str] = "selective_scan"
    STATE: ClassVar[type] = MambaState

    def setup(self):
        inner, state_dim = self.memory_shape()
        check_count("dt_rank", self.dt_rank, 1, optional=True)
        rank = -(-self.features // 16) if self.dt_rank is None else self.dt_rank

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -(rank**-0.5), rank**-0.5)

        self.input = self.dense(inner)
        self.gate = self.dense(inner)
        self.conv = self.make_conv(use_bias=True)
        self.step_in = self.dense(rank)
        self.step_size = nn.Dense(
            inner,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=uniform,
        )
        self.key = self.dense(state_dim)
        self.query = self.dense(state_dim)
        self.a_log = self.param("A_log", rates_init, (inner, state_dim))
        self.dt_bias = self.param("dt_bias", dt_bias_init, (inner,))
        self.skip = self.param("D", nn.initializers.ones, (inner,), jnp.float32)
        self.output = self.dense(self.features)

    @nn.nowrap
    def memory_shape(self) -> tuple[int, ...]:
        check_count("expand", self.expand, 1)
        check_count("state_dim", self.state_dim, 1)
        return self.expand * self.features, self.state_dim

    def project(self, x):
        return self.input(x)

    def mix(self, inputs, state, segment_ids):
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        mixed, conv = self.conv(inputs, state.conv, segment_ids)
        dt = nn.softplus(widen(self.step_size(self.step_in(mixed))) + self.dt_bias)
        self.sow("intermediates", "mean_dt", dt.mean())
        out, memory = selective_scan(
            mixed,
            dt,
            -jnp.exp(self.a_log),
            self.key(mixed),
            self.query(mixed),
            self.skip,
            initial_state=state.memory,
            **self.operation_options(segment_ids),
        )
        return out, self.leave_with(state, segment_ids, memory=memory, conv=conv)

    def finish(self, x, out):
        return self.output(out * nn.silu(self.gate(x)))


def rates_init(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A_log of [channels, state_dim]: the logarithms of 1 to state_dim in every channel."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[1] + 1)), shape)
