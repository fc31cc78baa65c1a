"""RWKV-7."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.matrix import MatrixState
from memseq.layers.common.parts import l2_normalize, uniform_within
from memseq.layers.common.token_shift import TokenShiftLayer, constant
from memseq.pallas_kernels import diagonal_plus_low_rank
from memseq.pallas_kernels.common.checks import check_count

_FIRST_VALUE = "rwkv7_value"


@state_dataclass
class RWKV7State(MatrixState):
    """State of `RWKV7`; `conv` is the last token."""


class RWKV7(TokenShiftLayer):
    """A matrix memory that decays by channel and removes under one key what it then adds to.

        S_t = (Diag(w_t) - (rate_t * r_t) r_t^T) S_{t-1} + k_t v_t^T,  out_t = S_t^T q_t,
        log w_t = -exp(-1/2) sigmoid(decay(x_t)),  rate_t = sigmoid(rate(x_t)),
        r_t = unit(W_k x_t * remove_scale),  k_t = W_k x_t * (1 + (rate_t - 1) * key_scale)

    with products of vectors elementwise and the removal r reading the memory before its decay. Peng
    et al. 2025, "RWKV-7 Goose", arXiv:2503.14456: x_t is mixed with the token before it, by a share
    for each use; the decay, the rate, the gate and the value's mixture are projections of low rank;
    the read-out is normed by heads, plus a bonus for the present pair, times the gate. Values are
    mixed with those of the model's first such layer, by `shared`; a layer that finds none there
    leaves its own, and has no parameters for the mixture.

    Parameters start as in the authors' training code; the output projection starts at 0, so that
    the layer does.

    Attributes (beside those of `TokenShiftLayer`):
        heads: the paper has one head for 64 features.
        decay_rank, rate_rank, value_rank, gate_rank: inner sizes of the projections of low rank;
            None is a multiple of 32 near 2.5, 2.5, 1.7 and 5 times sqrt(features).
    """

    decay_rank: int | None = None
    rate_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None

    PAPER: ClassVar[str] = "Peng et al. 2025, arXiv:2503.14456"
    OPERATION: ClassVar[str] = "diagonal_plus_low_rank"
    STATE: ClassVar[type] = RWKV7State
    SHARES: ClassVar[bool] = True

    def setup(self):
        size, dim = self.features, self.head_dim()
        early, late = self.depth()
        self.setup_shift(
            query=self.falling(0.2 * late),
            decay=self.falling(0.9 * late),
            key=self.falling(0.7 * late),
            value=self.falling(0.7 * late),
            rate=self.falling(0.9 * late),
            gate=self.falling(0.2 * late),
        )
        narrow = uniform_within(0.5 * size**-0.5)
        self.query = self.dense(size, kernel_init=narrow)
        self.key = self.dense(size, kernel_init=uniform_within(0.05 * size**-0.5))
        self.value = self.dense(size, kernel_init=narrow)
        self.output = self.dense(size, kernel_init=nn.initializers.zeros)
        self.norm = self.head_norm()

        place = np.arange(size) / max(size - 1, 1)
        # from -1 to 1 along each head's channels, flat in the middle
        within = 2 * (np.arange(size) % dim) / max(dim - 1, 1) - 1
        within = within * abs(within)
        ramp = 6 * place ** (1 + early**0.3) - 6
        self.decay_gate = self.gate_of("decay_rank", 2.5, ramp + 0.5 + 2.5 * within, jnp.tanh)
        self.rate_gate = self.gate_of("rate_rank", 2.5, 0.4 * place - 0.39 + 0.3 * within)
        self.value_gate = self.gate_of("value_rank", 1.7, 0.93 - 0.4 * place)
        rank = self.rank_of("gate_rank", 5.0)
        self.gate_in = self.dense(rank, kernel_init=nn.initializers.zeros)
        self.gate_out = self.dense(size, kernel_init=_orthogonal(rank, size))

        self.remove_scale = self.vector("remove_scale", 0.76 - 0.1 * place)
        self.key_scale = self.vector("key_scale", np.full(size, 1.02))
        self.bonus = self.vector("bonus", np.full((self.heads, dim), -0.04))

    @nn.nowrap
    def rank_of(self, name: str, factor: float) -> int:
        check_count(name, getattr(self, name), 1, optional=True)
        suggested = max(32, 32 * round(factor * math.sqrt(self.features) / 32))
        return getattr(self, name) or suggested

    @nn.nowrap
    def gate_of(self, name: str, factor: float, bias: np.ndarray, activation=lambda x: x):
        rank, size = self.rank_of(name, factor), self.features
        start = _orthogonal(rank, size)
        return self.low_rank(rank, size, constant(bias), start, activation=activation)

    def vector(self, name: str, start: np.ndarray) -> jax.Array:
        return self.param(name, constant(start), start.shape, jnp.float32)

    def mix(self, inputs, state, segment_ids, shared):
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        change, last = self.shift(inputs, state.conv, segment_ids)
        x = self.shifted(inputs, change)
        query, value = self.heads_of(self.query(x["query"])), self.heads_of(self.value(x["value"]))
        first = shared.setdefault(_FIRST_VALUE, value)
        if first is not value:
            share = self.heads_of(nn.sigmoid(self.value_gate(x["value"])))
            value = (value + (first - value) * share).astype(value.dtype)
        decay = nn.sigmoid(self.decay_gate(x["decay"]))
        log_decay = self.sow_decay(self.heads_of(-math.exp(-0.5) * decay))
        rate = nn.sigmoid(self.rate_gate(x["rate"]))
        self.sow("intermediates", "mean_rate", rate.mean())
        raw = self.key(x["key"])
        remove = l2_normalize(self.heads_of(raw * self.remove_scale))
        key = self.heads_of(raw * (1 + (rate - 1) * self.key_scale))
        out, memory = diagonal_plus_low_rank(
            query,
            key.astype(value.dtype),
            value,
            -remove.astype(value.dtype),
            (remove * self.heads_of(rate)).astype(value.dtype),
            log_decay,
            scale=1.0,
            initial_state=state.memory,
            **self.operation_options(segment_ids),
        )
        present = jnp.sum(query * key * self.bonus, axis=-1, keepdims=True) * value
        gate = self.heads_of(self.gate_out(nn.sigmoid(self.gate_in(x["gate"]))))
        out = ((self.norm(out) + present) * gate).astype(value.dtype)
        return out, self.leave_with(state, segment_ids, memory=memory, conv=last)


def _orthogonal(rank: int, size: int):
    return nn.initializers.orthogonal(0.1 * math.sqrt(max(rank / size, 1)))
