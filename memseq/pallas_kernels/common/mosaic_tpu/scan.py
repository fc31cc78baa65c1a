"""Pallas TPU kernels of elementwise recurrences, forward and backward, from the function of a step.

A recurrence whose state has the channels as its last axis is one pure function of one time step,

    step(rows, columns, constants, state, flag) -> (outputs, new state),

where a row is a number for each channel, [1, lanes], and a column a number for each of the A rows
of the state, the same for all channels, given as [A, lanes]. A kernel keeps the state of all
channels in VMEM and walks over blocks of time, in each over blocks of channels, in each over the
steps. Arrays stay [batch, time, channels] as the rest of a program has them: the compiler packs a
row of 1024 channels into one full register, so that no transposed copy in HBM is needed for that.

`backward` first walks forward once more to keep the state before each block of time, then from the
last block to the first: it takes the block's steps again, keeps their states in VMEM, and
differentiates `step` where it stands. The derivative is traced into the kernel, so that a value and
its gradients cannot drift apart.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from memseq.pallas_kernels.common.mosaic_tpu.hardware import operands_vjp
from memseq.pallas_kernels.common.mosaic_tpu.scan_blocks import (
    LANES,
    SUBLANES,
    Operands,
    Plan,
    Specs,
)

UNROLL = 8  # steps that a loop's body takes: their places in a tile are then known


class Call(NamedTuple):
    """One call of an operation.

    step: see above; all its arrays are float32, the flag an int32 scalar or None.
    operands: the operation's arrays -> Operands.
    outputs: (outputs [B, T, C], states as in Operands) -> the operation's results.
    cotangents: the transpose of `outputs`, which is linear.
    dtypes: of the outputs.
    """

    name: str
    step: Callable[..., tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]
    operands: Callable[[tuple], Operands]
    outputs: Callable[[tuple, tuple], Any]
    cotangents: Callable[..., tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]
    dtypes: tuple[jnp.dtype, ...]
    plan: Plan


def forward(call: Call, arrays: tuple) -> Any:
    """The operation's results."""
    return call.outputs(*_forward(call, call.operands(arrays), keep_states=False))


def backward(call: Call, arrays: tuple, cotangents: Any) -> tuple:
    """A cotangent for each of `arrays`, None for integers, booleans and None."""

    def operands(arrays):
        made = call.operands(arrays)
        return made[:-1], made.flags

    made, pull, flags = operands_vjp(operands, arrays)
    return pull(_backward(call, Operands(*made, flags), *call.cotangents(*cotangents)))


def _forward(call: Call, operands: Operands, keep_states: bool) -> tuple[tuple, tuple]:
    """(outputs, last states), or (the states before each block [B, T / steps, ...], last)."""
    specs = Specs(operands, call.plan, reverse=False)
    shape = operands.rows[0].shape
    outputs = tuple(specs.typed(shape, dtype) for dtype in call.dtypes)
    if keep_states:
        outputs = tuple(specs.typed((shape[0], specs.blocks, *x.shape[1:])) for x in operands.state)
    scratch = {
        "state": [specs.carried(x) for x in operands.state],
        "columns": [specs.spread(x) for x in operands.columns],
        "rows": [specs.widened(x) for x in operands.rows],
        "outputs": [None if keep_states else specs.widened(x) for x in outputs],
    }

    def kernel(inputs, results, scratch):
        outs, last = results
        part = pl.program_id(3)

        @pl.when(pl.program_id(2) == 0)
        def _():
            for own, ref in zip(scratch["state"], inputs.state, strict=True):
                own[part] = ref[0, part]

        block = _Block(call, inputs, scratch, part)
        state = tuple(own[part] for own in scratch["state"])
        if keep_states:
            for ref, value in zip(outs, state, strict=True):
                ref[0, 0, 0] = value
        rows = () if keep_states else _float32(outs, scratch["outputs"])

        def one(t, state):
            values, state = block.step(t, state)
            if rows:
                _store(rows, values, t)
            return state

        state = _each_step(call.plan, one, state)
        for own, value in zip(scratch["state"], state, strict=True):
            own[part] = value
        _round(outs, scratch["outputs"])

        @pl.when(pl.program_id(2) == specs.blocks - 1)
        def _():
            for ref, value in zip(last, state, strict=True):
                ref[0, part] = value

    return specs.call(
        kernel,
        f"{call.name}_{'states' if keep_states else 'forward'}",
        outputs=(outputs, tuple(specs.typed(x.shape) for x in operands.state)),
        out_specs=(
            tuple(map(specs.kept if keep_states else specs.row, outputs)),
            tuple(map(specs.state, operands.state)),
        ),
        scratch=scratch,
    )


