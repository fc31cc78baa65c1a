"""Pallas TPU kernels of a recurrence, forward and backward, made from the function of one chunk.

A chunked recurrence is one pure function,

    step(Chunk, state) -> (outputs, new state),

applied to one chunk of time after another. `forward` runs it along a sequential grid axis with the
state in VMEM. `backward` first runs it once more to keep the state at every chunk's start, then
walks from the last chunk to the first, differentiating `step` where it stands: the derivative is
traced into the kernel, so that a value and its gradients cannot drift apart. Where the derivative
that JAX would write is not the one wanted, `step` is built of functions with their own rule
(`blocks`).

A program takes several sequences (heads of one row of the batch) at once. All arrays have them as
their first axis, so each operation of `step` is issued for all of them before the next begins:
the compiler does not reorder much, and one sequence alone leaves the matrix unit waiting.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memseq.pallas_kernels.common.mosaic_tpu.hardware import VMEM_LIMIT


class Plan(NamedTuple):
    """How a call is cut. Static.

    chunk: steps of time that `step` takes together.
    chunks: chunks that a grid step takes, one after another.
    heads: sequences that a program takes at once; divides the heads of a batch row.
    """

    chunk: int
    chunks: int
    heads: int


class Operands(NamedTuple):
    """The arrays of a call: N sequences, H of them a program, C steps a chunk, T / C chunks.

    steps: [N, T, D] each, differentiated.
    rows: float32 [N / H, T / C, H, C] each, differentiated: a number a step, time along the lanes.
    constants: [N, A, D] each, which do not change over time, differentiated.
    state: float32 [N, A, D], differentiated.
    fixed: as rows, without a gradient.
    shared: float32 [B, T / C, S, C] or None: S numbers a step that all sequences of a batch row
        share, without a gradient.
    """

    steps: tuple[jax.Array, ...]
    rows: tuple[jax.Array, ...]
    constants: tuple[jax.Array, ...]
    state: jax.Array
    fixed: tuple[jax.Array, ...] = ()
    shared: jax.Array | None = None


class Chunk(NamedTuple):
    """What `step` gets of H sequences and one chunk.

    steps [H, C, D], rows [H, C], constants [H, A, D], fixed [H, C], shared [S, C] or None.
    """

    steps: tuple[jax.Array, ...]
    rows: tuple[jax.Array, ...]
    constants: tuple[jax.Array, ...]
    fixed: tuple[jax.Array, ...] = ()
    shared: jax.Array | None = None


Step = Callable[[Chunk, jax.Array], tuple[tuple[jax.Array, ...], jax.Array]]


def forward(
    step: Step,
    operands: Operands,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    plan: Plan,
    *,
    name: str,
    keep_states: bool = False,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Runs `step` over all chunks.

    Args:
        outputs: shape [N, T, D] and dtype of each output.
        keep_states: return, in place of the outputs, the state before each chunk
            [N, T / C, A, D].

    Returns:
        The outputs and the last state.
    """
    number, blocks = _grid(operands, plan)
    state = operands.state
    if keep_states:
        kept = (number, blocks * plan.chunks, *state.shape[1:])
        outputs = (jax.ShapeDtypeStruct(kept, state.dtype),)
    specs = _Specs(operands, plan, blocks, reverse=False)

    def kernel(*refs):
        inputs, outs, scratch = specs.split(refs, len(outputs) + 1)
        *outs, last = outs
        time = pl.program_id(1)

        @pl.when(time == 0)
        def _():
            scratch[...] = inputs.state[...]

        def body(c, _):
            before = scratch[...]
            values, scratch[...] = step(specs.load(inputs, c), before)
            if keep_states:
                outs[0][:, c] = before
            else:
                specs.store(outs, values, c)

        jax.lax.fori_loop(0, plan.chunks, body, None)

        @pl.when(time == blocks - 1)
        def _():
            last[...] = scratch[...]

    out_specs = [(specs.states if keep_states else specs.time)(x) for x in outputs]
    *outs, last = pl.pallas_call(
        kernel,
        grid=(number // plan.heads, blocks),
        in_specs=specs.inputs(),
        out_specs=[*out_specs, specs.whole(state)],
        out_shape=[*map(specs.typed, outputs), specs.typed(state)],
        scratch_shapes=[pltpu.VMEM((plan.heads, *state.shape[1:]), state.dtype)],
        compiler_params=_compiler_params(),
        name=f"{name}_{'states' if keep_states else 'forward'}",
    )(*specs.arrays())
    return tuple(outs), last


def backward(
    step: Step,
    operands: Operands,
    cotangents: tuple[tuple[jax.Array, ...], jax.Array],
    plan: Plan,
    *,
    name: str,
) -> tuple[tuple[jax.Array, ...], jax.Array | None, tuple[jax.Array, ...], jax.Array]:
    """The cotangents of steps, rows, constants and state, from those of outputs and last state."""
    out_cotangents, last_cotangent = cotangents
    outputs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out_cotangents)
    (states,), _ = forward(step, operands, outputs, plan, name=name, keep_states=True)
    number, blocks = _grid(operands, plan)
    state = operands.state
    specs = _Specs(operands, plan, blocks, reverse=True)
    differentiated = (operands.steps, operands.rows, operands.constants, state)

    def kernel(*refs):
        extra = len(out_cotangents) + 2
        inputs, rest, scratch = specs.split(refs, extra + len(jax.tree.leaves(differentiated)))
        (*d_outs, d_last, before), d_inputs = rest[:extra], rest[extra:]
        d_steps, d_rows, d_constants, d_state = jax.tree.unflatten(
            jax.tree.structure(differentiated), d_inputs
        )
        time = pl.program_id(1)

        @pl.when(time == 0)
        def _():
            scratch[...] = d_last[...]
            for ref in d_constants:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        def body(i, _):
            c = plan.chunks - 1 - i
            chunk = specs.load(inputs, c)

            def differentiable(steps, rows, constants, state):
                own = chunk._replace(steps=steps, rows=rows, constants=constants)
                return step(own, state)

            (values, _), pull = jax.vjp(
                differentiable, chunk.steps, chunk.rows, chunk.constants, before[:, c]
            )
            d_values = tuple(
                specs.read(ref, c).astype(x.dtype) for ref, x in zip(d_outs, values, strict=True)
            )
            steps, rows, constants, scratch[...] = pull((d_values, scratch[...]))
            specs.store(d_steps, steps, c)
            for ref, value in zip(d_rows, rows, strict=True):
                ref[0, c] = value
            for ref, value in zip(d_constants, constants, strict=True):
                ref[...] += value

        jax.lax.fori_loop(0, plan.chunks, body, None)

        @pl.when(time == blocks - 1)
        def _():
            d_state[...] = scratch[...]

    step_specs = [specs.time(x) for x in operands.steps]
    row_specs = [specs.row(x) for x in operands.rows]
    constant_specs = [specs.whole(x) for x in operands.constants]
    found = pl.pallas_call(
        kernel,
        grid=(number // plan.heads, blocks),
        in_specs=[
            *specs.inputs(),
            *(specs.time(x) for x in out_cotangents),
            specs.whole(state),
            specs.states(states),
        ],
        out_specs=[*step_specs, *row_specs, *constant_specs, specs.whole(state)],
        out_shape=[specs.typed(x) for x in jax.tree.leaves(differentiated)],
        scratch_shapes=[pltpu.VMEM((plan.heads, *state.shape[1:]), state.dtype)],
        compiler_params=_compiler_params(),
        name=f"{name}_backward",
    )(*specs.arrays(), *out_cotangents, last_cotangent, states)
    return jax.tree.unflatten(jax.tree.structure(differentiated), found)


def _grid(operands: Operands, plan: Plan) -> tuple[int, int]:
    """Sequences, and grid steps along time."""
    number, time, _ = operands.steps[0].shape
    return number, time // (plan.chunk * plan.chunks)


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
    )


