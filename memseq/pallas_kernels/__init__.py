"""Memory operations: one folder each, every form of an operation computes the same function."""

from memseq.pallas_kernels.attention import attention
from memseq.pallas_kernels.causal_conv import causal_conv
from memseq.pallas_kernels.delta_rule import delta_rule
from memseq.pallas_kernels.diagonal_plus_low_rank import diagonal_plus_low_rank
from memseq.pallas_kernels.entmax import entmax, k_subsets, softmax_n, sparsemax
from memseq.pallas_kernels.hopfield_retrieve import hopfield_retrieve
from memseq.pallas_kernels.linear_attention import linear_attention
from memseq.pallas_kernels.linear_scan import linear_scan
from memseq.pallas_kernels.log_linear_attention import log_linear_attention
from memseq.pallas_kernels.mlstm import mlstm
from memseq.pallas_kernels.momentum_delta_rule import momentum_delta_rule
from memseq.pallas_kernels.neural_memory import neural_memory
from memseq.pallas_kernels.path_attention import path_attention
from memseq.pallas_kernels.ridge_readout import ridge_readout
from memseq.pallas_kernels.selective_scan import selective_scan

__all__ = [
    "attention",
    "causal_conv",
    "delta_rule",
    "diagonal_plus_low_rank",
    "entmax",
    "hopfield_retrieve",
    "k_subsets",
    "linear_attention",
    "linear_scan",
    "log_linear_attention",
    "mlstm",
    "momentum_delta_rule",
    "neural_memory",
    "path_attention",
    "ridge_readout",
    "selective_scan",
    "softmax_n",
    "sparsemax",
]
