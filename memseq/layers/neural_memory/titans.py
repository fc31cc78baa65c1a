"""Titans: a long-term memory alone, and three ways of putting it beside attention."""

from typing import ClassVar

from memseq.layers.common.base import state_dataclass
from memseq.layers.neural_memory.neural_memory import NeuralMemory, NeuralMemoryState


@state_dataclass
class TitansLMMState(NeuralMemoryState):
    """State of `TitansLMM`."""


class TitansLMM(NeuralMemory):
    """Titans' long-term memory without attention: an MLP, surprise with momentum, forgetting.

        S_t = momentum_t S_{t-1} - step_t grad |M(k_t) - v_t|^2,  W_t = keep_t W_{t-1} + S_t

    Behrouz et al. 2025, arXiv:2501.00663, equations 9 to 15; keep is their 1 - alpha, step twice
    their theta (the loss here has the factor 1/2), momentum their eta. What the paper leaves open
    is read so: gates are sigmoids of linear maps, one number a head and step; M(x) = x + norm of a
    two-layer MLP with GELU, four times as wide; W_0 is learned; the momentum starts at zero with
    every segment and goes on over chunks and calls; chunks of 16. Attributes as `NeuralMemory`.
    """

    PAPER: ClassVar[str] = "Behrouz et al. 2025, arXiv:2501.00663"
    STATE: ClassVar[type] = TitansLMMState
