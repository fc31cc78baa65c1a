"""What every causal sequence layer is: three steps around one memory operation."""

import dataclasses
import json
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
from flax import struct

from memseq.pallas_kernels.common.checks import (
    check_array,
    check_choice,
    check_count,
    check_segment_ids,
)
from memseq.pallas_kernels.common.dispatch import IMPLEMENTATIONS
from memseq.pallas_kernels.common.segments import first_segment, last_segment


class SequenceLayer(nn.Module):
    """A causal layer with a memory: `y, state = layer(x, state, segment_ids)`.

    Subclasses write `project`, `mix`, `finish` and `init_state`. `mix` is the only step that looks
    across time, so wrappers (mixtures of memories, context parallelism) need to know it alone.

    Attributes:
        features: size of the input's and output's last axis.
        heads: number of memories side by side.
        implementation: form of the memory operation, see `memseq.pallas_kernels`.
        chunk_size: steps the chunked form takes together; changes speed only.
        dtype: of activations; None follows input and parameters.
        param_dtype: of parameters.
    """

    features: int
    heads: int = 4
    implementation: str = "auto"
    chunk_size: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    PAPER: ClassVar[str]
    MEMORY: ClassVar[str]
    OPERATION: ClassVar[str | None]  # None: a scan over time of the layer's own
    STATE: ClassVar[type]
    SHARES: ClassVar[bool] = False

    def __call__(
        self,
        x: jax.Array,
        state: Any = None,
        segment_ids: jax.Array | None = None,
        shared: dict[str, Any] | None = None,
    ):
        """Runs over time.

        Args:
            x: [batch, time, features].
            state: what the previous call returned, or `init_state`; None starts empty.
            segment_ids: int32 [batch, time]. The memory restarts where the id changes, also from
                the previous call's last id to this call's first. Negative ids are padding: they
                change nothing and their output means nothing. None continues.
            shared: what the layers of a model leave for the layers above them, of this call. A
                layer with `SHARES` reads it and adds to it in place; others leave it alone.

        Returns:
            y [batch, time, features] and the state after the last step.
        """
        check_array("x", x, (None, None, self.features), "[batch, time, features]")
        check_segment_ids(segment_ids, *x.shape[:2])
        parts = (self.project(x), state, segment_ids)
        if self.SHARES:
            parts += ({} if shared is None else shared,)
        out, state = self.mix(*parts)
        return self.finish(x, out), state

    def project(self, x: jax.Array) -> Any:
        """x [batch, time, features] to what the memory is written and read with; pointwise."""
        raise NotImplementedError(f"{type(self).__name__} has no project")

    def mix(self, inputs: Any, state: Any, segment_ids: jax.Array | None) -> tuple[jax.Array, Any]:
        """Short convolution and memory: what `project` gave to (read-out, new state).

        That of a layer with `SHARES` takes `shared` after these.
        """
        raise NotImplementedError(f"{type(self).__name__} has no mix")

    def finish(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """The read-out to y [batch, time, features]; pointwise."""
        raise NotImplementedError(f"{type(self).__name__} has no finish")

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> Any:
        """An empty state. `context`: positions to hold, for layers that store them one by one."""
        raise NotImplementedError(f"{type(self).__name__} has no init_state")

    @nn.nowrap
    def recall(self, state: Any) -> Any:
        """What the memory operation takes as its initial state."""
        return state.memory

    @nn.nowrap
    def keep(self, memory: Any) -> dict[str, jax.Array]:
        """The state's fields for the state that the memory operation returned."""
        return {"memory": memory}

    def leave_with(self, state: Any, segment_ids: jax.Array | None, **fields: jax.Array) -> Any:
        """The state after this call, which was entered with `state`: `fields` and the segment."""
        self.sow("intermediates", "memory_norm", jnp.sqrt(jnp.mean(fields["memory"] ** 2)))
        return self.STATE(**fields, segment=leave(state, segment_ids))

    def sow_decay(self, log_decay: jax.Array) -> jax.Array:
        """The log decay as it came; sows the mean of what is kept a step."""
        self.sow("intermediates", "mean_decay", jnp.exp(log_decay).mean())
        return log_decay

    def sow_loss(self, name: str, value: jax.Array) -> None:
        """Sows a loss for training to add; not in `init`, which would keep it as a parameter."""
        if not self.is_initializing():
            self.sow("losses", name, value)

    @nn.nowrap
    def state_bytes(self, batch: int = 1, context: int | None = None) -> int:
        """Bytes of `init_state(batch, context)`, counted from its arrays."""
        shapes = jax.eval_shape(lambda: self.init_state(batch, context))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    @nn.nowrap
    def dense(self, features: int, use_bias: bool = False, **options: Any) -> nn.Dense:
        """A projection in the layer's dtypes; `options` are those of `nn.Dense`."""
        return nn.Dense(
            features,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            **options,
        )

    @nn.nowrap
    def activation_dtype(self) -> Any:
        """The dtype of activations that a state keeps."""
        return self.param_dtype if self.dtype is None else self.dtype

    @nn.nowrap
    def plain_implementation(self) -> str:
        """The form for an operation beside the memory (a convolution), which has fewer forms."""
        check_choice("implementation", self.implementation, IMPLEMENTATIONS)
        return self.implementation if self.implementation in ("reference", "chunked") else "auto"

    @nn.nowrap
    def operation_options(self, segment_ids: jax.Array | None) -> dict[str, Any]:
        """What every call of a memory operation gets from the layer."""
        return {
            "segment_ids": segment_ids,
            "chunk_size": self.chunk_size,
            "implementation": self.implementation,
        }

    @nn.nowrap
    def split_features(self, name: str, per_head: int | None) -> int:
        """`per_head`, or features / heads where it is None."""
        check_count("heads", self.heads, 1)
        if per_head is not None:
            check_count(name, per_head, 1)
            return per_head
        if self.features % self.heads:
            raise ValueError(
                f"heads: features {self.features} must be a multiple of it, or {name} be given; "
                f"got heads {self.heads}"
            )
        return self.features // self.heads


def state_dataclass(cls: type) -> type:
    """A `flax.struct.dataclass` that `jax.export` can write into an artifact's signature."""
    cls = struct.dataclass(cls)
    fields = dataclasses.fields(cls)
    data = [f.name for f in fields if f.metadata.get("pytree_node", True)]
    static = [f.name for f in fields if not f.metadata.get("pytree_node", True)]
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"memseq.layers.{cls.__name__}",
        serialize_auxdata=lambda values: json.dumps(list(values)).encode(),
        deserialize_auxdata=lambda text: tuple(json.loads(text.decode())),
        from_children=lambda values, children: cls(
            **dict(zip(data, children, strict=True)), **dict(zip(static, values, strict=True))
        ),
    )
    return cls


