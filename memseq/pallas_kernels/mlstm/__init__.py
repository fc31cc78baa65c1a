"""The memory of mLSTM, a composition on linear attention."""

from memseq.pallas_kernels.mlstm.api import mlstm

__all__ = ["mlstm"]