def _backward(call: Call, operands: Operands, d_outputs: tuple, d_last: tuple) -> tuple:
    """The cotangents of rows, columns, constants and state."""
    kept, _ = _forward(call, operands, keep_states=True)
    specs = Specs(operands, call.plan, reverse=True)
    scratch = {
        "columns": [specs.spread(x) for x in operands.columns],
        "rows": [specs.widened(x) for x in operands.rows],
        "history": [specs.history(x) for x in operands.state],
        "d_outputs": [specs.widened(x) for x in d_outputs],
        "d_rows": [specs.widened(x) for x in operands.rows],
        "d_columns": [specs.spread(x) for x in operands.columns],
        "d_state": [specs.carried(x) for x in operands.state],
    }

    def kernel(inputs, d_outs, d_last, kept, found, scratch):
        d_rows, d_columns, d_constants, d_state = found
        part = pl.program_id(3)

        @pl.when(pl.program_id(2) == 0)
        def _():
            for own, ref in zip(scratch["d_state"], d_last, strict=True):
                own[part] = ref[0, part]
            for ref in d_constants:
                ref[0, part] = jnp.zeros(ref.shape[2:], ref.dtype)

        @pl.when(part == 0)
        def _():
            for own in scratch["d_columns"]:
                own[...] = jnp.zeros(own.shape, own.dtype)

        block = _Block(call, inputs, scratch, part)

        def again(t, state):
            for own, value in zip(scratch["history"], state, strict=True):
                own[_at(own, t)] = value
            return block.step(t, state)[1]

        _each_step(call.plan, again, tuple(ref[0, 0, 0] for ref in kept))
        d_values = _read(d_outs, scratch["d_outputs"])
        d_steps = _float32(d_rows, scratch["d_rows"])

        def one(t, carry):
            d_now, d_sums = carry
            before = tuple(own[_at(own, t)] for own in scratch["history"])
            pull = block.derivative(t, before)
            d_row, d_column, d_constant, d_now = pull((_load(d_values, t), d_now))
            _store(d_steps, d_row, t)
            for own, value in zip(scratch["d_columns"], d_column, strict=True):
                own[t] += value
            return d_now, tuple(a + b for a, b in zip(d_sums, d_constant, strict=True))

        carry = (
            tuple(own[part] for own in scratch["d_state"]),
            tuple(ref[0, part] for ref in d_constants),
        )
        d_before, d_sums = _each_step(call.plan, one, carry, reverse=True)
        for own, value in zip(scratch["d_state"], d_before, strict=True):
            own[part] = value
        for ref, value in zip(d_constants, d_sums, strict=True):
            ref[0, part] = value
        _round(d_rows, scratch["d_rows"])

        @pl.when(part == specs.parts - 1)
        def _():
            for own, ref in zip(scratch["d_columns"], d_columns, strict=True):
                _add_up_lanes(own, ref)

        @pl.when(pl.program_id(2) == specs.blocks - 1)
        def _():
            for ref, value in zip(d_state, d_before, strict=True):
                ref[0, part] = value

    batch = operands.rows[0].shape[0]
    rows, columns, constants, state = (
        tuple(specs.typed(x.shape, x.dtype) for x in group) for group in operands[:-1]
    )
    constants = tuple(specs.typed((batch, *x.shape)) for x in constants)
    rows, columns, constants, state = specs.call(
        kernel,
        f"{call.name}_backward",
        extra=(d_outputs, d_last, kept),
        extra_specs=tuple(
            tuple(map(spec, group))
            for spec, group in (
                (specs.row, d_outputs),
                (specs.state, d_last),
                (specs.kept, kept),
            )
        ),
        outputs=(rows, columns, constants, state),
        out_specs=tuple(
            tuple(map(spec, group))
            for spec, group in (
                (specs.row, rows),
                (specs.column, columns),
                (specs.state, constants),
                (specs.state, state),
            )
        ),
        scratch=scratch,
    )
    return rows, columns, tuple(x.sum(axis=0) for x in constants), state


