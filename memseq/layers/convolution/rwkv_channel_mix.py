"""The channel mixing of RWKV."""

from typing import ClassVar

import flax.linen as nn
import jax

from memseq.layers.common.base import enter, leave, no_segment, state_dataclass
from memseq.layers.common.parts import conv_tail, uniform_within
from memseq.layers.common.token_shift import TokenShiftLayer
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class RWKVChannelMixState:
    """State of `RWKVChannelMix`.

    Attributes:
        conv: [batch, 1, features], the last token.
        segment: int32 [batch], id of the segment it belongs to, -1 for none yet.
    """

    conv: jax.Array
    segment: jax.Array


class RWKVChannelMix(TokenShiftLayer):
    """What stands between RWKV's memories: a network that sees this token and the one before it.

        y_t = W_v relu(W_k (x_t + share (x_{t-1} - x_t)))^2

    with a share of each channel. Peng et al. 2025, "RWKV-7 Goose", arXiv:2503.14456, whose channel
    mixing has no gate. As it has a state, it is a layer of a model's pattern, in a block of its
    own: `pattern=("rwkv7", "rwkv_channel_mix")` with `channel=None`. `layer_index` and `num_layers`
    then count both kinds of block. Parameters start as in the authors' training code, the output
    projection at 0.

    Attributes (beside those of `TokenShiftLayer`; `heads` changes nothing):
        expand: inner channels per feature.
    """

    expand: int = 4

    PAPER: ClassVar[str] = "Peng et al. 2025, arXiv:2503.14456"
    MEMORY: ClassVar[str] = "the last token"
    OPERATION: ClassVar[str] = "causal_conv"
    STATE: ClassVar[type] = RWKVChannelMixState

    def setup(self):
        check_count("expand", self.expand, 1)
        _, late = self.depth()
        self.setup_shift(key=self.falling(late**4))
        start = uniform_within(0.5 * self.features**-0.5)
        self.key = self.dense(self.expand * self.features, kernel_init=start)
        self.output = self.dense(self.features, kernel_init=nn.initializers.zeros)

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> RWKVChannelMixState:
        """No last token; `context` changes nothing."""
        tail = conv_tail(batch, 2, self.features, self.activation_dtype())
        return self.STATE(conv=tail, segment=no_segment(batch))

    def mix(self, inputs, state, segment_ids):
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        change, last = self.shift(inputs, state.conv, segment_ids)
        out = nn.relu(self.key(self.shifted(inputs, change)["key"])) ** 2
        return out, self.STATE(conv=last, segment=leave(state, segment_ids))

    def finish(self, x, out):
        return self.output(out)
