"""Attention in a sliding window, with learned tokens that stay in view."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.attention.softmax_attention import SoftmaxAttention
from memseq.layers.common.parts import rotate, split_heads


class PersistentAttention(SoftmaxAttention):
    """`SoftmaxAttention` that also sees learned tokens, which stand before every segment.

    Titans' persistent memory: Behrouz et al. 2025, arXiv:2501.00663, equation 19. They have the
    positions before the first and are in view at every step, whatever the window.

    Attributes (beside those of `SoftmaxAttention`):
        persistent_tokens: how many.
        max_segments: the most segments of a row; in further ones they are not seen. None is any
            number, and slow.
    """

    window: int | None = 64
    persistent_tokens: int = 4
    max_segments: int | None = 8

    PAPER: ClassVar[str] = "Behrouz et al. 2025, arXiv:2501.00663"

    def setup(self):
        super().setup()
        shape = (self.persistent_tokens, self.features)
        self.tokens = self.param("initial_tokens", nn.initializers.normal(0.02), shape, jnp.float32)

    def attend(self, query, keys, values, *, key_positions, key_segments, **options) -> jax.Array:
        batch, kv_heads = keys.shape[0], keys.shape[2]
        count = self.persistent_tokens
        position = jnp.arange(-count, 0, dtype=jnp.int32)
        tokens = self.tokens.astype(keys.dtype)
        key, value = (split_heads(part(tokens)[None], kv_heads) for part in (self.key, self.value))
        if self.rope:
            key = rotate(key, position[None], self.rope_base)
        # a key belongs to one segment, so each segment has its own copy
        most = options["query_segments"].shape[1]
        most = most if self.max_segments is None else min(most, self.max_segments)
        key, value = (jnp.tile(x.astype(keys.dtype), (batch, most, 1, 1)) for x in (key, value))
        owner = jnp.repeat(jnp.arange(most, dtype=jnp.int32), count)

        def before(x, own):
            return jnp.concatenate([jnp.broadcast_to(own, (batch, own.shape[0])), x], axis=1)

        return super().attend(
            query,
            jnp.concatenate([key, keys], axis=1),
            jnp.concatenate([value, values], axis=1),
            key_positions=before(key_positions, jnp.tile(position, most)),
            key_segments=before(key_segments, owner),
            **options,
        )
