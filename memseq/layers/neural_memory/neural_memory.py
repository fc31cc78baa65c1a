"""A layer whose memory is a network that learns while it is read."""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, leave, no_segment, state_dataclass
from memseq.layers.common.matrix import MatrixLayer
from memseq.layers.common.parts import conv_tail, l2_normalize, widen
from memseq.pallas_kernels import neural_memory
from memseq.pallas_kernels.common.checks import check_count
from memseq.pallas_kernels.common.precision import products_precision
from memseq.pallas_kernels.neural_memory import Loss, Memory, MemoryState, Retention, empty_state
from memseq.pallas_kernels.neural_memory.losses import WITH_THRESHOLD
from memseq.pallas_kernels.neural_memory.memory import forward, through
from memseq.pallas_kernels.neural_memory.state import select


@state_dataclass
class NeuralMemoryState:
    """State of a `NeuralMemory`: its weights, and where in an update chunk it stands.

    Attributes:
        held: the memory, see `memseq.pallas_kernels.neural_memory.MemoryState`. Weights that were
            never written to are those that the layer has learned to start from.
        conv: [batch, conv_width - 1, channels], the last inputs of the short convolution.
        segment: int32 [batch], id of the segment the memory belongs to, -1 for none yet.
    """

    held: MemoryState
    conv: jax.Array
    segment: jax.Array


