"""Mamba-3."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.interleave import at_step, repeat_ids
from memseq.layers.common.parts import RMSNorm, dt_bias_init, merge_heads, split_heads, widen
from memseq.layers.recurrent.bilinear import turned
from memseq.layers.state_space.mamba2 import Mamba2, Mamba2State
from memseq.pallas_kernels import causal_conv, linear_attention
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class Mamba3State(Mamba2State):
    """State of `Mamba3`.

    Attributes:
        memory: float32 [batch, heads, state_dim, head_dim].
        conv: [batch, 1, heads * (rank * state_dim + head_dim)], the keys and the value of the step
            before.
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
    never grows.

    With `mimo_rank` R above 1 a step writes and reads R times: key and query are R vectors each,
    and v, z and the sum over the read-outs have a learned gain for every rank and channel,

        S_t = a_t S_{t-1} + sum_r (early_t k_{t-1,r} v_{t-1,r}^T + late_t k_{t,r} v_{t,r}^T),
        y = W sum_r out_scale_r (S_t^T q_{t,r} + D v_{t,r}) silu(gate_scale_r z),

    with v_r = value_scale_r v and early and late as above: more products with a state of the same
    size. The R writes are steps of their own in linear attention, one after another, and a read
    adds those of its step that come after it. (Their MIMO kernel pairs the turning channels i and
    i + n / 2; here neighbours are pairs at any rank.)

    Attributes (beside those of `Mamba2`; conv_width and dt_limit change nothing):
        turning: share of state_dim that turns, in (0, 1]: neighbours in pairs, from the first on.
        mimo_rank: R, 4 in the paper's MIMO models; at 1 the gains are 1 and not learned.
    """

    turning: float = 0.5
    mimo_rank: int = 1

    PAPER: ClassVar[str] = "Lahoti et al. 2026, Mamba-3"
    STATE: ClassVar[type] = Mamba3State

    def setup(self):
        inner, heads, head_dim = self._dims()
        check_count("mimo_rank", self.mimo_rank, 1)
        self._planes()
        self.gate = self.dense(inner)
        self.value = self.dense(inner)
        self.key = self.dense(self.groups * self.mimo_rank * self.state_dim)
        self.query = self.dense(self.groups * self.mimo_rank * self.state_dim)
        self.step_size = self.dense(heads)
        self.rate = self.dense(heads)
        self.mix_gate = self.dense(heads)
        self.angle = self.dense(self._planes())
        self.dt_bias = self.param("dt_bias", dt_bias_init, (heads,))
        shape = (heads, self.mimo_rank * self.state_dim)
        self.key_bias = self.param("key_bias", nn.initializers.ones, shape, self.param_dtype)
        self.query_bias = self.param("query_bias", nn.initializers.ones, shape, self.param_dtype)
        self.key_norm = RMSNorm(param_dtype=self.param_dtype)
        self.query_norm = RMSNorm(param_dtype=self.param_dtype)
        self.skip = self.param("D", nn.initializers.ones, (heads,), jnp.float32)
        self.output = self.dense(self.features)

        def gain(name, start):
            shape = (heads, self.mimo_rank, head_dim)
            if self.mimo_rank == 1:
                return jnp.ones(shape, self.param_dtype)
            return self.param(name, nn.initializers.constant(start), shape, self.param_dtype)

        self.value_scale = gain("value_scale", 1 / self.mimo_rank)
        self.gate_scale = gain("gate_scale", 1.0)
        self.out_scale = gain("out_scale", 1 / self.mimo_rank)

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
        return heads * (self.mimo_rank * self.state_dim + head_dim)

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
            """[batch, time, heads, rank, state_dim]."""
            vector = norm(split_heads(vector, self.groups * self.mimo_rank))
            vector = vector.reshape(*x.shape[:2], self.groups, self.mimo_rank, self.state_dim)
            vector = jnp.repeat(vector, heads // self.groups, axis=2)
            return vector + bias.reshape(vector.shape[2:]).astype(vector.dtype)

        key = by_head(self.key(x), self.key_norm, self.key_bias)
        query = by_head(self.query(x), self.query_norm, self.query_bias)
        now = nn.sigmoid(widen(self.mix_gate(x)))
        return query, key, split_heads(self.value(x), heads), log_decay, dt, now, angle

    def mix(self, inputs, state, segment_ids):
        query, key, value, log_decay, dt, now, angle = inputs
        batch, time, heads, rank, size = key.shape
        state = enter(state, self.init_state(batch), segment_ids)
        options = self.operation_options(segment_ids)
        turns, turn = turned(angle.reshape(batch, time, -1), state.turn, **options)
        turns = turns.reshape(batch, time, heads, 1, -1)
        query, key = rotate_pairs(query, turns), rotate_pairs(key, turns)
        flat = (batch, time, -1)
        both = jnp.concatenate([key.reshape(flat), value.reshape(flat)], axis=-1)
        before, conv = causal_conv(
            both,
            jnp.zeros((2, both.shape[-1]), both.dtype).at[0].set(1),
            initial_state=state.conv.astype(both.dtype),
            segment_ids=segment_ids,
            implementation=self.plain_implementation(),
        )
        key_before, value_before = jnp.split(before, [heads * rank * size], axis=-1)
        options |= {"scale": 1.0, "segment_ids": repeat_ids(segment_ids, rank)}
        decay = at_step(log_decay, 0, rank)

        def steps(x):
            """[batch, time, heads, rank, ...] with the ranks one after another in time."""
            return jnp.moveaxis(x, 3, 2).reshape(batch, time * rank, heads, -1)

        def remember(key, value, strength, start):
            strong = of_ranks(value, self.value_scale) * strength[..., None, None]
            value = strong.astype(value.dtype)
            out, memory = linear_attention(
                *map(steps, (query, key, value)), decay, initial_state=start, **options
            )
            out = jnp.moveaxis(out.reshape(batch, time, rank, heads, -1), 2, 3)
            if rank > 1:
                out = out + later_writes(query, key, value).astype(out.dtype)
            return out, memory

        out, memory = remember(key, value, dt * now, state.memory)
        earlier, more = remember(
            key_before.reshape(key.shape),
            value_before.reshape(value.shape),
            (1 - now) * dt * jnp.exp(log_decay),
            None,
        )
        skipped = self.skip[:, None, None] * of_ranks(value, self.value_scale)
        out = out + earlier + skipped.astype(out.dtype)
        return out, self.leave_with(state, segment_ids, memory=memory + more, conv=conv, turn=turn)

    def finish(self, x: jax.Array, out: jax.Array) -> jax.Array:
        gate = of_ranks(split_heads(self.gate(x), out.shape[2]), self.gate_scale)
        out = jnp.sum(out * nn.silu(gate) * self.out_scale.astype(out.dtype), axis=3)
        return self.output(merge_heads(out))


class Mamba3MIMO(Mamba3):
    """`Mamba3` with four writes and reads a step, the rank of the paper's MIMO models."""

    mimo_rank: int = 4


