"""Recurrences that cannot be parallelised over time: the state feeds back through a nonlinearity.

Their one form is a `lax.scan` over time, so `implementation` and `chunk_size` change nothing.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter
from memseq.layers.common.parts import widen
from memseq.layers.common.vector import VectorLayer
from memseq.pallas_kernels.common.segments import restarts, segments


def scan_steps(
    step: Callable[[Any, Any], tuple[Any, Any]],
    memory: Any,
    inputs: Any,
    segment_ids: jax.Array | None,
    fresh: Any,
) -> tuple[Any, Any]:
    """Runs `step` over time, with the semantics of segments that the operations have.

    Args:
        step: (memory, inputs of one step) to (memory, out), a pytree of arrays [batch, ...] each.
        memory: before the first step, a pytree of arrays [batch, ...].
        inputs: a pytree of arrays [batch, time, ...].
        segment_ids: int32 [batch, time] or None. The memory restarts where the id changes, and at
            negative ids it stays as it is.
        fresh: the memory that a segment starts with, shaped as `memory`.

    Returns:
        out [batch, time, ...] and the memory after the last step.
    """
    by_time = [jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs), None, None]
    if segment_ids is not None:
        valid, index = segments(segment_ids)
        by_time[1:] = restarts(index).T, valid.T

    def pick(mask, new, old):
        def one(new, old):
            return jnp.where(mask.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        return jax.tree.map(one, new, old)

    def body(memory, inputs):
        inputs, restart, taken = inputs
        if restart is not None:
            memory = pick(restart, fresh, memory)
        after, out = step(memory, inputs)
        if taken is not None:
            after = pick(taken, after, memory)
        return after, out

    memory, out = jax.lax.scan(body, memory, tuple(by_time))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out), memory


class Feedback(nn.Module):
    """The weights of a feedback, `kernel` of the given shape: they act inside the loop over time.

    A module of its own, so that tables that go by parameter name find a kernel.
    """

    shape: tuple[int, ...]
    kernel_init: Callable[..., jax.Array]
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", self.kernel_init, self.shape, self.param_dtype)


class StepLayer(VectorLayer):
    """A recurrence whose step is nonlinear in its memory; no operation, only a scan over time.

    Subclasses write `memory_shape`, `feedback` and `step`, and in `setup` call `setup_step` with
    the size of what a step takes of its input.

    Attributes:
        hidden_dim: units; None is features.
    """

    hidden_dim: int | None = None

    OPERATION: ClassVar[None] = None

    def setup_step(self, size: int, use_bias: bool = True) -> None:
        self.input = self.dense(size, use_bias=use_bias)
        self.output = self.dense(self.features)

    @nn.nowrap
    def units(self) -> int:
        if self.hidden_dim is None:
            return self.features
        if self.hidden_dim < 1:
            raise ValueError(f"hidden_dim: expected a positive size, got {self.hidden_dim}")
        return self.hidden_dim

    def feedback(self) -> Any:
        """The parameters of `step`."""
        raise NotImplementedError(f"{type(self).__name__} has no feedback")

    @nn.nowrap
    def step(self, weights: Any, memory: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        """One step: (memory [batch, *memory_shape], out [batch, units]); plain JAX.

        Args:
            weights: what `feedback` gives.
            memory: [batch, *memory_shape].
            inputs: of this step, what `project` gives.
        """
        raise NotImplementedError(f"{type(self).__name__} has no step")

    def project(self, x):
        return self.input(x)

    def mix(self, inputs, state, segment_ids):
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        out, memory = self.run_steps(widen(inputs), state, segment_ids)
        out = out.astype(inputs.dtype)
        return out, self.leave_with(state, segment_ids, memory=memory, conv=state.conv)

    def run_steps(self, inputs: Any, state: Any, segment_ids: jax.Array | None):
        """`scan_steps` of this layer's step: (out, memory)."""
        weights = self.feedback()
        dtype = jnp.result_type(*jax.tree.leaves((inputs, weights, state.memory)))
        weights = jax.tree.map(lambda a: a.astype(dtype), weights)
        memory = state.memory.astype(dtype)
        fresh = self.init_state(memory.shape[0]).memory.astype(dtype)
        return scan_steps(
            lambda memory, inputs: self.step(weights, memory, inputs),
            memory,
            jax.tree.map(lambda a: a.astype(dtype), inputs),
            segment_ids,
            fresh,
        )

    def finish(self, x, out):
        return self.output(out)
