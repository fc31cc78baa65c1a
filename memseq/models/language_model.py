"""A language model over any pattern of sequence layers."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import freeze

from memseq.layers.common.parts import RMSNorm, take_step
from memseq.models.blocks import Stack, as_pattern


class LanguageModel(nn.Module):
    """Embedding, a stack of blocks, norm, logits.

        logits, state = model.apply(params, tokens)
        logits, state = model.apply(params, more, state)      # goes on where it stopped

    Attributes:
        vocab_size: number of tokens.
        features: width of the residual stream.
        pattern: names of mixers in `memseq.layers.REGISTRY`, one a block; above a layer that shares
            what it holds, also in `memseq.layers.SHARED_LAYERS`.
        repeats: how often the pattern is repeated; repeats are scanned.
        mixers: constructor options by mixer name.
        channel: channel layer of every block, None for none.
        hidden_ratio: the channel layer's size, see `SwiGLU`.
        tie_embeddings: the logits' matrix is the embedding.
        remat: "none" keeps activations for the backward pass, "full" keeps the blocks' inputs only,
            "dots" also the results of matrix products with weights.
        implementation: form of every memory operation.
        dtype: of activations; None is float32. param_dtype: of parameters.
    """

    vocab_size: int
    features: int
    pattern: tuple[str, ...]
    repeats: int = 1
    mixers: Mapping[str, Mapping[str, Any]] = nn.FrozenDict()
    channel: str | None = "swiglu"
    hidden_ratio: float = 4.0
    tie_embeddings: bool = False
    remat: str = "none"
    implementation: str = "auto"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        self.mixers = freeze(self.mixers)  # hashable, so that a model can be static under jit
        self.pattern = as_pattern(self.pattern)
        super().__post_init__()

    def setup(self):
        self.embed = nn.Embed(
            self.vocab_size, self.features, dtype=self.dtype, param_dtype=self.param_dtype
        )
        self.stack = self._stack()
        self.norm = RMSNorm(param_dtype=self.param_dtype)
        if not self.tie_embeddings:
            self.head = nn.Dense(
                self.vocab_size, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
            )

    @nn.nowrap
    def _stack(self, **options) -> Stack:
        return Stack(
            features=self.features,
            pattern=self.pattern,
            repeats=self.repeats,
            mixers=self.mixers,
            channel=self.channel,
            hidden_ratio=self.hidden_ratio,
            remat=self.remat,
            implementation=self.implementation,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            **options,
        )

    def __call__(self, tokens, state=None, segment_ids=None):
        """tokens int32 [batch, time] to logits float32 [batch, time, vocab_size] and the state.

        `state` and `segment_ids` as in `SequenceLayer`.

        Raises:
            ValueError: for tokens that are not integers [batch, time], and for names and options of
                layers that do not exist.
        """
        hidden, state = self.hidden(tokens, state, segment_ids)
        return self.logits(hidden), state

    def hidden(self, tokens, state=None, segment_ids=None, last=None):
        """tokens int32 [batch, time] to activations [batch, time, features], and the state.

        last: int32 [batch], the last valid position of each row: gives the activations there alone,
            [batch, 1, features]. Layers at the top that only read what a layer below them shares
            then run at that step alone: a prompt need not pass through a cross-decoder (Sun et al.
            2024, arXiv:2405.05254, section 2.3).

        Raises:
            ValueError: as calling the model does.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens: expected integers [batch, time], got {tokens.dtype} {list(tokens.shape)}"
            )
        x, state = self.stack(self.embed(tokens), state, segment_ids, last)
        x = x if last is None else take_step(x, last)
        return self.norm(x), state

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Activations [..., features] to logits float32 [..., vocab_size]."""
        logits = self.embed.attend(hidden) if self.tie_embeddings else self.head(hidden)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> tuple:
        """An empty state; `context`: positions to hold, for mixers that store them one by one."""
        return self._stack(parent=None).init_state(batch, context)

    @nn.nowrap
    def state_bytes(self, batch: int = 1, context: int | None = None) -> int:
        """Bytes of `init_state(batch, context)`, counted from its arrays."""
        shapes = jax.eval_shape(lambda: self.init_state(batch, context))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