class _Specs:
    """Block specifications and reference access of one kernel."""

    def __init__(self, operands: Operands, plan: Plan, blocks: int, reverse: bool):
        self.operands, self.plan, self.blocks, self.reverse = operands, plan, blocks, reverse
        self.tree = jax.tree.structure(operands)

    def arrays(self) -> list[jax.Array]:
        return jax.tree.leaves(self.operands)

    def inputs(self) -> list[pl.BlockSpec]:
        ops = self.operands
        specs = Operands(
            tuple(map(self.time, ops.steps)),
            tuple(map(self.row, ops.rows)),
            tuple(map(self.whole, ops.constants)),
            self.whole(ops.state),
            tuple(map(self.row, ops.fixed)),
            None if ops.shared is None else self.row(ops.shared),
        )
        return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, pl.BlockSpec))

    def _block(self, j):
        return self.blocks - 1 - j if self.reverse else j

    def time(self, x) -> pl.BlockSpec:
        """[N, T, D]: a grid step's part."""
        steps = self.plan.chunks * self.plan.chunk
        return pl.BlockSpec(
            (self.plan.heads, steps, x.shape[2]), lambda i, j: (i, self._block(j), 0)
        )

    def states(self, x) -> pl.BlockSpec:
        """[N, T / C, A, D]."""
        return pl.BlockSpec(
            (self.plan.heads, self.plan.chunks, *x.shape[2:]),
            lambda i, j: (i, self._block(j), 0, 0),
        )

    def row(self, x) -> pl.BlockSpec:
        """[N / H, T / C, H, C], or [B, T / C, S, C] for several programs a batch row."""
        programs = self.operands.state.shape[0] // self.plan.heads // x.shape[0]
        return pl.BlockSpec(
            (1, self.plan.chunks, *x.shape[2:]),
            lambda i, j: (jax.lax.div(i, programs), self._block(j), 0, 0),
        )

    def whole(self, x) -> pl.BlockSpec:
        """[N, A, D], the same at all times."""
        return pl.BlockSpec((self.plan.heads, *x.shape[1:]), lambda i, j: (i, 0, 0))

    def typed(self, x) -> jax.ShapeDtypeStruct:
        """Shape, dtype and, inside shard_map, the mesh axes over which an output differs."""
        own = jax.typeof(self.operands.state).manual_axis_type
        return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=own)

    def split(self, refs, count: int):
        """(operands, the `count` references after them, scratch)."""
        n = self.tree.num_leaves
        return jax.tree.unflatten(self.tree, refs[:n]), refs[n : n + count], refs[-1]

    def load(self, refs: Operands, c) -> Chunk:
        return Chunk(
            tuple(self.read(ref, c) for ref in refs.steps),
            tuple(ref[0, c] for ref in refs.rows),
            tuple(ref[...] for ref in refs.constants),
            tuple(ref[0, c] for ref in refs.fixed),
            None if refs.shared is None else refs.shared[0, c],
        )

    def _at(self, c):
        return pl.ds(pl.multiple_of(c * self.plan.chunk, self.plan.chunk), self.plan.chunk)

    def read(self, ref, c) -> jax.Array:
        return ref[:, self._at(c), :]

    def store(self, refs, values, c) -> None:
        for ref, value in zip(refs, values, strict=True):
            ref[:, self._at(c), :] = value.astype(ref.dtype)


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def padded_time(time: int, plan: Plan) -> int:
    """`time` rounded up to whole grid steps."""
    block = plan.chunk * plan.chunks
    return math.ceil(time / block) * block
