"""H3: two state spaces with products between them."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.parts import merge_heads, split_heads
from memseq.layers.state_space.invariant import Diagonal
from memseq.layers.state_space.s4d import S4D, S4DState


@state_dataclass
class H3State(S4DState):
    """State of `H3`; `memory` is [batch, heads * head_dim^2, state_dim]."""


class H3(S4D):
    """Hungry hungry hippos: shifted keys times values, remembered and read by queries.

        S_t = s4d(shift(k)_t v_t^T),  out_t = W (S_t^T q_t),  q, k, v projections of x_t

    Fu et al. 2023, "Hungry hungry hippos", arXiv:2212.14052, section 3. shift is a state space
    whose transition is a shift: a short convolution with learned taps. Each head has a diagonal
    state space (`S4D`, with its D x), which all entries of its head_dim x head_dim products share.

    Attributes (beside those of `S4D`; there is no gated linear unit):
        heads: None is one for every feature.
        conv_width: steps that the shift remembers.
    """

    heads: int | None = None
    conv_width: int = 4

    PAPER: ClassVar[str] = "Fu et al. 2023, arXiv:2212.14052"
    MEMORY: ClassVar[str] = "vectors [heads, head_dim, head_dim, state_dim]"
    STATE: ClassVar[type] = H3State

    def setup(self):
        heads, _ = self._dims()
        self.query, self.key, self.value = (self.dense(self.features) for _ in range(3))
        self.conv = self.make_conv(activation=None)
        self.setup_modes()
        self.skip = self.param("D", nn.initializers.normal(1.0), (heads,), self.param_dtype)
        self.output = self.dense(self.features)

    @nn.nowrap
    def _dims(self) -> tuple[int, int]:
        """(heads, features per head)."""
        heads = self.features if self.heads is None else self.heads
        if heads < 1 or self.features % heads:
            raise ValueError(f"heads: expected a divisor of {self.features}, got {self.heads}")
        return heads, self.features // heads

    @nn.nowrap
    def modes_shape(self):
        return self._dims()[0], super().memory_shape()[1]

    @nn.nowrap
    def memory_shape(self):
        heads, size = self._dims()
        return heads * size**2, super().memory_shape()[1]

    @nn.nowrap
    def conv_channels(self):
        return self.features

    def system(self):
        shared = self._dims()[1] ** 2
        system, write, read = super().system()
        modes = (None if a is None else jnp.repeat(a, shared, axis=0) for a in system)
        return Diagonal(*modes), jnp.repeat(write, shared, 0), jnp.repeat(read, shared, 0)

    def project(self, x):
        return self.query(x), self.key(x), self.value(x)

    def mix(self, inputs, state, segment_ids):
        query, key, value = inputs
        heads, size = self._dims()
        state = enter(state, self.init_state(query.shape[0]), segment_ids)
        key, conv = self.conv(key, state.conv, segment_ids)
        query, key, value = (split_heads(x, heads) for x in (query, key, value))
        pairs = key[..., :, None] * value[..., None, :]  # [batch, time, heads, size, size]
        flat = pairs.reshape(*pairs.shape[:2], -1)
        out, memory = self.run_system(flat, state.memory, segment_ids)
        out = out.reshape(pairs.shape) + (self.skip[:, None, None] * pairs).astype(out.dtype)
        out = merge_heads(jnp.einsum("bthk,bthkv->bthv", query, out))
        return out, self.leave_with(state, segment_ids, memory=memory, conv=conv)

    def finish(self, x, out):
        return self.output(out)
