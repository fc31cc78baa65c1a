"""How arrays of an elementwise recurrence are cut for its TPU kernels: see `scan`."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memseq.pallas_kernels.common.mosaic_tpu.hardware import (
    LANES,
    SUBLANES,
    VMEM_LIMIT,
    kernel_dtype,
)

KEEP, RESTART, PADDING = range(3)  # what a flag says: go on, empty the memory first, do nothing


class Plan(NamedTuple):
    """How a call is cut. Static.

    steps: time steps of a block, a multiple of 16.
    lanes: channels of a block, a multiple of 128.
    groups: of channels, each with columns of its own; whole blocks.
    """

    steps: int
    lanes: int
    groups: int = 1


class Operands(NamedTuple):
    """The arrays of a call, all differentiated but the flags.

    rows: [B, T, C] each, floating: a number a step and channel.
    columns: float32 [B, groups, T / steps, A, steps] each: A numbers a step, time on the lanes.
    constants: float32 [C / lanes, any, lanes] each, which do not change over time.
    state: float32 [B, C / lanes, A, lanes] each.
    flags: int32 [B, T / steps, 1, steps], or None where all are KEEP.
    """

    rows: tuple[jax.Array, ...]
    columns: tuple[jax.Array, ...]
    constants: tuple[jax.Array, ...]
    state: tuple[jax.Array, ...]
    flags: jax.Array | None = None


def lanes_for(channels: int, most: int) -> int:
    """Channels of a block: up to `most`, and a divisor of `channels` rounded up to whole tiles.

    A power of two where it is not much less: a register holds 8 tiles of a row.
    """
    tiles = math.ceil(channels / LANES)
    divisors = [d for d in range(1, most // LANES + 1) if tiles % d == 0]
    power = max(d for d in divisors if d & (d - 1) == 0)
    return LANES * (power if 2 * power > max(divisors) else max(divisors))


def steps_for(time: int, most: int) -> int:
    """Steps of a block: a power of two up to `most`, at least a whole tile of 16-bit numbers."""
    return 1 << min(math.ceil(math.log2(max(time, 16))), int(math.log2(max(most, 16))))


def padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """x with zeros at the end of `axis`."""
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis % x.ndim else 0) for i in range(x.ndim)])


def to_rows(x: jax.Array, plan: Plan) -> jax.Array:
    """[B, T, C] with zeros up to whole blocks of time, and of channels within each group."""
    channels = x.shape[2]
    x = padded(x.astype(kernel_dtype(x.dtype)), 1, plan.steps)
    x = padded(x.reshape(*x.shape[:2], plan.groups, channels // plan.groups), 3, plan.lanes)
    return x.reshape(*x.shape[:2], -1)


def from_rows(x: jax.Array, plan: Plan, time: int, channels: int) -> jax.Array:
    """The inverse, but for the dtype."""
    x = x[:, :time].reshape(x.shape[0], time, plan.groups, -1)
    return x[..., : channels // plan.groups].reshape(x.shape[0], time, channels)


def to_columns(x: jax.Array, plan: Plan) -> jax.Array:
    """[B, T, groups, A] -> float32 [B, groups, T / steps, A, steps], A in whole tiles."""
    x = padded(padded(x.astype(jnp.float32), 1, plan.steps), 3, SUBLANES)
    x = x.reshape(x.shape[0], -1, plan.steps, *x.shape[2:])
    return jnp.transpose(x, (0, 3, 1, 4, 2))


def to_blocks(x: jax.Array, plan: Plan) -> jax.Array:
    """[..., A, C] -> float32 [..., C / lanes, A, lanes], C padded within each group."""
    *lead, rows, channels = x.shape
    x = x.astype(jnp.float32).reshape(*lead, rows, plan.groups, channels // plan.groups)
    x = padded(x, -1, plan.lanes).reshape(*lead, rows, -1, plan.lanes)
    return jnp.moveaxis(x, -3, -2)


def from_blocks(x: jax.Array, plan: Plan, rows: int, channels: int) -> jax.Array:
    """The inverse, with the first `rows` of A."""
    x = jnp.moveaxis(x, -2, -3)[..., :rows, :, :]
    x = x.reshape(*x.shape[:-2], plan.groups, -1)[..., : channels // plan.groups]
    return x.reshape(*x.shape[:-2], channels)


def to_flags(restart: jax.Array, valid: jax.Array, plan: Plan) -> jax.Array:
    """bool [B, T] each -> flags; time beyond the end is padding."""
    flags = jnp.where(valid, jnp.where(restart, RESTART, KEEP), PADDING).astype(jnp.int32)
    missing = -flags.shape[1] % plan.steps
    flags = jnp.pad(flags, ((0, 0), (0, missing)), constant_values=PADDING)
    return flags.reshape(flags.shape[0], -1, 1, plan.steps)


class Specs:
    """Block specifications and scratch of one kernel, whose grid is (B, groups, time, lanes)."""

    def __init__(self, operands: Operands, plan: Plan, reverse: bool):
        self.operands, self.plan, self.reverse = operands, plan, reverse
        batch, time, channels = operands.rows[0].shape
        self.blocks = time // plan.steps  # of time
        self.parts = channels // plan.lanes // plan.groups  # blocks of channels in a group
        self.grid = (batch, plan.groups, self.blocks, self.parts)

    def _time(self, t):
        return self.blocks - 1 - t if self.reverse else t

    def row(self, x) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, self.plan.steps, self.plan.lanes),
            lambda b, g, t, c: (b, self._time(t), g * self.parts + c),
        )

    def column(self, x) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, 1, *x.shape[3:]), lambda b, g, t, c: (b, g, self._time(t), 0, 0))

    def constant(self, x) -> pl.BlockSpec:
        """All of a group's, so that they are read once."""
        return pl.BlockSpec((self.parts, *x.shape[1:]), lambda b, g, t, c: (g, 0, 0))

    def state(self, x) -> pl.BlockSpec:
        """[B, C / lanes, ...], all of a group's."""
        return pl.BlockSpec((1, self.parts, *x.shape[2:]), lambda b, g, t, c: (b, g, 0, 0))

    def kept(self, x) -> pl.BlockSpec:
        """[B, T / steps, C / lanes, A, lanes]."""
        return pl.BlockSpec(
            (1, 1, 1, *x.shape[3:]),
            lambda b, g, t, c: (b, self._time(t), g * self.parts + c, 0, 0),
        )

    def flag(self, x) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, 1, *x.shape[2:]),
            lambda b, g, t, c: (b, self._time(t), 0, 0),
            memory_space=pltpu.SMEM,
        )

    def inputs(self) -> Operands:
        ops = self.operands
        return Operands(
            tuple(map(self.row, ops.rows)),
            tuple(map(self.column, ops.columns)),
            tuple(map(self.constant, ops.constants)),
            tuple(map(self.state, ops.state)),
            None if ops.flags is None else self.flag(ops.flags),
        )

    def typed(self, shape, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        """An output and, inside shard_map, the mesh axes over which it differs."""
        own = jax.typeof(self.operands.state[0]).manual_axis_type
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=own)

    def carried(self, x):
        """Scratch for a state of all channels of a group."""
        return pltpu.VMEM((self.parts, *x.shape[2:]), jnp.float32)

    def history(self, x):
        """Scratch for a state at each step of a block. One row a step would fill whole tiles."""
        rows = x.shape[2:-1] if x.shape[2] > 1 else ()
        return pltpu.VMEM((self.plan.steps, *rows, self.plan.lanes), jnp.float32)

    def spread(self, x):
        """Scratch for a column over all lanes of a tile, for each step of a block."""
        return pltpu.VMEM((self.plan.steps, x.shape[3], LANES), jnp.float32)

    def widened(self, x):
        """Scratch for a block of rows in float32: single rows of 16-bit arrays have no address."""
        if x.dtype == jnp.float32:
            return None
        return pltpu.VMEM((self.plan.steps, self.plan.lanes), jnp.float32)

    def call(self, kernel, name, *, outputs, out_specs, scratch, extra=(), extra_specs=()):
        """kernel(operands, *extra, outputs, scratch), all of them trees, as a Pallas call."""
        inputs = (self.operands, *extra)
        shapes, tree = jax.tree.flatten(outputs)
        scratch, scratch_tree = jax.tree.flatten(scratch)
        structure = jax.tree.structure(inputs)

        def flat(*refs):
            ends = structure.num_leaves, structure.num_leaves + len(shapes)
            kernel(
                *jax.tree.unflatten(structure, refs[: ends[0]]),
                jax.tree.unflatten(tree, refs[ends[0] : ends[1]]),
                jax.tree.unflatten(scratch_tree, refs[ends[1] :]),
            )

        def is_spec(x):
            return isinstance(x, pl.BlockSpec)

        found = pl.pallas_call(
            flat,
            grid=self.grid,
            in_specs=jax.tree.leaves((self.inputs(), *extra_specs), is_leaf=is_spec),
            out_specs=jax.tree.leaves(out_specs, is_leaf=is_spec),
            out_shape=shapes,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=VMEM_LIMIT,
            ),
            name=name,
        )(*jax.tree.leaves(inputs))
        return jax.tree.unflatten(tree, found)
