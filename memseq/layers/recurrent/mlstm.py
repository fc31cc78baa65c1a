"""mLSTM: a matrix memory behind exponential gates."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import widen
from memseq.pallas_kernels import mlstm


@state_dataclass
class MLSTMState(MatrixState):
    """State of `MLSTM`: what is remembered is exp(stabilizer) times `memory`.

    Attributes:
        memory: float32 [batch, heads, key_dim, value_dim + 1]; the last column is the normaliser.
        stabilizer: float32 [batch, heads], the exponent taken out of memory, at least 0.
    """

    stabilizer: jax.Array


class MLSTM(MatrixLayer):
    """The matrix memory of xLSTM: an exponential input gate, and a read-out that is normalised.

        C_t = f_t C_{t-1} + i_t k_t v_t^T,  n_t = f_t n_{t-1} + i_t k_t,
        out_t = C_t^T q_t / max(|n_t . q_t|, 1),  f_t = sigmoid(c(W_f x_t)),  i_t = exp(c(W_i x_t))

    with q scaled by key_dim ** -0.5 and the soft cap c(g) = cap tanh(g / cap). Beck et al. 2024,
    "xLSTM", arXiv:2405.04517, equations 19 to 27, in the block of xLSTM 7B (Beck et al. 2025,
    arXiv:2503.13427, section 3): query, key, value and gates from x itself, a norm over each head
    and a sigmoid gate on the read-out. Gates start constant: the input gate's logarithm at
    `input_bias`, the forget gate's pre-activation from 3 to 6 over the heads.

    The memory is the operation `memseq.pallas_kernels.mlstm`, which keeps the exponential gate in
    range and whose gradient is complete: that of the equations above, also through the normaliser
    and from the returned state, whatever follows the cell.

    Attributes (beside those of every layer and of `MatrixLayer`):
        gate_cap: bound c of both gates' pre-activations; None is no bound.
        input_bias: where the logarithm of the input gate starts.
    """

    output_gate: bool = True
    gate_activation: str = "sigmoid"
    gate_cap: float | None = 15.0
    input_bias: float = -10.0

    PAPER: ClassVar[str] = "Beck et al. 2024, arXiv:2405.04517"
    MEMORY: ClassVar[str] = "matrix [heads, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "linear_attention"
    STATE: ClassVar[type] = MLSTMState

    def setup(self):
        if self.gate_cap is not None and not self.gate_cap > 0:
            raise ValueError(f"gate_cap: expected a positive number or None, got {self.gate_cap}")
        self.setup_matrix(activation=None)

        def forget_bias(key, shape, dtype):
            return jnp.linspace(3.0, 6.0, *shape, dtype=dtype)

        self.input_gate = self._gate(nn.initializers.constant(self.input_bias))
        self.forget_gate = self._gate(forget_bias)

    @nn.nowrap
    def _gate(self, bias_init) -> nn.Dense:
        return nn.Dense(
            self.heads,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.zeros,
            bias_init=bias_init,
        )

    @nn.nowrap
    def init_state(self, batch, context=None):
        heads, key_dim, _, value_dim = self.dims()
        return self.empty_state(
            batch,
            memory=jnp.zeros((batch, heads, key_dim, value_dim + 1), jnp.float32),
            stabilizer=jnp.zeros((batch, heads), jnp.float32),
        )

    def gates(self, x):
        found = []
        for gate in (self.input_gate, self.forget_gate):
            g = widen(gate(x))
            found.append(
                g if self.gate_cap is None else self.gate_cap * jnp.tanh(g / self.gate_cap)
            )
        return found[0], self.sow_decay(nn.log_sigmoid(found[1]))

    def mix(self, inputs, state, segment_ids):
        mixed, log_input, log_forget = inputs
        state = enter(state, self.init_state(mixed.shape[0]), segment_ids)
        query, key, value, conv = self.convolve(mixed, state, segment_ids)
        out, (memory, last) = mlstm(
            query,
            key,
            value,
            log_input,
            log_forget,
            initial_state=(state.memory, state.stabilizer),
            **self.operation_options(segment_ids),
        )
        return out, self.leave_with(state, segment_ids, memory=memory, conv=conv, stabilizer=last)
