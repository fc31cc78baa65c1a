"""The real-gated linear recurrent unit, alone and in the recurrent block of Hawk and Griffin."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.parts import merge_heads, softplus_inverse, split_heads, widen
from memseq.layers.common.vector import GatedRecurrence, VectorState

RATE = 8.0  # the paper's c
LEAST_WRITE = 1e-6  # of 1 - a^2: bounds the slope of its square root


class BlockDense(nn.Module):
    """A dense map of each of `blocks` equal parts of the last axis on itself, with bias."""

    blocks: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = x.shape[-1] // self.blocks
        init = nn.initializers.lecun_normal(batch_axis=(0,))
        kernel = self.param("kernel", init, (self.blocks, size, size), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        parts = jnp.einsum("...hi,hij->...hj", split_heads(x, self.blocks), kernel)
        return merge_heads(parts) + bias


@state_dataclass
class RGLRUState(VectorState):
    """State of `RGLRU`."""


class RGLRU(GatedRecurrence):
    """The real-gated linear recurrent unit: no projections, its input is what it remembers.

        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t * x_t),  out_t = h_t,
        a_t = exp(-8 r_t softplus(decay_bias)),  r_t = sigmoid(W_r x_t),  i_t = sigmoid(W_i x_t)

    De et al. 2024, "Griffin", arXiv:2402.19427, section 2.4; W_r and W_i are block-diagonal with
    `heads` blocks. As the paper says, the a of an open gate (r = 1) starts uniform in
    [0.9, 0.999]; the authors' code starts a itself there before it takes the 8th power, and
    forgets much faster. The square root is taken of at least 1e-6, which bounds its slope.
    """

    PAPER: ClassVar[str] = "De et al. 2024, arXiv:2402.19427"
    MEMORY: ClassVar[str] = "vector [inner_dim]"
    STATE: ClassVar[type] = RGLRUState
    PARTS: ClassVar[int] = 1

    def setup(self):
        if self.inner_dim not in (None, self.features):
            raise ValueError(
                f"inner_dim: expected features {self.features} or None, got {self.inner_dim}"
            )
        self.conv = self.make_conv(activation=None)
        self.setup_gates()

    def setup_gates(self) -> None:
        inner = self.memory_shape()[0]
        if self.heads < 1 or inner % self.heads:
            raise ValueError(f"heads: expected a divisor of {inner} channels, got {self.heads}")

        def decay_bias_init(key, shape):
            open_gate = jax.random.uniform(key, shape, jnp.float32, 0.9, 0.999)
            return softplus_inverse(-jnp.log(open_gate) / RATE)

        self.decay_bias = self.param("decay_bias", decay_bias_init, (inner,))
        self.decay_gate = BlockDense(self.heads, self.dtype, self.param_dtype)
        self.input_gate = BlockDense(self.heads, self.dtype, self.param_dtype)

    def gates(self, mixed):
        rate = RATE * nn.softplus(self.decay_bias)
        log_decay = -rate * nn.sigmoid(widen(self.decay_gate(mixed)))
        strength = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_decay), LEAST_WRITE))
        return strength * nn.sigmoid(widen(self.input_gate(mixed))) * mixed, log_decay

    def project(self, x):
        return x if self.dtype is None else x.astype(self.dtype)

    def finish(self, x, out):
        return out


@state_dataclass
class HawkState(VectorState):
    """State of `Hawk`."""


class Hawk(RGLRU):
    """The recurrent block of Hawk and Griffin: an RG-LRU between projections.

        out = W_o (gelu(W_g x) * rglru(conv(W_u x)))

    De et al. 2024, arXiv:2402.19427, section 2.3; with bias in the convolution and no activation
    after it. Hawk is this mixer in every block; Griffin is the pattern ("hawk", "hawk",
    "sliding_window_attention").

    Attributes (beside those of every layer, of `VectorLayer` and of `GatedRecurrence`):
        heads: blocks of the gates' block-diagonal maps.
    """

    conv_width: int = 4

    STATE: ClassVar[type] = HawkState

    def setup(self):
        self.setup_gated(conv_bias=True)
        self.gate = self.dense(self.memory_shape()[0])
        self.setup_gates()

    def project(self, x):
        return self.input(x)

    def finish(self, x, out):
        return self.output(nn.gelu(self.gate(x)) * out)
