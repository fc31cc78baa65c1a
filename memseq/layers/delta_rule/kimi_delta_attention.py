"""Delta rule layers with a decay for each key channel: Kimi Delta Attention, Gated DeltaNet-2."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import l2_normalize, split_heads
from memseq.layers.delta_rule.delta_net import check_max_beta, write_strength
from memseq.pallas_kernels import delta_rule
from memseq.pallas_kernels.common.checks import check_count, check_heads


class ChannelGate(nn.Module):
    """Log decay per key channel: -exp(A_log) softplus(x + dt_bias), with A_log a number a head.

    With `lower_bound`, for kernels that divide by decays: lower_bound sigmoid(exp(A_log) (x +
    dt_bias)). x [batch, time, heads * dim] to [batch, time, heads, dim], float32 at least.
    """

    heads: int
    dim: int
    lower_bound: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def a_log_init(key, shape):
            if self.lower_bound is not None:
                return jnp.zeros(shape)
            return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1.0, 16.0))

        def dt_bias_init(key, shape):
            low, high = jnp.log(1e-3), jnp.log(1e-1)
            dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
            return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus

        a_log = self.param("A_log", a_log_init, (self.heads,))
        dt_bias = self.param("dt_bias", dt_bias_init, (self.heads * self.dim,))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32)) + dt_bias
        x = split_heads(x, self.heads)
        rate = jnp.exp(a_log)[:, None]
        if self.lower_bound is not None:
            return self.lower_bound * nn.sigmoid(rate * x)
        return -rate * nn.softplus(x)


@state_dataclass
class KimiDeltaAttentionState(MatrixState):
    """State of `KimiDeltaAttention`."""


class KimiDeltaAttention(MatrixLayer):
    """The delta rule on a memory in which every key channel forgets at its own rate.

        S'_t = Diag(a_t) S_{t-1},  S_t = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T,
        out_t = S_t^T q_t / sqrt(key_dim),  log a_t = -exp(A_log) softplus(W2 W1 x_t + dt_bias)

    Kimi Team 2025, "Kimi Linear", arXiv:2510.26692, equation 1 and section 4. The read-out has a
    norm and a sigmoid gate of low rank.

    Attributes (beside those of every layer and of `MatrixLayer`):
        value_heads: a multiple of `heads`; several value heads, each with its own memory, decay
            and write strength, then share a query and key head. None is `heads`.
        gate_rank: inner size of the projections of decay and output gate; None is value_dim.
        lower_bound: None, or the least log decay a step, negative: then
            log a_t = lower_bound sigmoid(exp(A_log) (W2 W1 x_t + dt_bias)).
        max_beta: largest write strength, in (0, 2]: 1 replaces, 2 reflects.
    """

    output_gate: bool = True
    gate_activation: str = "sigmoid"
    conv_width: int = 4
    value_heads: int | None = None
    gate_rank: int | None = None
    lower_bound: float | None = None
    max_beta: float = 1.0

    PAPER: ClassVar[str] = "Kimi Team 2025, arXiv:2510.26692"
    MEMORY: ClassVar[str] = "matrix [value_heads, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "delta_rule"
    STATE: ClassVar[type] = KimiDeltaAttentionState

    def setup(self):
        self.setup_channel_gates()
        self.beta = self.dense(self.dims()[2])

    def setup_channel_gates(self) -> None:
        """Projections, decay and output gate: all but the write strength."""
        check_max_beta(self.max_beta)
        _, key_dim, value_heads, value_dim = self.dims()
        check_heads(self.heads, value_heads, "value_heads")
        check_count("gate_rank", self.gate_rank, 1, optional=True)
        if self.lower_bound is not None and not self.lower_bound < 0:
            raise ValueError(f"lower_bound: expected a negative number, got {self.lower_bound}")
        rank = value_dim if self.gate_rank is None else self.gate_rank
        self.setup_matrix()
        self.decay_in = self.dense(rank)
        self.decay_out = self.dense(value_heads * key_dim)
        self.decay_gate = ChannelGate(value_heads, key_dim, self.lower_bound)
        if self.output_gate:
            self.gate_in = self.dense(rank)

    @nn.nowrap
    def make_gate(self, size):
        return self.dense(size, use_bias=True)

    @nn.nowrap
    def dims(self):
        value_heads = self.heads if self.value_heads is None else self.value_heads
        check_count("value_heads", value_heads, 1)
        key_heads, key_dim, _, value_dim = super().dims()
        return key_heads, key_dim, value_heads, value_dim

    def log_decay(self, x: jax.Array) -> jax.Array:
        """float32 [batch, time, value_heads, key_dim]; sows its mean decay."""
        log_decay = self.decay_gate(self.decay_out(self.decay_in(x)))
        self.sow("intermediates", "mean_decay", jnp.exp(log_decay).mean())
        return log_decay

    def project(self, x):
        return self.project_all(x), write_strength(self, self.beta(x)), self.log_decay(x)

    def mix(self, inputs, state, segment_ids):
        mixed, beta, log_decay = inputs
        state = enter(state, self.init_state(mixed.shape[0]), segment_ids)
        query, key, value, conv = self.convolve(mixed, state, segment_ids)
        out, memory = delta_rule(
            l2_normalize(query),
            l2_normalize(key),
            value,
            beta,
            log_decay,
            initial_state=state.memory,
            **self.operation_options(segment_ids),
        )
        return out, self.leave_with(memory, conv, state, segment_ids)

    def finish(self, x, out):
        return super().finish(self.gate_in(x) if self.output_gate else x, out)


@state_dataclass
class GatedDeltaNet2State(MatrixState):
    """State of `GatedDeltaNet2`."""


class GatedDeltaNet2(KimiDeltaAttention):
    """Kimi Delta Attention whose write strength is split: what is erased, and what is written.

        S'_t = Diag(a_t) S_{t-1},  S_t = S'_t + k_t (w_t v_t - S'_t^T (b_t k_t))^T,
        b_t = max_beta sigmoid(W_b x_t) for each key channel, w_t = sigmoid(W_w x_t) for each value
        channel; products of two vectors are elementwise

    Gated DeltaNet-2 (arXiv:2605.22791). Attributes as `KimiDeltaAttention`; with several value
    heads a query and key head, erasing is the key head's.
    """

    PAPER: ClassVar[str] = "Gated DeltaNet-2, arXiv:2605.22791"
    STATE: ClassVar[type] = GatedDeltaNet2State

    def setup(self):
        self.setup_channel_gates()
        key_heads, key_dim, value_heads, value_dim = self.dims()
        self.erase = self.dense(key_heads * key_dim)
        self.write = self.dense(value_heads * value_dim)

    def project(self, x):
        erase = write_strength(self, self.erase(x))
        write = self.write(x)
        write = nn.sigmoid(write.astype(jnp.promote_types(write.dtype, jnp.float32)))
        self.sow("intermediates", "mean_write", write.mean())
        value_heads = self.dims()[2]
        gates = split_heads(erase, self.heads), split_heads(write, value_heads)
        return self.project_all(x), *gates, self.log_decay(x)

    def mix(self, inputs, state, segment_ids):
        mixed, erase, write, log_decay = inputs
        state = enter(state, self.init_state(mixed.shape[0]), segment_ids)
        query, key, value, conv = self.convolve(mixed, state, segment_ids)
        key = l2_normalize(key)
        out, memory = delta_rule(
            l2_normalize(query),
            key,
            (write * value).astype(value.dtype),
            jnp.ones(value.shape[:3], write.dtype),
            log_decay,
            erase_key=(erase * key).astype(key.dtype),
            initial_state=state.memory,
            **self.operation_options(segment_ids),
        )
        return out, self.leave_with(memory, conv, state, segment_ids)
