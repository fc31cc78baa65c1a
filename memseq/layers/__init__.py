"""Sequence layers with associative memory: Flax Linen modules over `memseq.pallas_kernels`.

layer = GatedDeltaNet(features=512, heads=4)
params = layer.init(key, x)                          # x [batch, time, features]
y, state = layer.apply(params, x)
y, state = layer.apply(params, more, state)          # goes on where it stopped
"""

from memseq.layers.attention.softmax_attention import SoftmaxAttention
from memseq.layers.common.base import SequenceLayer
from memseq.layers.delta_rule.delta_net import DeltaNet
from memseq.layers.delta_rule.gated_delta_net import GatedDeltaNet
from memseq.layers.linear_attention.gated_linear_attention import GatedLinearAttention
from memseq.layers.linear_attention.linear_attention import LinearAttention
from memseq.layers.state_space.mamba2 import Mamba2

# Every causal sequence layer by name; each constructor works with `features` alone.
REGISTRY = {
    "softmax_attention": SoftmaxAttention,
    "linear_attention": LinearAttention,
    "gated_linear_attention": GatedLinearAttention,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "mamba2": Mamba2,
}
SET_LAYERS: dict = {}
CHANNEL_LAYERS: dict = {}
CROSS_LAYERS: dict = {}

__all__ = [
    "CHANNEL_LAYERS",
    "CROSS_LAYERS",
    "REGISTRY",
    "SET_LAYERS",
    "DeltaNet",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "LinearAttention",
    "Mamba2",
    "SequenceLayer",
    "SoftmaxAttention",
]
