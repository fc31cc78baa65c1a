"""The HiPPO memory: fixed transitions between learned projections."""

from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.parts import merge_heads, widen
from memseq.layers.common.vector import VectorLayer, VectorState
from memseq.layers.recurrent.step import scan_steps
from memseq.layers.state_space import hippo
from memseq.pallas_kernels.common import context
from memseq.pallas_kernels.common.checks import check_choice, check_count
from memseq.pallas_kernels.common.segments import position_at_start
from memseq.pallas_kernels.common.sharded import vary_together


@state_dataclass
class HiPPOMemoryState(VectorState):
    """State of `HiPPOMemory`; `memory` is [batch, heads, order].

    Attributes:
        position: int32 [batch], steps that the memory covers.
    """

    position: jax.Array


class HiPPOMemory(VectorLayer):
    """A few signals of the input, remembered by the coefficients of their past; nothing is learned
    about how.

        c_t = A' c_{t-1} + B' u_t for each signal,  u_t = W x_t,  out_t = V c_t

    with A' and B' of a HiPPO measure (`memseq.layers.state_space.hippo`), which are constants, and
    learned V and W. Gu et al. 2020, "HiPPO", arXiv:2008.07669. "legs" remembers the whole past,
    however long, and forgets no step faster than another: its A and B are divided by the number of
    steps. "lmu" is the Legendre memory unit's memory (Voelker et al. 2019).

    Attributes (beside those of every layer):
        heads: signals.
        order: coefficients of a signal.
        measure: one of `hippo.MEASURES`.
        method: of discretisation, one of `hippo.METHODS`; "legs" takes "backward" and "bilinear".
        window: steps of the window that measures other than "legs" remember.
    """

    order: int = 64
    measure: str = "legs"
    method: str = "bilinear"
    window: int = 256

    PAPER: ClassVar[str] = "Gu et al. 2020, arXiv:2008.07669"
    MEMORY: ClassVar[str] = "vectors [heads, order]"
    OPERATION: ClassVar[None] = None
    STATE: ClassVar[type] = HiPPOMemoryState

    def setup(self):
        check_choice("measure", self.measure, hippo.MEASURES)
        implicit = ("backward", "bilinear")
        check_choice("method", self.method, implicit if self.measure == "legs" else hippo.METHODS)
        check_count("window", self.window, 1)
        self.input = self.dense(self.heads)
        self.output = self.dense(self.features)

    @nn.nowrap
    def memory_shape(self):
        check_count("heads", self.heads, 1)
        check_count("order", self.order, 1)
        return self.heads, self.order

    @nn.nowrap
    def init_state(self, batch, context=None):
        return self.empty_state(batch, position=jnp.zeros(batch, jnp.int32))

    def project(self, x):
        return self.input(x)

    def mix(self, inputs, state, segment_ids):
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        signal = widen(inputs)
        dtype = jnp.promote_types(signal.dtype, state.memory.dtype)
        step = self._fading(dtype) if self.measure != "legs" else self._stretched(dtype)
        start = state.memory.astype(dtype), state.position
        out, (memory, position) = _over_time(step, start, signal.astype(dtype), segment_ids)
        out = merge_heads(out).astype(inputs.dtype)
        return out, self.leave_with(
            state, segment_ids, memory=memory, conv=state.conv, position=position
        )

    @nn.nowrap
    def _fading(self, dtype):
        """One step of a measure that is the same at all times."""
        a, b = hippo.transition(self.measure, self.order)
        kept, write = hippo.discretize(a, b, 1 / self.window, self.method)
        kept, write = jnp.asarray(kept.T, dtype), jnp.asarray(write, dtype)

        def step(carried, signal):
            memory, position = carried
            memory = memory @ kept + signal[..., None] * write
            return (memory, position + 1), memory

        return step

    @nn.nowrap
    def _stretched(self, dtype):
        """One step of "legs", whose A and B are those of the measure over the steps so far."""
        a, b = (jnp.asarray(x, dtype) for x in hippo.transition("legs", self.order))
        implicit = {"backward": 1.0, "bilinear": 0.5}[self.method]

        def step(carried, signal):
            memory, position = carried
            position = position + 1
            dt = (1 / position.astype(dtype))[:, None, None]
            memory = memory + (1 - implicit) * dt * (memory @ a.T)
            memory = memory + dt * signal[..., None] * b
            left = jnp.eye(self.order, dtype=dtype) - implicit * dt * a
            memory = jax.scipy.linalg.solve_triangular(left, memory.mT, lower=True).mT
            return (memory, position), memory

        return step

    def finish(self, x, out):
        return self.output(out)


def _over_time(
    step: Callable,
    start: tuple[jax.Array, jax.Array],
    signal: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """`step` over the signal [batch, time, heads] from `start`, also with time split over devices.

    A stretch multiplies memories by one matrix [order, order], where its steps without a signal
    lead the identity, and adds where they lead from an empty memory. "legs" steps by its position.
    """
    memory, position = start

    def run(memory, signal):
        signal, *start = vary_together((signal, memory, position))
        fresh = jax.tree.map(jnp.zeros_like, tuple(start))
        return scan_steps(step, tuple(start), signal, segment_ids, fresh)

    name = context.axis()
    if name is None:
        return run(memory, signal)
    with context.over(None):
        position = position_at_start(position, segment_ids, name)
        _, (added, _) = run(jnp.zeros_like(memory), signal)
        batch, time, _ = signal.shape
        size = memory.shape[-1]
        identity = jnp.broadcast_to(jnp.eye(size, dtype=memory.dtype), (batch, size, size))
        _, (moved, _) = run(identity, jnp.zeros((batch, time, size), signal.dtype))

        def after(stretch, memory):
            added, moved = stretch
            return jnp.matmul(memory, moved, precision=jax.lax.Precision.HIGHEST) + added

        memory = context.carried_in(memory, (added, moved), after, segment_ids, name)
        out, last = run(memory, signal)
    return out, context.at_the_end(last, name)
