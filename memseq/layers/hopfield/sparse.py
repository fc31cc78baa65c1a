"""Sparse Hopfield layers, and the block for several time series that is made of them."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from memseq.layers.hopfield.blocks import Channel, HopfieldBlock
from memseq.layers.hopfield.hopfield import Hopfield
from memseq.layers.hopfield.learned_patterns import HopfieldPooling
from memseq.pallas_kernels.common.checks import check_array, check_count


class SparseHopfield(Hopfield):
    """`Hopfield` with sparsemax: most weights are exactly 0 (Hu et al. 2023, arXiv:2309.12673)."""

    separation: str = "sparsemax"

    PAPER: ClassVar[str] = "Hu et al. 2023, arXiv:2309.12673"


class GeneralizedSparseHopfield(Hopfield):
    """`Hopfield` with entmax whose alpha in (1, 2) is learned: the GSH layer of STanHop-Net.

    Wu et al. 2023, arXiv:2312.17346, section 3; alpha starts from 1.5.
    """

    separation: str = "entmax"
    learned_alpha: bool = True

    PAPER: ClassVar[str] = "Wu et al. 2023, arXiv:2312.17346"


class STanHopBlock(HopfieldBlock):
    """Sparse association along time, then across series through a few pooled patterns.

    Wu et al. 2023, arXiv:2312.17346, section 4 (the two-stage layer of STanHop-Net), with the norms
    before. `layer(x, mask)` of x [batch, series, time, features] gives y of the same shape:

        x <- x + GSH(x) of each series over time
        p  = GSHPooling(x) of each time over series, `patterns` of them
        x <- x + GSH(x, stored = p), each followed by a pointwise network

    Attributes: those of `HopfieldBlock`, and
        patterns: pooled patterns between series (the paper's factor).
    """

    patterns: int = 10

    PAPER: ClassVar[str] = GeneralizedSparseHopfield.PAPER
    MEMORY: ClassVar[str] = "the series themselves"

    def setup(self):
        check_count("patterns", self.patterns, 1)
        options = {"separation": "entmax", "learned_alpha": True}
        options = {k: v for k, v in options.items() if k not in dict(self.options)}
        self.time = self.hopfield(**options)
        self.pool = self.hopfield(HopfieldPooling, patterns=self.patterns, **options)
        self.series = self.hopfield(**options)
        channel = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.time_channel = Channel(self.features, **channel)
        self.series_channel = Channel(self.features, **channel)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """y as x [batch, series, time, features]; mask bool [batch, series, time], True is data."""
        check_array("x", x, (None,) * 3 + (self.features,), "[batch, series, time, features]")
        batch, series, time, features = x.shape
        if mask is None:
            mask = jnp.ones((batch, series, time), bool)
        elif mask.shape != (batch, series, time) or mask.dtype != jnp.bool_:
            raise ValueError(
                f"mask: expected bool [batch, series, time] = [{batch}, {series}, {time}], got "
                f"{mask.dtype} {list(mask.shape)}"
            )
        x = jnp.where(mask[..., None], x, 0)
        rows = x.reshape(batch * series, time, features)
        y = self.time(rows, mask.reshape(batch * series, time))
        rows = self.time_channel(rows.astype(y.dtype) + y)
        across = jnp.swapaxes(rows.reshape(batch, series, time, features), 1, 2)
        across = across.reshape(batch * time, series, features)
        seen = jnp.swapaxes(mask, 1, 2).reshape(batch * time, series)
        across = jnp.where(seen[..., None], across, 0)
        pooled = self.pool(across, seen)
        across = self.series_channel(across + self.series(across, stored=pooled))
        y = jnp.swapaxes(across.reshape(batch, time, series, features), 1, 2)
        return jnp.where(mask[..., None], y, 0)
