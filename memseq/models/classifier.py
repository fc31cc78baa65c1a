"""A classifier of whole sequences."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import freeze

from memseq.layers.common.parts import RMSNorm
from memseq.models.blocks import Stack, as_pattern
from memseq.pallas_kernels.common.checks import check_choice


class SequenceClassifier(nn.Module):
    """A stack of blocks over a sequence, pooled to one vector, to class logits.

    Attributes:
        classes: number of classes.
        vocab_size: number of tokens, for integer inputs; None for inputs of real numbers.
        pool: "mean" over valid positions, or "last" valid position.
        features, pattern, ...: as of `LanguageModel`.
    """

    classes: int
    features: int
    pattern: tuple[str, ...]
    vocab_size: int | None = None
    pool: str = "mean"
    repeats: int = 1
    mixers: Mapping[str, Mapping[str, Any]] = nn.FrozenDict()
    channel: str | None = "swiglu"
    hidden_ratio: float = 4.0
    remat: str = "none"
    implementation: str = "auto"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        self.mixers = freeze(self.mixers)  # hashable, so that a model can be static under jit
        self.pattern = as_pattern(self.pattern)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Logits float32 [batch, classes].

        Args:
            inputs: tokens int32 [batch, time], or floating [batch, time, channels].
            segment_ids: int32 [batch, time]; negative is padding, which changes nothing. One
                sequence a row: other ids must all be equal.

        Raises:
            ValueError: for inputs of another shape or dtype, an unknown `pool`, and names and
                options of layers that do not exist.
        """
        check_choice("pool", self.pool, ("mean", "last"))
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            if self.vocab_size is None or inputs.ndim != 2:
                raise ValueError(
                    "inputs: integer inputs need vocab_size and the shape [batch, time], got "
                    f"vocab_size {self.vocab_size} and shape {list(inputs.shape)}"
                )
            x = nn.Embed(self.vocab_size, self.features, name="embed", **common)(inputs)
        elif inputs.ndim == 3:
            x = nn.Dense(self.features, name="input", **common)(inputs)
        else:
            raise ValueError(
                f"inputs: expected [batch, time, channels], got shape {list(inputs.shape)}"
            )
        x, _ = Stack(
            features=self.features,
            pattern=self.pattern,
            repeats=self.repeats,
            mixers=self.mixers,
            channel=self.channel,
            hidden_ratio=self.hidden_ratio,
            remat=self.remat,
            implementation=self.implementation,
            name="stack",
            **common,
        )(x, None, segment_ids)
        x = RMSNorm(param_dtype=self.param_dtype, name="norm")(x)
        valid = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids >= 0
        if self.pool == "mean":
            total = jnp.sum(jnp.where(valid[..., None], x, 0), axis=1)
            pooled = total / jnp.maximum(valid.sum(1, keepdims=True), 1)
        else:
            last = x.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
            pooled = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        logits = nn.Dense(self.classes, name="head", **common)(pooled)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
