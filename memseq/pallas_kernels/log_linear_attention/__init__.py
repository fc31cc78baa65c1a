"""Log-linear attention: a memory for each scale of the past, weighed at every read."""

from memseq.pallas_kernels.log_linear_attention.api import (
    FORMS,
    LogLinearState,
    log_linear_attention,
)

__all__ = ["FORMS", "LogLinearState", "log_linear_attention"]
