"""Pallas TPU kernels of a recurrence, forward and backward, made from the function of one chunk.

A chunked recurrence is one pure function,

    step(Chunk, state) -> (outputs, new state),

applied to one chunk of time after another. `forward` runs it along a sequential grid axis with the
state in VMEM. `backward` first runs it once more to keep the state at every chunk's start, then
walks from the last chunk to the first, differentiating `step` where it stands: the derivative is
traced into the kernel, so that a value and its gradients cannot drift apart. Where the derivative
that JAX would write is not the one wanted, `step` is built of functions with their own rule
(`blocks`). A state that is large beside a chunk is kept at the start of every grid step alone
(`Plan.remake`), and those of the grid step's chunks are made again in VMEM.

A program takes several sequences (heads of one row of the batch) at once. All arrays have them as
their first axis, so each operation of `step` is issued for all of them before the next begins:
the compiler does not reorder much, and one sequence alone leaves the matrix unit waiting.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
    remake: the backward pass keeps one state a grid step, and makes those of its chunks again.
    """

    chunk: int
    chunks: int
    heads: int
    remake: bool = False


class Operands(NamedTuple):
    """The arrays of a call: N sequences, H of them a program, C steps a chunk, T / C chunks.

    steps: [N, T, D] each, differentiated.
    rows: float32 [N / H, T / C, H, C] each, differentiated: a number a step, time along the lanes.
    constants: [N, A, D] each, which do not change over time, differentiated.
    state: float32 [N, A, D], or a tree of such, differentiated.
    fixed: as rows, without a gradient.
    shared: float32 [B, T / C, S, C] or None: S numbers a step that all sequences of a batch row
        share, without a gradient.
    """

    steps: tuple[jax.Array, ...]
    rows: tuple[jax.Array, ...]
    constants: tuple[jax.Array, ...]
    state: Any
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


Step = Callable[[Chunk, Any], tuple[tuple[jax.Array, ...], Any]]


