"""Norms, short convolution and gates."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.pallas_kernels import causal_conv
from memseq.pallas_kernels.common import context
from memseq.pallas_kernels.common.segments import Segments, segment_positions, segments


def widen(x: jax.Array) -> jax.Array:
    """x in float32 at least, as gates and sums are computed."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def l2_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(sum x^2 + eps) over the last axis, computed in float32 at least."""
    wide = widen(x)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + eps)).astype(x.dtype)


def uniform_within(bound: float) -> Callable[..., jax.Array]:
    """An initialiser: uniform in +- bound."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def mean_with(other: nn.Module) -> Callable[..., jax.Array]:
    """An initialiser: the mean of a Dense layer's usual draw and the kernel of `other`.

    `other` is a Dense of the same shape that must have been called before. So two projections of
    one input start alike: what is like finds itself.
    """

    def init(key, shape, dtype):
        drawn = nn.initializers.lecun_normal()(key, shape, dtype)
        return (drawn + other.variables["params"]["kernel"]) / 2

    return init


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis.

    Zhang and Sennrich 2019, arXiv:1910.07467, equation 4. Computed in float32 at least;
    output in the dtype of x.
    """

    eps: float = 1e-5
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = widen(x)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean + self.eps) * scale).astype(x.dtype)


class ShortConv(nn.Module):
    """Causal depthwise convolution of `width` steps over [batch, time, channels].

    width 0 is no convolution: the input, activated. residual: the input is added to the sum.
    Kernel and bias start uniform in +- width ** -0.5, as a convolution of fan-in `width`.
    """

    width: int
    channels: int
    use_bias: bool = False
    residual: bool = False
    activation: str | None = "silu"
    implementation: str = "auto"
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, tail, segment_ids):
        if self.width == 0:
            return x if self.activation is None else nn.silu(x), tail
        uniform = uniform_within(self.width**-0.5)
        kernel = self.param("kernel", uniform, (self.width, self.channels), self.param_dtype)
        if self.residual:
            kernel = widen(kernel).at[-1].add(1)
        bias = None
        if self.use_bias:
            bias = self.param("bias", uniform, (self.channels,), self.param_dtype)
        return causal_conv(
            x,
            kernel,
            bias,
            activation=self.activation,
            initial_state=tail.astype(x.dtype),
            segment_ids=segment_ids,
            implementation=self.implementation,
        )


def conv_tail(batch: int, width: int, channels: int, dtype: Any) -> jax.Array:
    """An empty tail of a `ShortConv`: [batch, width - 1, channels]."""
    if width < 0:
        raise ValueError(f"conv_width: expected 0 (none) or a positive width, got {width}")
    return jnp.zeros((batch, max(width - 1, 0), channels), dtype)


def softplus_inverse(x: jax.Array) -> jax.Array:
    """The y of softplus(y) = x, for x > 0."""
    return x + jnp.log(-jnp.expm1(-x))


def dt_bias_init(
    key: jax.Array, shape: tuple[int, ...], low: float = 1e-3, high: float = 1e-1
) -> jax.Array:
    """Where softplus gives step sizes that are log-uniform in [low, high], and at least 1e-4."""
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, jnp.log(low), jnp.log(high)))
    return softplus_inverse(jnp.maximum(dt, 1e-4))


class MambaGate(nn.Module):
    """Step size and log decay per head: dt = softplus(x + dt_bias), log decay = -exp(A_log) dt.

    Mamba-2 (Dao and Gu 2024, arXiv:2405.21060). exp(A_log) starts uniform in [a_min, a_max], dt
    log-uniform in `dt_range`. float32 whatever the input.
    """

    heads: int
    a_min: float = 0.0
    a_max: float = 16.0
    dt_range: tuple[float, float] = (1e-3, 1e-1)

    @nn.compact
    def __call__(
        self, x: jax.Array, dt_limit: tuple[float, float] = (0.0, float("inf"))
    ) -> tuple[jax.Array, jax.Array]:
        def a_log_init(key, shape):
            a = jax.random.uniform(key, shape, jnp.float32, self.a_min, self.a_max)
            return jnp.log(jnp.maximum(a, 1e-4))

        a_log = self.param("A_log", a_log_init, (self.heads,))
        dt_bias = self.param("dt_bias", dt_bias_init, (self.heads,), *self.dt_range)
        dt = jax.nn.softplus(widen(x) + dt_bias)
        dt = jnp.clip(dt, *dt_limit)
        return dt, -jnp.exp(a_log) * dt


def take_step(x: jax.Array, position: jax.Array) -> jax.Array:
    """The step `position` int32 [batch] of each row of x [batch, time, ...]: [batch, 1, ...]."""
    return jnp.take_along_axis(x, position.reshape(-1, *[1] * (x.ndim - 1)), axis=1)


def count_positions(
    carried: jax.Array, time: int, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Positions within segments: (of this call int32 [batch, time], so far int32 [batch]).

    carried: int32 [batch], the positions that this call's first segment has had. Padding is none.
    """
    if context.axis() is None or segment_ids is None:
        return _counted(carried, time, segment_ids)
    ids = context.all_time(segment_ids)
    with context.over(None):
        position, reached = _counted(carried, ids.shape[1], ids)
    return context.own_stretch(position, time), context.at_the_end(reached)


def _counted(carried, time, segment_ids):
    shape = carried.shape[0], time
    segs = Segments(jnp.ones(shape, bool), jnp.zeros(shape, jnp.int32))
    if segment_ids is not None:
        segs = segments(segment_ids)
    position = segment_positions(segs) + jnp.where(segs.index == 0, carried[:, None], 0)
    current = segs.valid & (segs.index == segs.index[:, -1:])
    reached = jnp.max(jnp.where(current, position + 1, 0), axis=1, initial=0)
    return position, jnp.where(segs.valid.any(axis=1), reached, carried)


def rotate(x: jax.Array, position: jax.Array, base: float) -> jax.Array:
    """Rotary positions: turns each pair (x_i, x_{i + dim/2}) by position * base ** (-2i / dim).

    x [batch, time, heads, dim], position int32 [batch, time]; angles in float32 at least.
    """
    half = x.shape[-1] // 2
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    frequency = base ** (-jnp.arange(half, dtype=dtype) / half)
    angle = position[..., None, None].astype(dtype) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[batch, time, heads * dim] -> [batch, time, heads, dim]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def merge_heads(x: jax.Array) -> jax.Array:
    """[batch, time, heads, dim] -> [batch, time, heads * dim]."""
    return x.reshape(*x.shape[:-2], -1)


def hidden(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x [batch, n, ...] with 0 where mask is False: bool [batch, n], or 1 for either; None hides
    nothing.
    """
    if mask is None:
        return x
    if (
        getattr(mask, "ndim", 0) != 2
        or mask.dtype != jnp.bool_
        or any(got not in (1, want) for got, want in zip(mask.shape, x.shape, strict=False))
    ):
        came = f"{getattr(mask, 'dtype', '')} {list(getattr(mask, 'shape', []))}"
        raise ValueError(f"mask: expected bool [batch, n] = {list(x.shape[:2])}, got {came}")
    return jnp.where(mask[..., None], x, 0)
