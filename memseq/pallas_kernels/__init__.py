"""Memory operations: one folder each, every form of an operation computes the same function."""

from memseq.pallas_kernels.attention import attention
from memseq.pallas_kernels.causal_conv import causal_conv
from memseq.pallas_kernels.delta_rule import delta_rule
from memseq.pallas_kernels.linear_attention import linear_attention

__all__ = ["attention", "causal_conv", "delta_rule", "linear_attention"]
