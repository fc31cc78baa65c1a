"""The selective state space of Mamba: every channel has a small memory, all write alike."""

from memseq.pallas_kernels.selective_scan.api import FORMS, selective_scan

__all__ = ["FORMS", "selective_scan"]