def enter(state: Any, fresh: Any, segment_ids: jax.Array | None) -> Any:
    """The state to start a call with: rows whose first id is a new segment start `fresh`."""
    if state is None:
        return fresh
    check_like(state, fresh)
    if segment_ids is None:
        return state
    first = first_segment(segment_ids, state.segment)
    restart = (state.segment >= 0) & (first != state.segment)
    return jax.tree.map(
        lambda new, old: jnp.where(restart.reshape(-1, *[1] * (old.ndim - 1)), new, old),
        fresh,
        state,
    )


def leave(state: Any, segment_ids: jax.Array | None) -> jax.Array:
    """int32 [batch]: the `segment` that the state after this call carries."""
    return state.segment if segment_ids is None else last_segment(segment_ids, state.segment)


def no_segment(batch: int) -> jax.Array:
    """int32 [batch]: the `segment` of rows that have not had one."""
    return jnp.full((batch,), -1, jnp.int32)


def check_like(state: Any, expected: Any) -> None:
    """`state` must be of the expected class with the expected shapes."""
    if type(state) is not type(expected):
        raise ValueError(f"state: expected {type(expected).__name__}, got {type(state).__name__}")
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True
    ):
        if got.shape != want.shape:
            raise ValueError(
                f"state{jax.tree_util.keystr(path)}: expected shape {list(want.shape)}, "
                f"got {list(got.shape)}"
            )


def check_layer_index(layer_index: int, num_layers: int) -> None:
    """Raises ValueError unless 0 <= layer_index < num_layers."""
    check_count("num_layers", num_layers, 1)
    check_count("layer_index", layer_index, 0)
    if layer_index >= num_layers:
        raise ValueError(
            f"layer_index: expected less than num_layers {num_layers}, got {layer_index}"
        )
