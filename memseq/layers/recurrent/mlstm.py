"""mLSTM: a matrix memory behind exponential gates."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import widen
from memseq.pallas_kernels import linear_attention
from memseq.pallas_kernels.common.segments import hide_padding, restarts, segments


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

    See `stabilized` for how the exponential gate is kept in range. Its gradient is complete: that
    of the equations above, also through the normaliser and from the returned state, whatever
    follows the cell.

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
        log_write, log_decay, level, last = stabilized(
            log_input, log_forget, state.stabilizer, segment_ids
        )
        out, memory = linear_attention(
            query,
            (jnp.exp(log_write)[..., None] * key).astype(key.dtype),
            jnp.concatenate([widen(value), jnp.ones_like(widen(value)[..., :1])], axis=-1),
            log_decay,
            initial_state=state.memory,
            **self.operation_options(segment_ids),
        )
        out = normalized(out, level).astype(value.dtype)
        return out, self.leave_with(state, segment_ids, memory=memory, conv=conv, stabilizer=last)


def stabilized(
    log_input: jax.Array,
    log_forget: jax.Array,
    start: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Takes a common exponent out of a memory with exponential gates, so that nothing overflows.

    The memory M_t = f_t M_{t-1} + i_t u_t is held as M_t exp(-m_t) with
    m_t = max(log f_t + m_{t-1}, log i_t, 0): the stabiliser of xLSTM (equation 15), which at 0 and
    below has nothing to do, as the read-out is divided by at least 1. Any m describes the same
    memory, so it is a constant to the gradient.

    Args:
        log_input, log_forget: [batch, time, heads], log_forget <= 0.
        start: [batch, heads], m before the first step, >= 0.
        segment_ids: as the operations take them; m starts at 0 in each segment but the first.

    Returns:
        log_write and log_decay [batch, time, heads], both <= 0, to write and keep with; m_t
        [batch, time, heads], and the last one [batch, heads].
    """
    falls, rises = log_forget, jnp.maximum(log_input, 0)
    restart = None
    if segment_ids is not None:
        valid, index = segments(segment_ids)
        log_input, log_forget, falls, rises = (
            hide_padding(x, valid) for x in (log_input, log_forget, falls, rises)
        )
        restart = restarts(index)[..., None]
        falls = jnp.where(restart, -jnp.inf, falls)

    start = start.astype(falls.dtype)
    steps = jax.lax.stop_gradient((falls, rises))
    fall, rise = jax.lax.associative_scan(one_after_another, steps, axis=1)
    start = jax.lax.stop_gradient(start)[:, None]
    level = jnp.maximum(start + fall, rise)
    before = jnp.concatenate([start, level[:, :-1]], axis=1)
    log_decay = _rounded_down(log_forget + before - level)
    if restart is not None:
        log_decay = jnp.where(restart, 0, log_decay)
    return _rounded_down(log_input - level), log_decay, level, level[:, -1]


def one_after_another(first: tuple, second: tuple) -> tuple[jax.Array, jax.Array]:
    """The map m -> max(m + fall, rise) of two steps from those of each, as (fall, rise).

    A fall of -inf forgets what came before.
    """
    (fall_1, rise_1), (fall_2, rise_2) = first, second
    return fall_1 + fall_2, jnp.maximum(rise_1 + fall_2, rise_2)


def _rounded_down(x: jax.Array) -> jax.Array:
    """x, which exceeds 0 by rounding alone, at most 0; its slope is 1 also at 0."""
    return x - jax.lax.stop_gradient(jnp.maximum(x, 0))


def normalized(out: jax.Array, level: jax.Array) -> jax.Array:
    """C q / max(|n . q|, exp(-m)), from both reads side by side [..., value_dim + 1]."""
    least = jnp.maximum(jnp.exp(-level), 1e-30)  # the exponential may underflow to 0
    return out[..., :-1] / jnp.maximum(jnp.abs(out[..., -1]), least)[..., None]
