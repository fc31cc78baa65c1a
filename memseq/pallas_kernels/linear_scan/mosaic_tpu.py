"""TPU kernels of `linear_scan`.

A complex array is two real ones. What a step keeps is a product of up to three factors: gates that
do not change over time, signs and phases of a step (both made outside, where the kernels' cotangent
of them is taken on), and the exponential of a step's log decay, taken in the kernel.
"""

import functools

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.dispatch import KernelForm
from memseq.pallas_kernels.common.mosaic_tpu import scan
from memseq.pallas_kernels.common.mosaic_tpu import scan_blocks as blocks
from memseq.pallas_kernels.common.mosaic_tpu.hardware import kernel_dtype
from memseq.pallas_kernels.common.segments import restarts
from memseq.pallas_kernels.linear_scan.gates import out_dtype, transition

NAME = "linear_scan"
LANES = 1024  # channels of a block at most: a row of them fills a register
BLOCK = 2**18  # numbers of a block


def limit(x, log_decay, sign, phase, state, index, valid, **options):
    """Why the kernels cannot run, or None."""
    if jnp.finfo(state.dtype).bits != 32:
        return f"the kernels compute in float32, the state of these inputs is {state.dtype}"
    return None


def forward(*arrays, chunk_size=None):
    """As `chunked`."""
    return scan.forward(_call(arrays, chunk_size), arrays)


def backward(arrays, cotangents, *, chunk_size=None):
    """One cotangent for each of `arrays`, None for `index`, `valid` and None."""
    return scan.backward(_call(arrays, chunk_size), arrays, cotangents)


MOSAIC_TPU = KernelForm(forward, backward, limit)


def _call(arrays, chunk_size) -> scan.Call:
    x, log_decay, sign, phase, state, _, _ = arrays
    _, time, channels = x.shape
    lanes = blocks.lanes_for(channels, LANES)
    steps = blocks.steps_for(time, BLOCK // lanes if chunk_size is None else chunk_size)
    plan = blocks.Plan(steps, lanes)
    changing = [gate is not None and gate.ndim == 3 for gate in (log_decay, sign, phase)]
    parts = 2 if jnp.iscomplexobj(state) else 1
    dtype = out_dtype(x, state.dtype)
    by_part = jnp.dtype(jnp.float32) if parts == 2 else kernel_dtype(dtype)

    def outputs(outs, states):
        out = _joined([blocks.from_rows(y, plan, time, channels) for y in outs])
        return out.astype(dtype), _joined(
            [blocks.from_blocks(s, plan, 1, channels)[:, 0] for s in states]
        )

    def cotangents(d_out, d_state):
        # JAX's cotangent of a complex number is the conjugate of the gradient in its two parts
        d_out, d_state = (_parts(d.conj()) for d in (d_out, d_state))
        return (
            tuple(blocks.to_rows(d, plan) for d in d_out),
            tuple(blocks.to_blocks(d[:, None], plan) for d in d_state),
        )

    return scan.Call(
        NAME,
        functools.partial(_step, parts=2 if jnp.iscomplexobj(x) else 1, decays=changing[0]),
        functools.partial(_operands, plan=plan),
        outputs,
        cotangents,
        (by_part,) * parts,
        plan,
    )


def _operands(arrays, *, plan) -> blocks.Operands:
    x, log_decay, sign, phase, state, index, valid = arrays
    batch, time, channels = x.shape
    changing, fixed = ([None] * 3 for _ in range(2))
    for i, gate in enumerate((log_decay, sign, phase)):
        if gate is not None:
            (fixed if gate.ndim == 1 else changing)[i] = gate
    decay, *turns = changing
    rows = _parts(x)
    if decay is not None:
        rows.append(decay)
    if turns != [None, None]:
        rows += _factor(jnp.zeros((1, 1, channels)), *turns)
    constants = []
    if fixed != [None] * 3:
        log = jnp.zeros(channels) if fixed[0] is None else fixed[0]
        constants = _factor(log, *fixed[1:])
    flags = None
    # a step's log decay is 0 beyond the end of time, and so keeps all; other factors do not
    if index is not None or ((constants or turns != [None, None]) and time % plan.steps):
        valid = jnp.ones((batch, time), bool) if index is None else valid
        restart = jnp.zeros((batch, time), bool) if index is None else restarts(index)
        flags = blocks.to_flags(restart, valid, plan)
    return blocks.Operands(
        tuple(blocks.to_rows(y, plan) for y in rows),
        (),
        tuple(blocks.to_blocks(y[None], plan) for y in constants),
        tuple(blocks.to_blocks(s[:, None], plan) for s in _parts(state)),
        flags,
    )


def _factor(log_decay, sign, phase) -> list[jax.Array]:
    return _parts(
        transition(log_decay, sign, phase, jnp.float32 if phase is None else jnp.complex64)
    )


def _step(rows, columns, constants, state, flag, *, parts, decays):
    x, others = rows[:parts], rows[parts:]
    kept = constants
    if decays:
        log_decay, *others = others
        kept = _product(kept, (jnp.exp(log_decay),))
    kept = _product(kept, tuple(others))
    if flag is not None:
        kept = tuple(
            jnp.where(flag == blocks.PADDING, neutral, k)
            for k, neutral in zip(kept, (1.0, 0.0), strict=False)
        )
        state = tuple(jnp.where(flag == blocks.RESTART, 0.0, s) for s in state)
    moved = _product(kept, state)
    x += (0.0,) * (len(moved) - len(x))
    state = tuple(m + y for m, y in zip(moved, x, strict=True))
    return state, state


def _product(a: tuple, b: tuple) -> tuple:
    """Of numbers given by their parts: none (the number 1), one (real) or two (complex)."""
    if not a or not b:
        return a or b
    if len(a) == 2 and len(b) == 2:
        return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]
    if len(a) == 2:
        a, b = b, a
    return tuple(a[0] * y for y in b)


def _parts(x: jax.Array) -> list[jax.Array]:
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _joined(parts: list[jax.Array]) -> jax.Array:
    return jax.lax.complex(*parts) if len(parts) == 2 else parts[0]
