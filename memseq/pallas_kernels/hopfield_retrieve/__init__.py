"""Retrieval from a modern Hopfield network: several steps towards stored patterns, then a read."""

from memseq.pallas_kernels.hopfield_retrieve.api import FORMS, hopfield_retrieve

__all__ = ["FORMS", "hopfield_retrieve"]
