"""Hydra: Mamba-2 in both directions at once, as one quasiseparable matrix."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.parts import (
    MambaGate,
    RMSNorm,
    ShortConv,
    conv_tail,
    hidden,
    merge_heads,
    split_heads,
)
from memseq.layers.state_space.mamba2 import inner_and_heads
from memseq.pallas_kernels import linear_attention
from memseq.pallas_kernels.common.checks import check_array, check_choice, check_count
from memseq.pallas_kernels.common.dispatch import IMPLEMENTATIONS


class Hydra(nn.Module):
    """A sequence in both directions by one matrix: y = layer(x, mask), for members with an order.

        y_t = f_{t-1} + g_{t+1} + d_t u_t,  out = W (norm(y) * silu(Z x)),
        f_t = F_t^T C_t with F_t = a_t F_{t-1} + dt_t B_t u_t^T, and g_t likewise from the end on
        with a dt, B and C of its own,  d_t = V u_t + D one number a head,
        (u, B, C, B', C') = silu(conv(...)) with a convolution whose middle is its own step

    Hwang et al. 2024, "Hydra: bidirectional state space models through generalized matrix mixers",
    arXiv:2407.09941, section 3, and the authors' code. The matrix from u to y has products of
    `a` below and above its diagonal, where neither pass reaches, and d on it: quasiseparable. Both
    passes are one call of linear attention; decay rates (starting at 1) and the bias of dt are
    shared.

    Attributes:
        features: size of the last axis of x and y.
        heads: None is one head per 64 inner channels, or 4 where they are not a multiple of 64.
        expand: inner channels per feature.
        state_dim: size of B and C.
        groups: pairs of B and C a direction; each serves heads / groups heads.
        conv_width: odd.
        implementation, chunk_size: of linear attention.
        dtype: of activations; None follows input and parameters.
        param_dtype: of parameters.
    """

    features: int
    heads: int | None = None
    expand: int = 2
    state_dim: int = 64
    groups: int = 1
    conv_width: int = 7
    implementation: str = "auto"
    chunk_size: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    PAPER: ClassVar[str] = "Hwang et al. 2024, arXiv:2407.09941"
    MEMORY: ClassVar[str] = "matrices [2, heads, state_dim, head_dim], one a direction"
    OPERATION: ClassVar[str] = "linear_attention"
    ORDERED: ClassVar[bool] = True  # the order of the members means something

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """x [batch, n, features]; mask bool [batch, n], True takes part. y as x, 0 where not.

        Steps that take no part are left out: neighbours are those that do.
        """
        check_array("x", x, (None, None, self.features), "[batch, n, features]")
        if mask is None:
            return self._mix(x, jnp.ones(x.shape[:2], bool))
        x = hidden(x, mask)
        mask = jnp.broadcast_to(mask, x.shape[:2])
        order = jnp.argsort(~mask, axis=1, stable=True)  # those that take part to the front
        place = jnp.argsort(order, axis=1)
        together = jnp.take_along_axis(x, order[..., None], axis=1)
        y = self._mix(together, jnp.take_along_axis(mask, order, axis=1))
        return hidden(jnp.take_along_axis(y, place[..., None], axis=1), mask)

    def _mix(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """y as x, whose rows are 0 from where `valid` ends on."""
        inner, heads = self._dims()
        batch, wide = x.shape[0], 4 * self.groups * self.state_dim

        def dense(size, name):
            return nn.Dense(
                size, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, name=name
            )

        mixed = self._convolve(dense(inner + wide, "input")(x))
        u, parts = split_heads(mixed[..., :inner], heads), split_heads(mixed[..., inner:], 4)
        dt, log_decay = MambaGate(heads, a_min=1.0, a_max=1.0, name="decay_gate")(
            split_heads(dense(2 * heads, "step_size")(x), 2)
        )

        def both_ways(forward, backward):
            return jnp.concatenate([forward, backward[:, ::-1]])

        key, query = (
            split_heads(both_ways(parts[:, :, i], parts[:, :, i + 2]), self.groups) for i in (0, 1)
        )
        dt, log_decay = (both_ways(a[:, :, 0], a[:, :, 1]) for a in (dt, log_decay))
        out, _ = linear_attention(
            query,
            key,
            (both_ways(u, u) * dt[..., None]).astype(u.dtype),
            log_decay,
            scale=1.0,
            segment_ids=jnp.where(both_ways(valid, valid), 0, -1),
            implementation=self.implementation,
            chunk_size=self.chunk_size,
        )
        # each pass gives to the step after
        out = jnp.pad(out, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
        own = self.param("D", nn.initializers.ones, (heads,), self.param_dtype)
        own = (dense(heads, "skip")(merge_heads(u)) + own)[..., None] * u
        out = out[:batch] + out[batch:, ::-1] + own.astype(out.dtype)
        out = RMSNorm(param_dtype=self.param_dtype, name="norm")(merge_heads(out))
        return dense(self.features, "output")(out * nn.silu(dense(inner, "gate")(x)))

    def _convolve(self, x: jax.Array) -> jax.Array:
        """silu of a convolution over as many steps before as after; x [batch, n, channels]."""
        half, channels = self.conv_width // 2, x.shape[-1]
        plain = self.implementation in ("reference", "chunked")
        conv = ShortConv(
            self.conv_width,
            channels,
            use_bias=True,
            implementation=self.implementation if plain else "auto",
            param_dtype=self.param_dtype,
            name="conv",
        )
        tail = conv_tail(x.shape[0], self.conv_width, channels, x.dtype)
        return conv(jnp.pad(x, ((0, 0), (0, half), (0, 0))), tail, None)[0][:, half:]

    @nn.nowrap
    def _dims(self) -> tuple[int, int]:
        """(inner channels, heads)."""
        check_count("conv_width", self.conv_width, 1)
        check_choice("implementation", self.implementation, IMPLEMENTATIONS)
        if self.conv_width % 2 == 0:
            raise ValueError(f"conv_width: expected an odd number, got {self.conv_width}")
        return inner_and_heads(self)
