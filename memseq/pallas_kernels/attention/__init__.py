"""Softmax attention: a memory that keeps every key and value."""

from memseq.pallas_kernels.attention.api import FORMS, attention

__all__ = ["FORMS", "attention"]
