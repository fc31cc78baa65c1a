"""Based's gated convolution."""

from typing import ClassVar

import flax.linen as nn
import jax

from memseq.layers.common.base import (
    SequenceLayer,
    enter,
    leave,
    no_segment,
    state_dataclass,
)
from memseq.layers.common.parts import ShortConv, conv_tail
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class GatedConvolutionState:
    """State of `GatedConvolution`.

    Attributes:
        conv: [batch, conv_width - 1, expand * features], the convolution's last inputs.
        segment: int32 [batch], id of the segment they belong to, -1 for none yet.
    """

    conv: jax.Array
    segment: jax.Array


class GatedConvolution(SequenceLayer):
    """A short convolution times a projection of the present token: what neighbours are to it.

        y = W_o (silu(conv(W_u x)) * W_g x), with a bias in each of the four

    BaseConv of Arora et al. 2024, "Simple linear attention language models balance the
    recall-throughput tradeoff", arXiv:2402.18668, as in the authors' code; the layers between those
    of linear attention and of sliding windows in a Based model.

    Attributes (beside those of every layer; `heads` changes nothing):
        expand: inner channels per feature.
        conv_width: steps that the convolution sees.
    """

    expand: int = 2
    conv_width: int = 3

    PAPER: ClassVar[str] = "Arora et al. 2024, arXiv:2402.18668"
    MEMORY: ClassVar[str] = "the last conv_width - 1 tokens"
    OPERATION: ClassVar[str] = "causal_conv"
    STATE: ClassVar[type] = GatedConvolutionState

    def setup(self):
        self.input = self.dense(self._inner(), use_bias=True)
        self.gate = self.dense(self._inner(), use_bias=True)
        self.conv = ShortConv(
            self.conv_width,
            self._inner(),
            use_bias=True,
            implementation=self.plain_implementation(),
            param_dtype=self.param_dtype,
        )
        self.output = self.dense(self.features, use_bias=True)

    @nn.nowrap
    def _inner(self) -> int:
        check_count("expand", self.expand, 1)
        return self.expand * self.features

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> GatedConvolutionState:
        """An empty tail of the convolution; `context` changes nothing."""
        tail = conv_tail(batch, self.conv_width, self._inner(), self.activation_dtype())
        return self.STATE(conv=tail, segment=no_segment(batch))

    def project(self, x):
        return self.input(x)

    def mix(self, inputs, state, segment_ids):
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        out, tail = self.conv(inputs, state.conv, segment_ids)
        return out, self.STATE(conv=tail, segment=leave(state, segment_ids))

    def finish(self, x, out):
        return self.output(out * self.gate(x))
