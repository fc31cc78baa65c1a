"""Hopfield layers with learned patterns: states that pool a set, and a table that is looked up."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.parts import hidden
from memseq.layers.hopfield.hopfield import Hopfield
from memseq.pallas_kernels.common.checks import check_count


class HopfieldPooling(Hopfield):
    """A set in a few vectors: learned state patterns retrieve from it (the same paper, section 3).

    `layer(x, mask)` of x [batch, n, features] gives y [batch, patterns, features]; an empty set 0.

    Attributes (beside Hopfield's):
        patterns: number of learned state patterns.
    """

    patterns: int = 1

    MEMORY: ClassVar[str] = "the set itself, 2 x [members, heads, head_dim]"

    def setup(self):
        check_count("patterns", self.patterns, 1)
        super().setup()
        self.states = _patterns(self, "state_patterns", self.patterns)

    def __call__(self, x, mask=None, *, values=None, deterministic: bool = True):
        """y [batch, patterns, features] of x [batch, n, features], mask bool [batch, n]."""
        self._check(x)
        return self.read(self._states(x), self.store(x, values, mask), deterministic)

    def pooling_associations(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Weights [batch, heads, patterns, n] of the set's members."""
        return self.associations(self._states(x), x, mask)

    def _states(self, x):
        states = self.states.astype(x.dtype if self.dtype is None else self.dtype)
        return jnp.broadcast_to(states, (x.shape[0], *self.states.shape))


class HopfieldLookup(Hopfield):
    """A learned table of stored patterns that every member of a set looks up (section 3).

    `layer(x, mask)` of x [batch, n, features] gives y of the same shape; members are alone.

    Attributes (beside Hopfield's):
        patterns: number of learned stored patterns.
        separate_values: what is read is learned apart from what is compared.
    """

    patterns: int = 64
    separate_values: bool = False

    MEMORY: ClassVar[str] = "learned patterns [patterns, features]"

    def setup(self):
        check_count("patterns", self.patterns, 1)
        super().setup()
        self.table = _patterns(self, "stored_patterns", self.patterns)
        if self.separate_values:
            self.table_values = _patterns(self, "value_patterns", self.patterns)

    def __call__(self, x, mask=None, *, deterministic: bool = True):
        """y [batch, n, features] of x [batch, n, features], mask bool [batch, n]."""
        self._check(x)
        x = hidden(x, mask)
        dtype = x.dtype if self.dtype is None else self.dtype
        values = self.table_values[None].astype(dtype) if self.separate_values else None
        y = self.read(x, self.store(self.table[None].astype(dtype), values), deterministic)
        return hidden(y, mask)


def _patterns(layer, name, count):
    shape = (count, layer.features)
    return layer.param(name, nn.initializers.normal(1.0), shape, layer.param_dtype)