class NeuralMemory(MatrixLayer):
    """A network per head that learns to answer each key with its value, by gradient descent.

        S_t = momentum_t S_{t-1} - step_t grad loss(M(k_t; W_anchor), v_t)
        W_t = keep_t W_{t-1} + S_t,  out_t = M(q_t; W_t)

    Titans' long-term memory with everything that TTT, Miras and Atlas vary as an attribute; the
    layers of those papers are this one with their values. Keys, values, queries, `keep`, `step` and
    `momentum` are functions of x; the weights W_0 that every segment starts from are parameters,
    and the gradient of a model's loss goes through the memory's own learning.

    Alone, outside of any model, it is a stateful map: `y, state = layer.apply(params, x, state)`,
    for one step or many. What the state holds: the weights now, those at the start of the present
    update chunk, the momentum, the tail of the convolution. With one head and two layers of sizes
    d, 4 d, d in float32 the three are 8 d^2 numbers each; `state_bytes` counts them.

        x [batch, time, features] --project--> query, key, value, gates
              segment starts        chunk border                  chunk border
        W     W_0 ----------------> W_C ------------------------> W_2C     weights of `state`
        write gradients at W_0      gradients at W_C              each step, at once
        read  W_1 ... W_C           W_C+1 ... W_2C                after its own step's write

    Attributes (beside those of every layer and of `MatrixLayer`):
        depth: layers of the memory network; 1 is a matrix.
        expansion: sizes of its hidden layers, as multiples of value_dim.
        activation: between them, "gelu", "silu", "relu" or "tanh".
        residual: the network adds its input to its answer; needs key_dim = value_dim.
        memory_norm: of its answer before that: "none", "layer" or "rms".
        memory_epsilon: what that norm adds to the variance.
        memory_affine: a learned scale and offset after the norm, which the memory does not write.
        memory_bias: its layers have biases, which the memory writes.
        initial_std: of the random weights that W_0 starts at; None is 1 for the first layer (its
            inputs are unit vectors) and the inverse root of the number of inputs for others.
        loss: "l2" |r|^2 / 2, "dot", "lp", "huber", "huber_each" or "robust", see
            `memseq.pallas_kernels.neural_memory.losses`; thresholds are softplus of a projection.
        power: of "lp".
        retention, retention_amount: map of the weights, see `Retention` there.
        window: tokens whose gradients a step follows, this one included (the Omega rule); each has
            its own step size.
        use_keep: forget by a learned, input-dependent factor.
        use_momentum: with S above; without it W_t = keep_t W_{t-1} - step_t grad.
        update_chunk: steps between the points at which gradients are taken. Part of the model: a
            layer trained at one value computes another function at another.
        anchor, read, outer_grad: as in `memseq.pallas_kernels.neural_memory`. The full outer
            gradient grows without bound with time while learning is not yet contracting (at the
            start, one head of 16: norm 154 at 512 steps, 2e15 at 2,048), so it ends after 8 chunks.
        max_segments: the most segments of a row in one call, each of which can cost a chunk of
            work more. A row with more gives NaN, in its output and its state, so raise it where
            more than 8 documents are packed into a row. None is any number, and slow.
        max_step: the largest step, times 1 / value_dim: step = max_step sigmoid(...) / value_dim.
        initial_step, initial_keep, initial_momentum: of the gates at the start of training;
            initial_step as a share of max_step.
        unit_keys: divide queries and keys by their lengths.
        conv_activation: of query, key and value, also without a convolution, "silu" or None.
    """

    output_gate: bool = True
    conv_width: int = 4
    depth: int = 2
    expansion: int = 4
    activation: str = "gelu"
    residual: bool = True
    memory_norm: str = "layer"
    memory_epsilon: float = 1e-5
    memory_affine: bool = True
    memory_bias: bool = False
    initial_std: float | None = None
    loss: str = "l2"
    power: float = 3.0
    retention: str = "none"
    retention_amount: float | None = None
    window: int = 1
    use_keep: bool = True
    use_momentum: bool = True
    update_chunk: int = 16
    anchor: str = "chunk"
    read: str = "after"
    outer_grad: Any = ("truncate", 8)
    max_segments: int | None = 8
    max_step: float = 1.0
    initial_step: float = 0.1
    initial_keep: float = 0.99
    initial_momentum: float = 0.5
    unit_keys: bool = True
    conv_activation: str | None = "silu"

    PAPER: ClassVar[str] = "Behrouz et al. 2025, arXiv:2501.00663; 2504.13173"
    MEMORY: ClassVar[str] = "weights of a network a head"
    OPERATION: ClassVar[str] = "neural_memory"
    STATE: ClassVar[type] = NeuralMemoryState

    def setup(self):
        self.setup_matrix(self.conv_activation, self.conv_activation)
        self.setup_memory()

    def setup_memory(self) -> None:
        """The gates, and the weights that the memory starts from."""
        heads = self.heads
        self.step_gate = self.dense(heads * self.window)
        self.step_bias = self._start("step_bias", heads * self.window, _logit(self.initial_step))
        if self.use_keep:
            self.keep_gate = self.dense(heads)
            self.keep_bias = self._start("keep_bias", heads, _logit(self.initial_keep))
        if self.use_momentum:
            self.momentum_gate = self.dense(heads)
            self.momentum_bias = self._start("momentum_bias", heads, _logit(self.initial_momentum))
        if self.loss in WITH_THRESHOLD:
            self.threshold_gate = self.dense(heads)
            one = 0.5413248546129181  # softplus of it is 1
            self.threshold_bias = self._start("threshold_bias", heads, one)
        self.initial = tuple(
            {
                name: self.param(f"initial_{name}_{i}", init, shape, jnp.float32)
                for name, shape, init in self._layer(i, n, m)
            }
            for i, (n, m) in enumerate(self.sizes())
        )
        value_dim = self.dims()[3]
        self.affine = {}
        if self.memory_affine:
            ones, zeros = nn.initializers.ones, nn.initializers.zeros
            self.affine = {
                "scale": self.param("affine_scale", ones, (heads, value_dim), jnp.float32),
                "offset": self.param("affine_bias", zeros, (heads, value_dim), jnp.float32),
            }

    def _start(self, name, size, value):
        return self.param(name, nn.initializers.constant(value), (size,), jnp.float32)

    @nn.nowrap
    def _layer(self, i, inputs, outputs):
        """Name, shape and start value of what the i-th layer of the memory consists of."""
        std = self.initial_std
        if std is None:
            std = 1.0 if i == 0 and self.unit_keys else inputs**-0.5
        yield "weight", (self.heads, inputs, outputs), nn.initializers.normal(std)
        if self.memory_bias:
            yield "bias", (self.heads, outputs), nn.initializers.zeros

    @nn.nowrap
    def sizes(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each layer of the memory network."""
        check_count("depth", self.depth, 1)
        check_count("expansion", self.expansion, 1)
        _, _, _, value_dim = self.dims()
        sizes = [self.input_dim()] + [self.expansion * value_dim] * (self.depth - 1) + [value_dim]
        return list(zip(sizes[:-1], sizes[1:], strict=True))

    @nn.nowrap
    def input_dim(self) -> int:
        """Size of what the memory network is applied to: a key."""
        return self.dims()[1]

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> NeuralMemoryState:
        """A memory that starts from the learned weights; `context` changes nothing."""
        check_count("window", self.window, 1)
        shapes = tuple(
            {
                name: jax.ShapeDtypeStruct(shape, jnp.float32)
                for name, shape, _ in self._layer(i, n, m)
            }
            for i, (n, m) in enumerate(self.sizes())
        )
        value_dim = self.dims()[3]
        return self.STATE(
            held=empty_state(
                shapes, batch, self.use_momentum, self.window, self.input_dim(), value_dim
            ),
            conv=conv_tail(batch, self.conv_width, self._channels(), self.activation_dtype()),
            segment=no_segment(batch),
        )

    def project(self, x):
        return self.project_all(x), self.memory_gates(x)

    def memory_gates(self, x: jax.Array) -> dict[str, jax.Array]:
        """What the operation takes beside query, key and value, float32 at least; pointwise."""
        step = nn.sigmoid(widen(self.step_gate(x)) + self.step_bias)
        self.sow("intermediates", "mean_step", self.max_step * step.mean())
        step = step * (self.max_step / self.dims()[3])
        if self.window > 1:
            step = step.reshape(*x.shape[:2], self.heads, self.window)
        gates = {"log_keep": None, "step": step}
        if self.use_keep:
            log_keep = nn.log_sigmoid(widen(self.keep_gate(x)) + self.keep_bias)
            gates["log_keep"] = self.sow_decay(log_keep)
        if self.use_momentum:
            gates["momentum"] = nn.sigmoid(widen(self.momentum_gate(x)) + self.momentum_bias)
            self.sow("intermediates", "mean_momentum", gates["momentum"].mean())
        if self.loss in WITH_THRESHOLD:
            threshold = nn.softplus(widen(self.threshold_gate(x)) + self.threshold_bias)
            gates["threshold"] = threshold * self.dims()[3] ** 0.5
        return gates

    def mix(self, inputs, state, segment_ids):
        mixed, gates = inputs
        entered = enter(state, self.init_state(mixed.shape[0]), segment_ids)
        query, key, value, conv = self.convolve(mixed, entered, segment_ids)
        query, key = self.map_keys(query, key, entered, segment_ids)
        held = None if state is None else entered.held
        out, held = self.remember(query, key, value, gates, held, segment_ids)
        return out, self.STATE(held=held, conv=conv, segment=leave(entered, segment_ids))

    def map_keys(self, query, key, state, segment_ids) -> tuple[jax.Array, jax.Array]:
        """Queries and keys as the memory takes them, [batch, time, heads, input_dim]."""
        return (l2_normalize(query), l2_normalize(key)) if self.unit_keys else (query, key)

    def answer(self, query: jax.Array, held: MemoryState) -> jax.Array:
        """M(q) of queries [batch, time, heads, input_dim] at the present anchor; writes nothing."""
        network, retention = self._network(), Retention(self.retention, self.retention_amount)
        initial = tuple(dict(layer) for layer in self.initial)
        anchor = select(held.position < 0, jax.tree.map(lambda w: w[None], initial), held.anchor)
        precision = products_precision(query)

        def one(weights, affine, query):
            linear = through(retention.view(weights, weights), precision)
            return forward(network, len(weights), linear, affine, query)

        by_head = jax.vmap(one, (0, 0, 1), 1)
        return jax.vmap(by_head, (0, None, 0))(anchor, dict(self.affine), widen(query))

    @nn.nowrap
    def _network(self) -> Memory:
        return Memory(self.activation, self.residual, self.memory_norm, self.memory_epsilon)

    def remember(self, query, key, value, gates, held, segment_ids, **options):
        """The memory operation: (read-out, `MemoryState`). held None starts from the parameters."""
        out, held = neural_memory(
            query,
            key,
            value,
            tuple(dict(layer) for layer in self.initial),  # setup freezes them
            memory=self._network(),
            loss=Loss(self.loss, self.power),
            retention=Retention(self.retention, self.retention_amount),
            affine=dict(self.affine),
            update_chunk=self.update_chunk,
            anchor=self.anchor,
            read=self.read,
            outer_grad=self.outer_grad,
            max_segments=self.max_segments,
            initial_state=held,
            segment_ids=segment_ids,
            implementation=self.implementation,
            **gates | options,
        )
        squares = [jnp.mean(w["weight"] ** 2) for w in held.weights]
        self.sow("intermediates", "memory_norm", jnp.sqrt(sum(squares) / len(squares)))
        return out, held


def _logit(share: float) -> float:
    """The number whose sigmoid is `share`."""
    if not 0 < share < 1:
        raise ValueError(f"initial gates: expected shares in (0, 1), got {share!r}")
    return -math.log(1 / share - 1)
