"""Mamba-3."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.parts import RMSNorm, dt_bias_init, merge_heads, split_heads, widen
from memseq.layers.recurrent.bilinear import turned
from memseq.layers.state_space.mamba2 import Mamba2, Mamba2State
from memseq.pallas_kernels import causal_conv, linear_attention


@state_dataclass
class Mamba3State(Mamba2State):
    """State of `Mamba3`.

    Attributes:
        memory: float32 [batch, heads, state_dim, head_dim].
        conv: [batch, 1, heads * (state_dim + head_dim)], key and value of the step before.
        turn: float32 [batch, heads * planes, 2], cosine and sine of the angle so far.
    """

    turn: jax.Array


class Mamba3(Mamba2):
    """Mamba-2 with a trapezoidal rule instead of a convolution, and a state that turns.

        S_t = a_t S_{t-1} + (1 - m_t) dt_t a_t k_{t-1} v_{t-1}^T + m_t dt_t k_t v_t^T,
        out_t = S_t^T q_t + D v_t,  a_t = exp(-rate_t dt_t),  m_t = sigmoid(M x_t),
        k_t = R(angle_t) (norm(B x_t) + key_bias),  q_t = R(angle_t) (norm(C x_t) + query_bias),
        angle_t = angle_{t-1} + pi dt_t tanh(T x_t),  y = W (out * silu(z))

    Lahoti et al. 2026, "Mamba-3", and the authors' code (state-spaces/mamba): rate = heavy(W x),
    at least 1e-4, with heavy(x) = 1 + x from 0 on and 1 / (1 - x) below, which their code took for
    softplus after a large run diverged. Rotating key and query by all angles so far is a complex
    transition of the state. The trapezoid is two passes of linear attention, one for the pairs of
    this step and one for those of the step before; the angle is carried as cosine and sine and
    never grows. One input and output a head (SISO); the paper's MIMO variant is not here.

    Attributes (beside those of `Mamba2`; conv_width and dt_limit change nothing):
        turning: share of state_dim that turns, in (0, 1]: neighbours in pairs, from the first on.
    """

    turning: float = 0.5

    PAPER: ClassVar[str] = "Lahoti et al. 2026, Mamba-3"
    STATE: ClassVar[type] = Mamba3State

    def setup(self):
        inner, heads, _ = self._dims()
        self._planes()
        self.gate = self.dense(inner)
        self.value = self.dense(inner)
        self.key = self.dense(self.groups * self.state_dim)
        self.query = self.dense(self.groups * self.state_dim)
        self.step_size = self.dense(heads)
        self.rate = self.dense(heads)
        self.mix_gate = self.dense(heads)
        self.angle = self.dense(self._planes())
        self.dt_bias = self.param("dt_bias", dt_bias_init, (heads,))
        shape = (heads, self.state_dim)
        self.key_bias = self.param("key_bias", nn.initializers.ones, shape, self.param_dtype)
        self.query_bias = self.param("query_bias", nn.initializers.ones, shape, self.param_dtype)
        self.key_norm = RMSNorm(param_dtype=self.param_dtype)
        self.query_norm = RMSNorm(param_dtype=self.param_dtype)
        self.skip = self.param("D", nn.initializers.ones, (heads,), jnp.float32)
        self.output = self.dense(self.features)

    @nn.nowrap
    def _planes(self) -> int:
        """Pairs of a head's state that turn."""
        planes = int(self.turning * self.state_dim) // 2
        if not 0 < self.turning <= 1 or planes < 1:
            raise ValueError(
                f"turning: expected a share of state_dim {self.state_dim} in (0, 1] with at least "
                f"one pair, got {self.turning}"
            )
        return planes

    @nn.nowrap
    def _channels(self) -> int:
        _, heads, head_dim = self._dims()
        return heads * (self.state_dim + head_dim)

    @nn.nowrap
    def init_state(self, batch, context=None):
        """An empty memory at angle 0; `context` changes nothing."""
        _, heads, _ = self._dims()
        start = jnp.zeros((batch, heads * self._planes(), 2), jnp.float32).at[..., 0].set(1)
        empty = jnp.zeros((batch, 1, self._channels()), self.activation_dtype())
        return self.empty_state(batch, turn=start, conv=empty)

    def project(self, x: jax.Array) -> Any:
        _, heads, _ = self._dims()
        dt = nn.softplus(widen(self.step_size(x)) + self.dt_bias)
        rate = widen(self.rate(x))
        # both branches are finite everywhere, so neither spoils the other's gradient
        heavy = jnp.where(rate >= 0, 1 + rate, 1 / (1 + jnp.abs(rate)))
        log_decay = self.sow_decay(-jnp.maximum(heavy, 1e-4) * dt)
        angle = jnp.pi * dt[..., None] * jnp.tanh(widen(self.angle(x)))[..., None, :]

        def by_head(vector, norm, bias):
            vector = norm(split_heads(vector, self.groups))
            return jnp.repeat(vector, heads // self.groups, axis=2) + bias.astype(vector.dtype)

        key = by_head(self.key(x), self.key_norm, self.key_bias)
        query = by_head(self.query(x), self.query_norm, self.query_bias)
        now = nn.sigmoid(widen(self.mix_gate(x)))
        return query, key, split_heads(self.value(x), heads), log_decay, dt, now, angle

    def mix(self, inputs, state, segment_ids):
        query, key, value, log_decay, dt, now, angle = inputs
        batch, time, heads, size = key.shape
        state = enter(state, self.init_state(batch), segment_ids)
        options = self.operation_options(segment_ids)
        turns, turn = turned(angle.reshape(batch, time, -1), state.turn, **options)
        turns = turns.reshape(batch, time, heads, -1)
        query, key = rotate_pairs(query, turns), rotate_pairs(key, turns)
        both = jnp.concatenate([merge_heads(key), merge_heads(value)], axis=-1)
        before, conv = causal_conv(
            both,
            jnp.zeros((2, both.shape[-1]), both.dtype).at[0].set(1),
            initial_state=state.conv.astype(both.dtype),
            segment_ids=segment_ids,
            implementation=self.plain_implementation(),
        )
        key_before, value_before = jnp.split(before, [heads * size], axis=-1)
        options |= {"scale": 1.0}

        def remember(key, value, strength, start):
            value = (value * strength[..., None]).astype(value.dtype)
            return linear_attention(query, key, value, log_decay, initial_state=start, **options)

        out, memory = remember(key, value, dt * now, state.memory)
        earlier, more = remember(
            split_heads(key_before, heads),
            split_heads(value_before, heads),
            (1 - now) * dt * jnp.exp(log_decay),
            None,
        )
        out = out + earlier + (self.skip[:, None] * value).astype(out.dtype)
        return out, self.leave_with(state, segment_ids, memory=memory + more, conv=conv, turn=turn)

    def finish(self, x: jax.Array, out: jax.Array) -> jax.Array:
        return self.output(merge_heads(out) * nn.silu(self.gate(x)))


def rotate_pairs(x: jax.Array, turns: jax.Array) -> jax.Array:
    """Turns the pairs (x_0, x_1), (x_2, x_3), ... of the last axis by complex `turns` [..., n]."""
    planes = turns.shape[-1]
    head, rest = x[..., : 2 * planes], x[..., 2 * planes :]
    wide = widen(head).reshape(*head.shape[:-1], planes, 2)
    first, second, cos, sin = wide[..., 0], wide[..., 1], turns.real, turns.imag
    pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([pairs.reshape(head.shape).astype(x.dtype), rest], axis=-1)
