"""The delta rule with momentum: what a memory got wrong goes on being written for a while."""

from memseq.pallas_kernels.momentum_delta_rule.api import FORMS, momentum_delta_rule

__all__ = ["FORMS", "momentum_delta_rule"]
