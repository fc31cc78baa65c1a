"""The delta rule: a matrix memory that writes what it got wrong."""

from memseq.pallas_kernels.delta_rule.api import FORMS, delta_rule

__all__ = ["FORMS", "delta_rule"]
