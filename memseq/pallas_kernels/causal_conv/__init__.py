"""Short depthwise convolution over time: a memory of the last few inputs."""

from memseq.pallas_kernels.causal_conv.api import FORMS, causal_conv

__all__ = ["FORMS", "causal_conv"]
