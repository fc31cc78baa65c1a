"""Maps from logits to weights that are not softmax: sparse ones, and ones that may sum to less."""

from memseq.pallas_kernels.entmax.budget import k_subsets, k_subsets_conjugate
from memseq.pallas_kernels.entmax.newton import entmax, entmax_conjugate, sparsemax
from memseq.pallas_kernels.entmax.sink import softmax_n, softmax_with_sink

__all__ = [
    "entmax",
    "entmax_conjugate",
    "k_subsets",
    "k_subsets_conjugate",
    "softmax_n",
    "softmax_with_sink",
    "sparsemax",
]
