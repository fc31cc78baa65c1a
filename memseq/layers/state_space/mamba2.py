"""Mamba-2."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import SequenceLayer, enter, no_segment, state_dataclass
from memseq.layers.common.matrix import MatrixState
from memseq.layers.common.parts import (
    MambaGate,
    RMSNorm,
    ShortConv,
    conv_tail,
    mean_with,
    merge_heads,
    split_heads,
)
from memseq.pallas_kernels import linear_attention
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class Mamba2State(MatrixState):
    """State of `Mamba2`; `memory` is [batch, heads, state_dim, head_dim]."""


class Mamba2(SequenceLayer):
    """A selective state space with one decay per head, as a matrix memory with decay.

        h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T,  y_t = h_t^T C_t + D x_t,
        out = norm(y_t * silu(z_t)),  dt_t = softplus(W u_t + dt_bias),  A = -exp(A_log)

    B is the key, C the query, dt x the value. Dao and Gu 2024, "Transformers are SSMs",
    arXiv:2405.21060, section 7; exp(A_log) starts uniform in [1, 16].

    Attributes (beside those of every layer):
        heads: None is one head per 64 inner channels, or 4 where they are not a multiple of 64.
        expand: inner channels per feature.
        state_dim: size N of a head's state per channel: the key's size.
        groups: number of (B, C) pairs; each serves heads / groups heads.
        conv_width: short convolution of x, B and C, with bias and silu.
        dt_limit: dt is clipped to this range.
        mimetic: start near linear attention, see `Mamba`: all rates at 1e-3, dt at 1, C's
            projection the mean of its own draw and B's, the convolution added to its input.
    """

    heads: int | None = None
    expand: int = 2
    state_dim: int = 128
    groups: int = 1
    conv_width: int = 4
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    mimetic: bool = False

    PAPER: ClassVar[str] = "Dao and Gu 2024, arXiv:2405.21060"
    MEMORY: ClassVar[str] = "matrix [heads, state_dim, head_dim]"
    OPERATION: ClassVar[str] = "linear_attention"
    STATE: ClassVar[type] = Mamba2State

    def setup(self):
        inner, heads, _ = self._dims()
        low, high = self.dt_limit
        if not 0 <= low <= high:
            raise ValueError(f"dt_limit: expected 0 <= least <= most, got {self.dt_limit}")
        self.gate = self.dense(inner)
        self.value = self.dense(inner)
        self.key = self.dense(self.groups * self.state_dim)
        start = {"kernel_init": mean_with(self.key)} if self.mimetic else {}
        self.query = self.dense(self.groups * self.state_dim, **start)
        self.step_size = self.dense(heads)
        self.conv = ShortConv(
            self.conv_width,
            self._channels(),
            use_bias=True,
            residual=self.mimetic,
            implementation=self.plain_implementation(),
            param_dtype=self.param_dtype,
        )
        gate = {"a_min": 1e-3, "a_max": 1e-3, "dt_range": (1.0, 1.0)} if self.mimetic else {}
        self.decay_gate = MambaGate(heads, **{"a_min": 1.0} | gate)
        self.skip = self.param("D", nn.initializers.ones, (heads,), jnp.float32)
        self.norm = RMSNorm(param_dtype=self.param_dtype)
        self.output = self.dense(self.features)

    @nn.nowrap
    def _dims(self) -> tuple[int, int, int]:
        """(inner channels, heads, channels per head)."""
        inner, heads = inner_and_heads(self)
        return inner, heads, inner // heads

    @nn.nowrap
    def _channels(self) -> int:
        return self._dims()[0] + 2 * self.groups * self.state_dim

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> Any:
        """An empty memory and an empty tail of the convolution; `context` changes nothing."""
        return self.empty_state(batch)

    @nn.nowrap
    def empty_state(self, batch: int, **more: jax.Array) -> Any:
        """An empty state whose fields are those of `Mamba2State` and `more`."""
        _, heads, head_dim = self._dims()
        fields = {
            "memory": jnp.zeros((batch, heads, self.state_dim, head_dim), jnp.float32),
            "conv": conv_tail(batch, self.conv_width, self._channels(), self.activation_dtype()),
            "segment": no_segment(batch),
        }
        return self.STATE(**fields | more)

    def project(self, x: jax.Array) -> Any:
        mixed = jnp.concatenate([self.value(x), self.key(x), self.query(x)], axis=-1)
        dt, log_decay = self.decay_gate(self.step_size(x), self.dt_limit)
        return mixed, dt, self.sow_decay(log_decay)

    def mix(self, inputs, state, segment_ids):
        mixed, dt, *gates = inputs
        inner, heads, _ = self._dims()
        state = enter(state, self.init_state(mixed.shape[0]), segment_ids)
        mixed, conv = self.conv(mixed, state.conv, segment_ids)
        value, key, query = jnp.split(mixed, [inner, inner + self.groups * self.state_dim], axis=-1)
        value = split_heads(value, heads)
        out, memory = self.operate(
            split_heads(query, self.groups),
            split_heads(key, self.groups),
            (value * dt[..., None]).astype(value.dtype),
            *gates,
            scale=1.0,
            initial_state=self.recall(state),
            **self.operation_options(segment_ids),
        )
        out = out + (self.skip[:, None] * value).astype(out.dtype)
        return out, self.leave_with(state, segment_ids, **self.keep(memory), conv=conv)

    def operate(self, query, key, value, log_decay, **options) -> tuple[jax.Array, Any]:
        """The memory operation: (read-out [batch, time, heads, head_dim], memory after it)."""
        return linear_attention(query, key, value, log_decay, **options)

    def finish(self, x: jax.Array, out: jax.Array) -> jax.Array:
        return self.output(self.norm(merge_heads(out) * nn.silu(self.gate(x))))


def inner_and_heads(layer: nn.Module) -> tuple[int, int]:
    """Inner channels and heads of a layer with the sizes of `Mamba2`, which are checked."""
    for name in ("expand", "state_dim", "groups"):
        check_count(name, getattr(layer, name), 1)
    inner, heads = layer.expand * layer.features, layer.heads
    if heads is None:
        heads = inner // 64 if inner % 64 == 0 else 4
    if heads < 1 or inner % heads:
        raise ValueError(
            f"heads: expand * features = {inner} must be a multiple of it, got {heads}"
        )
    if heads % layer.groups:
        raise ValueError(
            f"groups: heads {heads} must be a multiple of it, got groups {layer.groups}"
        )
    return inner, heads
