"""What layers whose channels each hold a memory of their own have in common."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import SequenceLayer, enter, no_segment, state_dataclass
from memseq.layers.common.matrix import MatrixState
from memseq.layers.common.parts import ShortConv, conv_tail
from memseq.pallas_kernels import linear_scan
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class VectorState(MatrixState):
    """State of a layer whose channels remember each for itself.

    `memory` is float32 [batch, channels] or [batch, channels, numbers a channel].
    """


class VectorLayer(SequenceLayer):
    """A memory for every channel, and perhaps a short convolution before it; no heads.

    Subclasses write `memory_shape`, `project`, `mix` and `finish`.

    Attributes:
        conv_width: short convolution of what `project` gives; 0 is none.
    """

    conv_width: int = 0

    STATE: ClassVar[type] = VectorState

    @nn.nowrap
    def memory_shape(self) -> tuple[int, ...]:
        """Of one row's memory."""
        raise NotImplementedError(f"{type(self).__name__} has no memory_shape")

    @nn.nowrap
    def conv_channels(self) -> int:
        """Channels of the short convolution."""
        return self.memory_shape()[0]

    @nn.nowrap
    def make_conv(
        self, use_bias: bool = False, activation: str | None = "silu", residual: bool = False
    ) -> ShortConv:
        return ShortConv(
            self.conv_width,
            self.conv_channels(),
            use_bias=use_bias,
            residual=residual,
            activation=activation,
            implementation=self.plain_implementation(),
            param_dtype=self.param_dtype,
        )

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> Any:
        """An empty memory and an empty tail of the convolution; `context` changes nothing."""
        return self.empty_state(batch)

    @nn.nowrap
    def empty_state(self, batch: int, **more: jax.Array) -> Any:
        """An empty state whose fields are those of `VectorState` and `more`."""
        conv = conv_tail(batch, self.conv_width, self.conv_channels(), self.activation_dtype())
        fields = {
            "memory": jnp.zeros((batch, *self.memory_shape()), jnp.float32),
            "conv": conv,
            "segment": no_segment(batch),
        }
        return self.STATE(**fields | more)


class GatedRecurrence(VectorLayer):
    """h_t = a_t h_{t-1} + write_t, elementwise, with gates that depend on the input.

    Subclasses write `gates`, and `project` where it is not the Dense `input`, set up by
    `setup_gated`.

    Attributes:
        inner_dim: channels of the memory; None is features.
    """

    inner_dim: int | None = None

    OPERATION: ClassVar[str] = "linear_scan"
    PARTS: ClassVar[int] = 2  # what the convolution passes over, in multiples of inner_dim

    def setup_gated(self, conv_bias: bool = False) -> None:
        self.input = self.dense(self.conv_channels())
        self.conv = self.make_conv(use_bias=conv_bias, activation=None)
        self.output = self.dense(self.features)

    @nn.nowrap
    def memory_shape(self) -> tuple[int, ...]:
        check_count("inner_dim", self.inner_dim, 1, optional=True)
        return (self.features if self.inner_dim is None else self.inner_dim,)

    @nn.nowrap
    def conv_channels(self) -> int:
        return self.PARTS * self.memory_shape()[0]

    def gates(self, mixed: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the convolution gives to (write, log decay), both [batch, time, inner_dim]."""
        raise NotImplementedError(f"{type(self).__name__} has no gates")

    def project(self, x):
        return self.input(x)

    def mix(self, inputs, state, segment_ids):
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        mixed, conv = self.conv(inputs, state.conv, segment_ids)
        write, log_decay = self.gates(mixed)
        out, memory = linear_scan(
            write.astype(mixed.dtype),
            self.sow_decay(log_decay),
            initial_state=state.memory,
            **self.operation_options(segment_ids),
        )
        return out, self.leave_with(state, segment_ids, memory=memory, conv=conv)

    def finish(self, x, out):
        return self.output(out)