def of_ranks(x: jax.Array, gain: jax.Array) -> jax.Array:
    """x [batch, time, heads, head_dim] times gain [heads, rank, head_dim], one for each rank."""
    return x[..., None, :] * gain.astype(x.dtype)


def later_writes(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """What each rank reads of its own step's writes by later ranks, [..., rank, head_dim].

    query and key [..., rank, state_dim], value [..., rank, head_dim].
    """
    scores = jnp.einsum("...sn,...rn->...sr", widen(query), widen(key))
    later = jnp.triu(jnp.ones(scores.shape[-2:], bool), 1)
    return jnp.einsum("...sr,...rp->...sp", jnp.where(later, scores, 0), widen(value))


def rotate_pairs(x: jax.Array, turns: jax.Array) -> jax.Array:
    """Turns the pairs (x_0, x_1), (x_2, x_3), ... of the last axis by complex `turns` [..., n]."""
    planes = turns.shape[-1]
    head, rest = x[..., : 2 * planes], x[..., 2 * planes :]
    wide = widen(head).reshape(*head.shape[:-1], planes, 2)
    first, second, cos, sin = wide[..., 0], wide[..., 1], turns.real, turns.imag
    pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([pairs.reshape(head.shape).astype(x.dtype), rest], axis=-1)
