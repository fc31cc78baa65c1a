"""The ridge read-out: the best linear map for everything written, solved for at each read."""

from memseq.pallas_kernels.ridge_readout.api import FORMS, RidgeState, ridge_readout

__all__ = ["FORMS", "RidgeState", "ridge_readout"]
