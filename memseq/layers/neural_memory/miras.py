"""Miras: neural memories with other losses and other ways of forgetting than Titans'."""

from typing import ClassVar

from memseq.layers.common.base import state_dataclass
from memseq.layers.neural_memory.neural_memory import NeuralMemory, NeuralMemoryState


@state_dataclass
class MonetaState(NeuralMemoryState):
    """State of `Moneta`."""


class Moneta(NeuralMemory):
    """A memory that weighs large errors more, with weights kept at a bounded norm.

        A_t = keep_t A_{t-1} - step_t grad |M(k_t; W) - v_t|_p^p,  W = A / max(|A|_q, 1)^(q-2)

    Behrouz et al. 2025, arXiv:2504.13173, equation 24, p = 3 (`power`) and q = 4
    (`retention_amount`). As in its parallel form the norm inside a chunk is that of the chunk's
    start. Read so: gates are one number a head and step, the paper's are one a channel; and norms
    below 1, by which the paper divides too, stay out: as A is forgotten its quotient grows without
    bound, and of 500 training steps on 4,096 tokens none had a finite gradient.
    """

    use_momentum: bool = False
    loss: str = "lp"
    power: float = 3.0
    initial_step: float = 0.01  # large errors weigh more: at 0.1 training goes to NaN at once
    retention: str = "lq"
    retention_amount: float | None = 4.0

    PAPER: ClassVar[str] = "Behrouz et al. 2025, arXiv:2504.13173"
    STATE: ClassVar[type] = MonetaState


@state_dataclass
class YaadState(NeuralMemoryState):
    """State of `Yaad`."""


class Yaad(NeuralMemory):
    """A memory that outliers move no more than a bounded amount.

        W_t = keep_t W_{t-1} - step_t grad huber(|M(k_t) - v_t|, threshold_t)

    Behrouz et al. 2025, arXiv:2504.13173, equation 26: |r|^2 / 2 up to the threshold, linear in |r|
    beyond. Read so: the threshold is one of the error's length, not of each coordinate
    (`loss="huber_each"` is that), sqrt(value_dim) softplus(w x + b), starting at sqrt(value_dim).
    """

    use_momentum: bool = False
    loss: str = "huber"

    PAPER: ClassVar[str] = "Behrouz et al. 2025, arXiv:2504.13173"
    STATE: ClassVar[type] = YaadState


@state_dataclass
class MemoraState(NeuralMemoryState):
    """State of `Memora`. The weights that it holds are logarithms, up to a constant."""


class Memora(NeuralMemory):
    """A memory whose weights are positive and of fixed sums, written by multiplication.

        W_t = size softmax(keep_t log W_{t-1} - step_t grad |M(k_t) - v_t|^2)

    Behrouz et al. 2025, arXiv:2504.13173, equation 28 (retention by relative entropy), its gradient
    taken at the chunk's start. Read so: the weights from the inputs of one unit of the network are
    one distribution, size (`retention_amount`) is 4, and logarithms start normal. Since softmax
    ignores constants, the logarithms' recurrence is linear and exact, also within a chunk; the
    weights of every step of a chunk are formed to be read.
    """

    use_momentum: bool = False
    retention: str = "softmax"
    retention_amount: float | None = 4.0
    initial_std: float | None = 1.0
    memory_epsilon: float = 1e-3  # outputs of similar distributions differ little

    PAPER: ClassVar[str] = "Behrouz et al. 2025, arXiv:2504.13173"
    STATE: ClassVar[type] = MemoraState
