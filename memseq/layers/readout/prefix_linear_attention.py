"""Prefix linear attention (Just Read Twice)."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from memseq.layers.common.base import check_like, state_dataclass
from memseq.layers.common.parts import split_heads, widen
from memseq.layers.linear_attention.linear_attention import Based, BasedState
from memseq.pallas_kernels.common.checks import check_array
from memseq.pallas_kernels.common.precision import products_precision


@state_dataclass
class PrefixLinearAttentionState(BasedState):
    """State of `PrefixLinearAttention`: what a prefix and the steps so far have written."""


class PrefixLinearAttention(Based):
    """Linear attention that has read all of a prefix before its first step.

        S_t = sum_{j in prefix} phi(k'_j) v'_j^T + sum_{j<=t} phi(k_j) v_j^T, z_t likewise,
        out_t = S_t^T phi(q_t) / (z_t . phi(q_t))

    with projections k', v' of their own. What a memory must hold depends on the order in which
    things are said; a first reading without an order lifts that. Arora et al. 2024, "Just read
    twice: closing the recall gap for recurrent language models", arXiv:2407.05483, section 4
    (JRT-RNN).

        y, state = layer(x, prefix)                  # x goes on after the prefix, or repeats it
        y, state = layer(more, None, state)          # goes on where it stopped

    In a model of the paper the prefix is the layer's own input at the prompt's positions,
    `layer(x, x[:, :prompt])`: it is read once without an order and once in order.

    Attributes: as `Based`.
    """

    PAPER: ClassVar[str] = "Arora et al. 2024, arXiv:2407.05483"
    STATE: ClassVar[type] = PrefixLinearAttentionState

    def setup(self):
        super().setup()
        key_heads, key_dim, heads, value_dim = self.dims()
        self.prefix_key = self.dense(key_heads * key_dim)
        self.prefix_value = self.dense(heads * value_dim)

    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | None = None,
        state: Any = None,
        *,
        memory_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ):
        """Reads the prefix, then runs over time.

        Args:
            x: [batch, time, features].
            memory: the prefix, [batch, positions, features], in any order; None reads none.
            state: what the previous call returned, to which a prefix given with it is added.
            memory_mask: bool [batch, positions], True takes part.
            segment_ids: as of every layer: int32 [batch, time]. The prefix belongs to the first
                segment of a row; one that follows starts empty.

        Returns:
            y [batch, time, features] and the state after the last step.

        Raises:
            ValueError: for shapes that do not fit, or where neither prefix nor state is given.
        """
        if memory is None and state is None:
            raise ValueError("memory: expected a prefix or a state to go on from, got neither")
        if memory is not None:
            state = self.read(memory, memory_mask, state)
        return super().__call__(x, state, segment_ids)

    def read(self, memory: jax.Array, mask: jax.Array | None, state: Any = None) -> Any:
        """The state (None: an empty one) with a prefix [batch, positions, features] added."""
        check_array("memory", memory, (None, None, self.features), "[batch, positions, features]")
        batch, positions = memory.shape[:2]
        fresh = self.init_state(batch)
        if state is None:
            state = fresh
        check_like(state, fresh)
        if mask is not None:
            if mask.shape != (batch, positions) or mask.dtype != bool:
                raise ValueError(
                    f"memory_mask: expected bool [batch, positions] = [{batch}, {positions}], "
                    f"got {mask.dtype} {list(mask.shape)}"
                )
            memory = jnp.where(mask[..., None], memory, 0)
        key_heads, _, heads, _ = self.dims()
        key = self.key_map(split_heads(self.prefix_key(memory), key_heads))
        value = split_heads(self.prefix_value(memory), heads)
        precision = products_precision(key, value)
        key, value = widen(key), widen(value)
        if self.normalize:
            value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
        if mask is not None:  # features of a zero key are not zero
            key = jnp.where(mask[..., None, None], key, 0)
        added = jnp.einsum("bjhk,bjhv->bhkv", key, value, precision=precision)
        return state.replace(memory=state.memory + added)
