"""A matrix memory whose transition is a diagonal plus a rank-one matrix."""

from memseq.pallas_kernels.diagonal_plus_low_rank.api import FORMS, diagonal_plus_low_rank

__all__ = ["FORMS", "diagonal_plus_low_rank"]
