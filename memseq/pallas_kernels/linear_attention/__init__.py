"""Linear attention: a matrix memory with Hebbian writes and elementwise decay."""

from memseq.pallas_kernels.linear_attention.api import FORMS, linear_attention

__all__ = ["FORMS", "linear_attention"]
