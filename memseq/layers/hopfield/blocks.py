"""Residual blocks around Hopfield layers."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.parts import hidden
from memseq.layers.hopfield.hopfield import Hopfield, HopfieldState


class Channel(nn.Module):
    """x + down(gelu(up(norm x))), pointwise."""

    features: int
    expansion: int = 4
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        hidden = nn.LayerNorm(name="norm", **options)(x)
        hidden = nn.gelu(nn.Dense(self.expansion * self.features, name="up", **options)(hidden))
        return x + nn.Dense(self.features, name="down", **options)(hidden)


class HopfieldBlock(nn.Module):
    """What the blocks share: their fields, and Hopfield layers made with them.

    Attributes:
        features, heads, implementation, chunk_size, dtype, param_dtype: as in every layer.
        options: further fields of the Hopfield layers, as (name, value) pairs.
    """

    features: int
    heads: int = 4
    implementation: str = "auto"
    chunk_size: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    options: tuple[tuple[str, Any], ...] = ()

    OPERATION: ClassVar[str] = "hopfield_retrieve"

    @nn.nowrap
    def hopfield(self, layer: type[Hopfield] = Hopfield, **options) -> Hopfield:
        """A Hopfield layer with the block's fields."""
        shared = {
            name: getattr(self, name)
            for name in ("heads", "implementation", "chunk_size", "dtype", "param_dtype")
        }
        return layer(self.features, **shared, **dict(self.options), **options)


class HopfieldEncoderBlock(HopfieldBlock):
    """Association of a set with itself, then a pointwise network, each with a residual.

    Ramsauer et al. 2020, arXiv:2008.02217, section 3, in a transformer's encoder layer, with the
    norms before. Masked members give 0.

    Attributes: those of `HopfieldBlock`, and
        expansion: width of the pointwise network in features.
    """

    expansion: int = 4

    PAPER: ClassVar[str] = Hopfield.PAPER
    MEMORY: ClassVar[str] = "the set itself, 2 x [members, heads, head_dim]"

    def setup(self):
        self.association = self.hopfield()
        self.channel = Channel(self.features, self.expansion, self.dtype, self.param_dtype)

    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, deterministic: bool = True
    ) -> jax.Array:
        """y [batch, n, features] of x [batch, n, features], mask bool [batch, n]."""
        y = self.channel(associate(self, x, mask, deterministic))
        return hidden(y, mask)


class HopfieldDecoderBlock(HopfieldBlock):
    """Association of a set with itself, then with a memory, then a pointwise network.

    As `HopfieldEncoderBlock`, for a transformer's decoder layer (without causal masks: members of
    the set see each other). The memory is projected once and can be read again.

        y, state = layer(x, memory)
        z, state = layer(other, None, state)

    Attributes: those of `HopfieldEncoderBlock`.
    """

    expansion: int = 4

    PAPER: ClassVar[str] = Hopfield.PAPER
    MEMORY: ClassVar[str] = "stored patterns 2 x [patterns, heads, head_dim]"

    def setup(self):
        self.association = self.hopfield()
        self.recall = self.hopfield()
        self.channel = Channel(self.features, self.expansion, self.dtype, self.param_dtype)

    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | None = None,
        state: HopfieldState | None = None,
        *,
        mask: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, HopfieldState]:
        """Reads `memory`, or what an earlier call stored.

        Args:
            x: [batch, n, features].
            memory: [batch, patterns, features]; None reads `state`.
            state: of an earlier call; given with `memory` it is replaced.
            mask, memory_mask: bool [batch, n] and [batch, patterns], True takes part.

        Returns:
            y [batch, n, features], and what is stored.
        """
        if memory is None and state is None:
            raise ValueError("memory: expected patterns or a state to read from, got neither")
        x = associate(self, x, mask, deterministic)
        if memory is not None:
            state = self.recall.store(memory, None, memory_mask)
        y = self.channel(x + self.recall.read(x, state, deterministic))
        return hidden(y, mask), state


def associate(block, x, mask, deterministic):
    """x + association(x), with masked members 0, in the block's dtype."""
    y = block.association(x, mask, deterministic=deterministic)
    x = hidden(x, mask)
    return x.astype(y.dtype) + y
