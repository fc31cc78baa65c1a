"""A network that is trained while it is read: Titans, TTT, Miras, the Omega rule."""

from memseq.pallas_kernels.neural_memory.api import FORMS, neural_memory
from memseq.pallas_kernels.neural_memory.losses import Loss
from memseq.pallas_kernels.neural_memory.memory import Memory
from memseq.pallas_kernels.neural_memory.retention import Retention
from memseq.pallas_kernels.neural_memory.state import MemoryState, empty_state

__all__ = ["FORMS", "Loss", "Memory", "MemoryState", "Retention", "empty_state", "neural_memory"]
