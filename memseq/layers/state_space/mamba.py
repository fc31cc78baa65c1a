"""Mamba."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.parts import dt_bias_init, mean_with, widen
from memseq.layers.common.vector import VectorLayer, VectorState
from memseq.pallas_kernels import linear_scan, selective_scan
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
        mimetic: start near linear attention, as Trockman et al. 2024 (arXiv:2410.11135) propose for
            tasks of recall: all rates at 1e-3, so that next to nothing fades, dt at 1, and C's
            projection the mean of its own draw and B's, so that what is like is found; the
            convolution is added to its input. The numbers are this library's.
    """

    conv_width: int = 4
    expand: int = 2
    state_dim: int = 16
    dt_rank: int | None = None
    mimetic: bool = False

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
        self.conv = self.make_conv(use_bias=True, residual=self.mimetic)
        self.step_in = self.dense(rank)
        self.step_size = nn.Dense(
            inner,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=uniform,
        )
        self.key = self.dense(self.projected())
        start = {"kernel_init": mean_with(self.key)} if self.mimetic else {}
        self.query = self.dense(self.projected(), **start)
        slow, unit = math.log(1e-3), math.log(math.expm1(1.0))
        constant = nn.initializers.constant
        a_init, dt_init = (
            (constant(slow), constant(unit)) if self.mimetic else (rates_init, dt_bias_init)
        )
        self.a_log = self.param("A_log", a_init, (inner, state_dim))
        self.dt_bias = self.param("dt_bias", dt_init, (inner,))
        self.skip = self.param("D", nn.initializers.ones, (inner,), jnp.float32)
        self.output = self.dense(self.features)

    @nn.nowrap
    def memory_shape(self) -> tuple[int, ...]:
        check_count("expand", self.expand, 1)
        check_count("state_dim", self.state_dim, 1)
        return self.expand * self.features, self.state_dim

    @nn.nowrap
    def projected(self) -> int:
        """Size of B and of C."""
        return self.state_dim

    def project(self, x):
        return self.input(x)

    def mix(self, inputs, state, segment_ids):
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        mixed, conv = self.conv(inputs, state.conv, segment_ids)
        dt = nn.softplus(widen(self.step_size(self.step_in(mixed))) + self.dt_bias)
        self.sow("intermediates", "mean_dt", dt.mean())
        key = self.key(mixed)
        out, fields = self.remember(mixed, dt, key, self.query(mixed), state, segment_ids)
        return out, self.leave_with(state, segment_ids, conv=conv, **fields)

    def remember(self, x, dt, key, query, state, segment_ids):
        """(read-out [batch, time, channels], what of the state changes)."""
        out, memory = selective_scan(
            x,
            dt,
            -jnp.exp(self.a_log),
            key,
            query,
            self.skip,
            initial_state=state.memory,
            **self.operation_options(segment_ids),
        )
        return out, {"memory": memory}

    def finish(self, x, out):
        return self.output(out * nn.silu(self.gate(x)))


@state_dataclass
class PolarizedMambaState(MambaState):
    """State of `PolarizedMamba`.

    Attributes:
        kept: float32 [batch, channels, 2], the sum of dt u B and of dt since the start.
    """

    kept: jax.Array


class PolarizedMamba(Mamba):
    """Mamba with two more states a channel: one that keeps everything, and one that keeps nothing.

        y_t = (Mamba's) + C^1_t mean_t + C^0_t dt_t u_t B^0_t,
        mean_t = sum_{s <= t} dt_s u_s B^1_s / sum_{s <= t} dt_s

    Wang et al. 2025, "Understanding and mitigating bottlenecks of state space models through the
    lens of recency and over-smoothing", arXiv:2501.00658: a decay of 1 against recency, one of 0
    against smoothing. A plain sum under a decay of 1 has no bound, so it is a mean here.

    Attributes as `Mamba`.
    """

    PAPER: ClassVar[str] = "Wang et al. 2025, arXiv:2501.00658"
    MEMORY: ClassVar[str] = "vectors [channels, state_dim + 2]"
    STATE: ClassVar[type] = PolarizedMambaState

    @nn.nowrap
    def projected(self):
        return self.state_dim + 2

    @nn.nowrap
    def init_state(self, batch, context=None):
        kept = jnp.zeros((batch, self.memory_shape()[0], 2), jnp.float32)
        return self.empty_state(batch, kept=kept)

    def remember(self, x, dt, key, query, state, segment_ids):
        key, keep_in, pass_in = jnp.split(key, [self.state_dim, self.state_dim + 1], axis=-1)
        query, keep_out, pass_out = jnp.split(query, [self.state_dim, self.state_dim + 1], axis=-1)
        out, fields = super().remember(x, dt, key, query, state, segment_ids)
        written = dt * widen(x)
        sums, kept = linear_scan(
            jnp.concatenate([written * keep_in, dt], axis=-1),
            jnp.zeros(2 * dt.shape[-1], dt.dtype),
            initial_state=jnp.concatenate([state.kept[..., 0], state.kept[..., 1]], axis=-1),
            **self.operation_options(segment_ids),
        )
        total, weight = jnp.split(sums, 2, axis=-1)
        mean = total / jnp.maximum(weight, 1e-6)  # 0 at padding
        out = out + (keep_out * mean + pass_out * pass_in * written).astype(out.dtype)
        kept = jnp.stack(jnp.split(kept, 2, axis=-1), axis=-1)
        return out, fields | {"kept": kept}


def rates_init(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A_log of [channels, state_dim]: the logarithms of 1 to state_dim in every channel."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[1] + 1)), shape)
