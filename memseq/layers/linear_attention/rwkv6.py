"""RWKV-6."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.matrix import MatrixState
from memseq.layers.common.parts import uniform_within
from memseq.layers.common.token_shift import TokenShiftLayer, constant
from memseq.pallas_kernels import linear_attention
from memseq.pallas_kernels.common.checks import check_count


class UseKernels(nn.Module):
    """A matrix for each use: x [batch, time, uses, rank] to a list of [batch, time, size]."""

    size: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        shape = (*x.shape[2:], self.size)
        kernel = self.param("kernel", uniform_within(0.01), shape, self.param_dtype)
        return list(jnp.einsum("btur,urf->ubtf", x, kernel.astype(x.dtype)))


@state_dataclass
class RWKV6State(MatrixState):
    """State of `RWKV6`; `conv` is the last token."""


class RWKV6(TokenShiftLayer):
    """A matrix memory that decays by channel and is read before the present pair is written.

        S_t = Diag(w_t) S_{t-1} + k_t v_t^T,  out_t = (S_{t-1} + (bonus * k_t) v_t^T)^T q_t,
        log w_t = -exp(decay(x_t))

    Peng et al. 2024, "Eagle and Finch", arXiv:2404.05892 (Finch). What is projected is x_t mixed
    with the token before it; how much of it, for each use and channel, depends on the two by a
    projection of low rank. The decay's projection is of low rank too. The read-out is normed by
    heads and gated by silu. Decays and shares start as in the authors' training code.

    decay(x_t) is cut at 5: what is left after such a step, exp(-148), is 0 in float32, and the
    exponential cannot overflow.

    Attributes (beside those of `TokenShiftLayer`):
        heads: the paper has one head for 64 features.
        shift_rank: inner size of the mixtures' projection, for each of the five uses.
        decay_rank: inner size of the decay's projection.
    """

    shift_rank: int = 32
    decay_rank: int = 64

    PAPER: ClassVar[str] = "Peng et al. 2024, arXiv:2404.05892"
    OPERATION: ClassVar[str] = "linear_attention"
    STATE: ClassVar[type] = RWKV6State

    def setup(self):
        check_count("shift_rank", self.shift_rank, 1)
        check_count("decay_rank", self.decay_rank, 1)
        size, dim = self.features, self.head_dim()
        early, late = self.depth()
        self.setup_shift(
            query=self.falling(0.5 * late),
            key=self.falling(late),
            value=self.falling(late) - 0.3 * early,
            decay=self.falling(late),
            gate=self.falling(0.5 * late),
        )
        place = np.arange(size) / max(size - 1, 1)
        first = constant(self.falling(late))
        self.first_shift_bias = self.param("first_shift_bias", first, (size,), self.param_dtype)
        uses = len(self.shift_names)
        self.shift_in = self.dense(uses * self.shift_rank, kernel_init=nn.initializers.zeros)
        self.shift_out = UseKernels(size, self.param_dtype)
        self.query = self.dense(size)
        self.key = self.dense(size)
        self.value = self.dense(size)
        self.gate = self.dense(size)
        self.output = self.dense(size)
        self.norm = self.head_norm()
        slow = constant(5 * place ** (0.7 + 1.3 * early) - 6)
        start = uniform_within(0.01)
        self.decay_gate = self.low_rank(self.decay_rank, size, slow, start, activation=jnp.tanh)
        bonus = early * (1 - place) + 0.1 * ((np.arange(size) + 1) % 3 - 1)
        self.bonus = self.param("bonus", constant(bonus), (self.heads, dim), jnp.float32)

    def mix(self, inputs, state, segment_ids):
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        change, last = self.shift(inputs, state.conv, segment_ids)
        own = jnp.tanh(self.shift_in(inputs + change * self.first_shift_bias.astype(inputs.dtype)))
        own = own.reshape(*own.shape[:2], -1, self.shift_rank)
        x = self.shifted(inputs, change, *self.shift_out(own))
        log_decay = -jnp.exp(jnp.minimum(self.decay_gate(x["decay"]), 5.0))
        out, memory = linear_attention(
            self.heads_of(self.query(x["query"])),
            self.heads_of(self.key(x["key"])),
            self.heads_of(self.value(x["value"])),
            self.sow_decay(self.heads_of(log_decay)),
            bonus=self.bonus,
            scale=1.0,
            initial_state=state.memory,
            **self.operation_options(segment_ids),
        )
        gate = nn.silu(self.heads_of(self.gate(x["gate"])))
        out = (self.norm(out) * gate).astype(out.dtype)
        return out, self.leave_with(state, segment_ids, memory=memory, conv=last)