def forward(
    step: Step,
    operands: Operands,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    plan: Plan,
    *,
    name: str,
    keep_states: bool = False,
) -> tuple[tuple[jax.Array, ...], Any]:
    """Runs `step` over all chunks.

    Args:
        outputs: shape [N, T, D] and dtype of each output.
        keep_states: return, in place of the outputs, the state before each chunk (with
            `plan.remake` before each grid step), [N, T / C, A, D] for each array of the state.

    Returns:
        The outputs and the last state.
    """
    number, blocks = _grid(operands, plan)
    specs = _Specs(operands, plan, blocks, reverse=False)
    state = jax.tree.leaves(operands.state)
    if keep_states:
        kept = blocks * (1 if plan.remake else plan.chunks)
        outputs = tuple(jax.ShapeDtypeStruct((number, kept, *x.shape[1:]), x.dtype) for x in state)

    def kernel(*refs):
        inputs, outs, scratch = specs.split(refs, len(outputs) + len(state))
        outs, last = outs[: len(outputs)], outs[len(outputs) :]
        time = pl.program_id(1)

        @pl.when(time == 0)
        def _():
            _copy(scratch, jax.tree.leaves(inputs.state))

        def keep(c):
            for out, ref in zip(outs, scratch, strict=True):
                out[:, c] = ref[...]

        if keep_states and plan.remake:
            keep(0)

        def body(c, _):
            chunk, before = specs.load(inputs, c), specs.state(scratch)
            if keep_states and not plan.remake:
                keep(c)
            values, after = step(chunk, before)
            _write(scratch, after)
            if not keep_states:
                specs.store(outs, values, c)

        jax.lax.fori_loop(0, plan.chunks, body, None)

        @pl.when(time == blocks - 1)
        def _():
            _copy(last, scratch)

    out_specs = [(specs.states if keep_states else specs.time)(x) for x in outputs]
    found = pl.pallas_call(
        kernel,
        grid=(number // plan.heads, blocks),
        in_specs=specs.inputs(),
        out_specs=[*out_specs, *map(specs.whole, state)],
        out_shape=[specs.typed(x) for x in (*outputs, *state)],
        scratch_shapes=specs.scratch(),
        compiler_params=_compiler_params(),
        name=f"{name}_{'states' if keep_states else 'forward'}",
    )(*specs.arrays())
    return tuple(found[: len(outputs)]), specs.tree_of_state(found[len(outputs) :])


def backward(
    step: Step,
    operands: Operands,
    cotangents: tuple[tuple[jax.Array, ...], Any],
    plan: Plan,
    *,
    name: str,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...], tuple[jax.Array, ...], Any]:
    """The cotangents of steps, rows, constants and state, from those of outputs and last state."""
    out_cotangents, last_cotangent = cotangents
    outputs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out_cotangents)
    states, _ = forward(step, operands, outputs, plan, name=name, keep_states=True)
    number, blocks = _grid(operands, plan)
    specs = _Specs(operands, plan, blocks, reverse=True)
    state = jax.tree.leaves(operands.state)
    differentiated = (operands.steps, operands.rows, operands.constants, operands.state)
    tree = jax.tree.structure(differentiated)

    def kernel(*refs):
        n, leaves = len(out_cotangents), len(state)
        inputs, rest, scratch = specs.split(refs, n + 2 * leaves + tree.num_leaves)
        d_outs, d_last, kept = rest[:n], rest[n : n + leaves], rest[n + leaves : n + 2 * leaves]
        d_steps, d_rows, d_constants, d_state = jax.tree.unflatten(tree, rest[n + 2 * leaves :])
        scratch, remade = scratch[:leaves], scratch[leaves:]
        time = pl.program_id(1)

        @pl.when(time == 0)
        def _():
            _copy(scratch, d_last)
            for ref in d_constants:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        def before(c):
            if plan.remake:
                return specs.tree_of_state([ref[c] for ref in remade])
            return specs.tree_of_state([ref[:, c] for ref in kept])

        def remake(c, _):
            _, after = step(specs.load(inputs, c), before(c))
            for ref, value in zip(remade, jax.tree.leaves(after), strict=True):
                ref[c + 1] = value

        if plan.remake:
            for ref, first in zip(remade, kept, strict=True):
                ref[0] = first[:, 0]
            jax.lax.fori_loop(0, plan.chunks - 1, remake, None)

        def body(i, _):
            c = plan.chunks - 1 - i
            chunk = specs.load(inputs, c)

            def differentiable(steps, rows, constants, state):
                own = chunk._replace(steps=steps, rows=rows, constants=constants)
                return step(own, state)

            (values, _), pull = jax.vjp(
                differentiable, chunk.steps, chunk.rows, chunk.constants, before(c)
            )
            d_values = tuple(
                specs.read(ref, c).astype(x.dtype) for ref, x in zip(d_outs, values, strict=True)
            )
            steps, rows, constants, d_before = pull((d_values, specs.state(scratch)))
            _write(scratch, d_before)
            specs.store(d_steps, steps, c)
            for ref, value in zip(d_rows, rows, strict=True):
                ref[0, c] = value
            for ref, value in zip(d_constants, constants, strict=True):
                ref[...] += value

        jax.lax.fori_loop(0, plan.chunks, body, None)

        @pl.when(time == blocks - 1)
        def _():
            _copy(jax.tree.leaves(d_state), scratch)

    step_specs = [specs.time(x) for x in operands.steps]
    row_specs = [specs.row(x) for x in operands.rows]
    constant_specs = [specs.whole(x) for x in operands.constants]
    whole = [specs.whole(x) for x in state]
    found = pl.pallas_call(
        kernel,
        grid=(number // plan.heads, blocks),
        in_specs=[
            *specs.inputs(),
            *(specs.time(x) for x in out_cotangents),
            *whole,
            *map(specs.states, states),
        ],
        out_specs=[*step_specs, *row_specs, *constant_specs, *whole],
        out_shape=[specs.typed(x) for x in jax.tree.leaves(differentiated)],
        scratch_shapes=[*specs.scratch(), *(specs.scratch(plan.chunks) if plan.remake else ())],
        compiler_params=_compiler_params(),
        name=f"{name}_backward",
    )(*specs.arrays(), *out_cotangents, *jax.tree.leaves(last_cotangent), *states)
    return jax.tree.unflatten(tree, found)


def _copy(targets, sources) -> None:
    """From references to references."""
    for target, source in zip(targets, sources, strict=True):
        target[...] = source[...]


def _write(targets, state) -> None:
    for target, value in zip(targets, jax.tree.leaves(state), strict=True):
        target[...] = value


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
        self.state_tree = jax.tree.structure(operands.state)
        self.number = operands.steps[0].shape[0]

    def arrays(self) -> list[jax.Array]:
        return jax.tree.leaves(self.operands)

    def inputs(self) -> list[pl.BlockSpec]:
        ops = self.operands
        specs = Operands(
            tuple(map(self.time, ops.steps)),
            tuple(map(self.row, ops.rows)),
            tuple(map(self.whole, ops.constants)),
            jax.tree.map(self.whole, ops.state),
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
        """[N, T / C, A, D], or one a grid step."""
        return pl.BlockSpec(
            (self.plan.heads, x.shape[1] // self.blocks, *x.shape[2:]),
            lambda i, j: (i, self._block(j), 0, 0),
        )

    def row(self, x) -> pl.BlockSpec:
        """[N / H, T / C, H, C], or [B, T / C, S, C] for several programs a batch row."""
        programs = self.number // self.plan.heads // x.shape[0]
        return pl.BlockSpec(
            (1, self.plan.chunks, *x.shape[2:]),
            lambda i, j: (jax.lax.div(i, programs), self._block(j), 0, 0),
        )

    def whole(self, x) -> pl.BlockSpec:
        """[N, A, D], the same at all times."""
        return pl.BlockSpec((self.plan.heads, *x.shape[1:]), lambda i, j: (i, 0, 0))

    def typed(self, x) -> jax.ShapeDtypeStruct:
        """Shape, dtype and, inside shard_map, the mesh axes over which an output differs."""
        own = jax.typeof(jax.tree.leaves(self.operands.state)[0]).manual_axis_type
        return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=own)

    def scratch(self, *lead: int) -> list:
        """Vector memory for the state of a program, [*lead, H, A, D] for each of its arrays."""
        return [
            pltpu.VMEM((*lead, self.plan.heads, *x.shape[1:]), x.dtype)
            for x in jax.tree.leaves(self.operands.state)
        ]

    def tree_of_state(self, arrays) -> Any:
        return jax.tree.unflatten(self.state_tree, arrays)

    def state(self, refs) -> Any:
        """What references to the state's arrays hold."""
        return self.tree_of_state([ref[...] for ref in refs])

    def split(self, refs, count: int):
        """(operands, the `count` references after them, scratch)."""
        n = self.tree.num_leaves
        return jax.tree.unflatten(self.tree, refs[:n]), refs[n : n + count], refs[n + count :]

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
