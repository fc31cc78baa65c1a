"""What layers with one matrix memory per head have in common."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import SequenceLayer, enter, no_segment, state_dataclass
from memseq.layers.common.parts import RMSNorm, ShortConv, conv_tail, merge_heads, split_heads
from memseq.pallas_kernels.common.checks import check_choice

GATE_ACTIVATIONS = {"silu": nn.silu, "sigmoid": nn.sigmoid}


@state_dataclass
class MatrixState:
    """State of a layer with matrix memories and a short convolution.

    Attributes:
        memory: float32 [batch, heads, key_dim, value_dim].
        conv: [batch, conv_width - 1, channels], the last inputs of the short convolution
            ([batch, 0, channels] without one).
        segment: int32 [batch], id of the segment the memory belongs to, -1 for none yet.
    """

    memory: jax.Array
    conv: jax.Array
    segment: jax.Array


class MatrixLayer(SequenceLayer):
    """Query, key and value, a short convolution over them, and a normed, gated read-out.

    A subclass writes `operate`, the call of its memory operation, and `gates`, what that takes
    beside query, key and value.

    Attributes:
        key_dim: size of a key per head; None is features / heads.
        value_dim: size of a value per head; None is features / heads.
        output_norm: RMS norm of each head's read-out.
        output_gate: multiply the read-out by a projection of x, activated.
        gate_activation: of the output gate, "silu" or "sigmoid".
        conv_width: short convolution of query, key and value, with silu; 0 is none.
        conv_residual: add the convolution to what it convolves, activated only where the layer is
            without one (Allen-Zhu 2025, "Physics of Language Models: Part 4.1", arXiv:2512.17351:
            the Canon layer at query, key and value; its width is 4).
    """

    key_dim: int | None = None
    value_dim: int | None = None
    output_norm: bool = True
    output_gate: bool = False
    gate_activation: str = "silu"
    conv_width: int = 0
    conv_residual: bool = False

    STATE: ClassVar[type] = MatrixState

    def setup(self):
        self.setup_matrix()

    def setup_matrix(
        self, conv_activation: str | None = "silu", activation: str | None = "silu"
    ) -> None:
        """Projections, convolution, norm and gate.

        conv_activation: of query, key and value with a short convolution that replaces them.
        activation: of them without one, or with one that is added to them.
        """
        check_choice("gate_activation", self.gate_activation, GATE_ACTIVATIONS)
        key_heads, key_dim, heads, value_dim = self.dims()
        self.key = self.dense(self.writes() * key_heads * key_dim)
        self.query = self.make_query(key_heads * key_dim)
        self.value = self.dense(self.writes() * heads * value_dim)
        self.conv = ShortConv(
            self.conv_width,
            self._channels(),
            residual=self.conv_residual,
            activation=conv_activation
            if self.conv_width and not self.conv_residual
            else activation,
            implementation=self.plain_implementation(),
            param_dtype=self.param_dtype,
        )
        self.norm = RMSNorm(param_dtype=self.param_dtype) if self.output_norm else None
        self.gate = self.make_gate(heads * value_dim) if self.output_gate else None
        self.output = self.dense(self.features)

    @nn.nowrap
    def make_query(self, size: int) -> nn.Module:
        """The query's projection."""
        return self.dense(size)

    @nn.nowrap
    def make_gate(self, size: int) -> nn.Module:
        """The output gate's projection."""
        return self.dense(size)

    @nn.nowrap
    def dims(self) -> tuple[int, int, int, int]:
        """(key heads, key size per head, value heads, value size per head)."""
        key_dim = self.split_features("key_dim", self.key_dim)
        return self.heads, key_dim, self.heads, self.split_features("value_dim", self.value_dim)

    @nn.nowrap
    def writes(self) -> int:
        """Pairs of a key and a value that a step writes into each head's memory."""
        return 1

    @nn.nowrap
    def _channels(self) -> int:
        key_heads, key_dim, heads, value_dim = self.dims()
        return (1 + self.writes()) * key_heads * key_dim + self.writes() * heads * value_dim

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> Any:
        """An empty memory and an empty tail of the convolution; `context` changes nothing."""
        return self.empty_state(batch)

    @nn.nowrap
    def empty_state(self, batch: int, **more: jax.Array) -> Any:
        """An empty state whose fields are those of `MatrixState` and `more`."""
        _, key_dim, heads, value_dim = self.dims()
        fields = {
            "memory": jnp.zeros((batch, heads, key_dim, value_dim), jnp.float32),
            "conv": conv_tail(batch, self.conv_width, self._channels(), self.activation_dtype()),
            "segment": no_segment(batch),
        }
        return self.STATE(**fields | more)

    def project(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """`project_all` of x, then the layer's `gates`."""
        return self.project_all(x), *self.gates(x)

    def gates(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """What `operate` takes beside query, key and value: decays, write strengths; pointwise."""
        return ()

    def mix(self, inputs, state, segment_ids):
        mixed, *gates = inputs
        state = enter(state, self.init_state(mixed.shape[0]), segment_ids)
        query, key, value, conv = self.convolve(mixed, state, segment_ids)
        options = self.operation_options(segment_ids) | {"initial_state": self.recall(state)}
        out, memory = self.operate(query, key, value, *gates, **options)
        return out, self.leave_with(state, segment_ids, **self.keep(memory), conv=conv)

    def operate(self, query, key, value, *gates, **options) -> tuple[jax.Array, jax.Array]:
        """The memory operation: (read-out [batch, time, heads, value_dim], memory after it).

        query, key and value are [batch, time, heads, dim]; `options` go to the operation.
        """
        raise NotImplementedError(f"{type(self).__name__} has no operate")

    def project_all(self, x: jax.Array) -> jax.Array:
        """Query, key and value side by side, [batch, time, channels]."""
        key = self.key(x)  # before the query, which may start as it does
        return jnp.concatenate([self.query(x), key, self.value(x)], axis=-1)

    def convolve(self, mixed: jax.Array, state: Any, segment_ids: jax.Array | None):
        """`project_all`'s result after the convolution, by heads, and the new tail.

        With several writes a step, keys and values have theirs one after another as heads.
        """
        key_heads, key_dim, heads, _ = self.dims()
        writes = self.writes()
        mixed, conv = self.conv(mixed, state.conv, segment_ids)
        size = key_heads * key_dim
        query, key, value = jnp.split(mixed, [size, (1 + writes) * size], axis=-1)
        return (
            split_heads(query, key_heads),
            split_heads(key, writes * key_heads),
            split_heads(value, writes * heads),
            conv,
        )

    def finish(self, x: jax.Array, out: jax.Array) -> jax.Array:
        if self.norm is not None:
            out = self.norm(out)
        out = merge_heads(out)
        if self.gate is not None:
            out = out * GATE_ACTIVATIONS[self.gate_activation](self.gate(x))
        return self.output(out)
