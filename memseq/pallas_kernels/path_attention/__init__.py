"""PaTH attention: softmax attention whose keys are reflected by every step that follows them."""

from memseq.pallas_kernels.path_attention.api import FORMS, path_attention

__all__ = ["FORMS", "path_attention"]
