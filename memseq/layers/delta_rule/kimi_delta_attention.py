"""Delta rule layers with a decay for each key channel: Kimi Delta Attention, Gated DeltaNet-2."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import dt_bias_init, l2_normalize, split_heads, widen
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

        a_log = self.param("A_log", a_log_init, (self.heads,))
        dt_bias = self.param("dt_bias", dt_bias_init, (self.heads * self.dim,))
        x = split_heads(widen(x) + dt_bias, self.heads)
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
        return self.sow_decay(self.decay_gate(self.decay_out(self.decay_in(x))))

    def gates(self, x):
        return write_strength(self, self.beta(x)), self.log_decay(x)

    def operate(self, query, key, value, beta, log_decay, **options):
        query, key = l2_normalize(query), l2_normalize(key)
        return delta_rule(query, key, value, beta, log_decay, **options)

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

    def gates(self, x):
        erase = write_strength(self, self.erase(x))
        write = nn.sigmoid(widen(self.write(x)))
        self.sow("intermediates", "mean_write", write.mean())
        value_heads = self.dims()[2]
        return split_heads(erase, self.heads), split_heads(write, value_heads), self.log_decay(x)

    def operate(self, query, key, value, erase, write, log_decay, **options):
        key = l2_normalize(key)
        return delta_rule(
            l2_normalize(query),
            key,
            (write * value).astype(value.dtype),
            jnp.ones(value.shape[:3], write.dtype),
            log_decay,
            erase_key=(erase * key).astype(key.dtype),
            **options,
        )