class _Block:
    """The steps of one block of time and channels inside a kernel."""

    def __init__(self, call: Call, inputs: Operands, scratch: dict, part):
        @pl.when(part == 0)
        def _():
            for ref, own in zip(inputs.columns, scratch["columns"], strict=True):
                _spread_lanes(ref, own)

        self.call, self.flags = call, inputs.flags
        self.columns = scratch["columns"]
        self.rows = _read(inputs.rows, scratch["rows"])
        self.constants = tuple(ref[part] for ref in inputs.constants)

    def _inputs(self, t):
        flag = None if self.flags is None else self.flags[0, 0, 0, t]
        columns = tuple(own[t] for own in self.columns)
        return _load(self.rows, t), columns, self.constants, flag

    def _step(self, rows, columns, constants, state, flag):
        tiles = self.call.plan.lanes // LANES
        columns = tuple(jnp.concatenate([x] * tiles, axis=1) for x in columns)
        return self.call.step(rows, columns, constants, state, flag)

    def step(self, t, state):
        """(outputs, state after step t)."""
        *arrays, flag = self._inputs(t)
        return self._step(*arrays, state, flag)

    def derivative(self, t, state):
        """(cotangents of outputs, of the new state) -> those of rows, columns, constants, state."""
        *arrays, flag = self._inputs(t)
        return jax.vjp(lambda *xs: self._step(*xs, flag), *arrays, state)[1]


def _each_step(plan: Plan, one: Callable, carry: Any, reverse: bool = False) -> Any:
    """carry = one(t, carry) for all steps of a block."""

    def some(i, carry):
        i = plan.steps // UNROLL - 1 - i if reverse else i
        first = pl.multiple_of(i * UNROLL, UNROLL)
        for k in reversed(range(UNROLL)) if reverse else range(UNROLL):
            carry = one(first + k, carry)
        return carry

    return jax.lax.fori_loop(0, plan.steps // UNROLL, some, carry)


def _float32(refs, scratch) -> tuple:
    """The block's rows, [steps, lanes] each, where single steps can be addressed."""
    return tuple(ref.at[0] if own is None else own for ref, own in zip(refs, scratch, strict=True))


def _read(refs, scratch) -> tuple:
    """As `_float32`, with the values."""
    for ref, own in zip(refs, scratch, strict=True):
        if own is not None:
            own[...] = ref[0].astype(own.dtype)
    return _float32(refs, scratch)


def _round(refs, scratch) -> None:
    """Writes what was stored in scratch."""
    for ref, own in zip(refs, scratch, strict=True):
        if own is not None:
            ref[0] = own[...].astype(ref.dtype)


def _load(refs, t) -> tuple:
    return tuple(ref[pl.ds(t, 1), :] for ref in refs)


def _store(refs, values, t) -> None:
    for ref, value in zip(refs, values, strict=True):
        ref[pl.ds(t, 1), :] = value


def _at(history, t):
    """The index of step t, which gives [A, lanes]."""
    return t if len(history.shape) == 3 else pl.ds(t, 1)


def _spread_lanes(ref, own) -> None:
    """Columns [1, 1, 1, A, steps] -> [steps, A, LANES]."""
    values = ref[0, 0, 0]
    lane = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)

    def some(i, _):
        first = i * SUBLANES
        columns = (
            jnp.sum(jnp.where(lane == first + k, values, 0), axis=1, keepdims=True)
            for k in range(SUBLANES)
        )
        spread = [jnp.broadcast_to(x, own.shape[1:]) for x in columns]
        own[pl.ds(first, SUBLANES)] = jnp.stack(spread)

    jax.lax.fori_loop(0, own.shape[0] // SUBLANES, some, None)


def _add_up_lanes(own, ref) -> None:
    """The transpose: [steps, A, LANES] -> columns."""
    shape = ref.shape[3:]
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    def some(i, found):
        first = i * SUBLANES
        sums = jnp.sum(own[pl.ds(first, SUBLANES)], axis=2, keepdims=True)
        for k in range(SUBLANES):
            found = jnp.where(lane == first + k, sums[k], found)
        return found

    columns = jax.lax.fori_loop(0, own.shape[0] // SUBLANES, some, jnp.zeros(shape, ref.dtype))
    ref[0, 0, 0] = columns
