"""A vector memory whose every channel decays, turns and adds on its own."""

from memseq.pallas_kernels.linear_scan.api import FORMS, linear_scan

__all__ = ["FORMS", "linear_scan"]
