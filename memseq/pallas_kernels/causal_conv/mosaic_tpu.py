"""TPU kernels of `causal_conv`.

A sequence of the kernels is one row of the batch with as many channels as fit, and its memory the
inputs before a chunk, so that a chunk's window is that memory and the chunk. Padding inside a row
is moved out of the way and the last state is taken outside, by XLA, as in the `chunked` form.
`common.mosaic_tpu.recurrence` makes the forward and the backward kernel of the chunk's function.
"""

import functools
import math

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.causal_conv.activations import ACTIVATIONS
from memseq.pallas_kernels.common.dispatch import KernelForm
from memseq.pallas_kernels.common.mosaic_tpu import blocks, recurrence
from memseq.pallas_kernels.common.mosaic_tpu.hardware import LANES, SUBLANES, kernel_dtype
from memseq.pallas_kernels.common.segments import hide_padding

NAME = "causal_conv"
WORK = 2**19  # taps of a chunk: more are a little faster and much slower to compile
BLOCK_SIZE = 2**18  # numbers in a grid step's part of x
ROWS = 16  # in a tile of 16-bit numbers
TAPS = 64


def limit(x, kernel, bias, state, valid, index, **options):
    """Why the kernels cannot run, or None."""
    if kernel.dtype != jnp.float32:
        return f"the kernels compute in float32, got an input of {kernel.dtype}"
    if kernel.shape[0] > TAPS:
        return f"the kernel is {kernel.shape[0]} wide, the TPU kernels take up to {TAPS}"
    return None


def forward(x, kernel, bias, initial_state, valid, index, *, activation):
    """As `chunked`."""
    rows = _Rows(x.shape, kernel.shape[0], valid, index)
    step = functools.partial(_step, width=rows.width, activation=activation)
    dtype = x.dtype
    x = rows.to_front(x.astype(kernel_dtype(dtype)))
    operands = rows.operands(x, kernel, bias, initial_state)
    out = jax.ShapeDtypeStruct(operands.steps[0].shape, x.dtype)
    (y,), _ = recurrence.forward(step, operands, (out,), rows.plan, name=NAME)
    y, last = rows.from_front(rows.from_sequences(y)), rows.last(x, initial_state)
    return y.astype(dtype), last.astype(dtype)


def backward(arrays, cotangents, *, activation):
    """One cotangent for each of `arrays`, None for booleans, integers and None."""
    x, kernel, bias, initial_state, valid, index = arrays
    d_y, d_last = cotangents
    rows = _Rows(x.shape, kernel.shape[0], valid, index)
    step = functools.partial(_step, width=rows.width, activation=activation)

    def differentiable(*arrays):
        made = rows.operands(*arrays)
        return (made.steps, made.rows, made.constants, made.state), made.shared

    dtype = x.dtype
    x = rows.to_front(x.astype(kernel_dtype(dtype)))
    made, pull, shared = jax.vjp(differentiable, x, kernel, bias, initial_state, has_aux=True)
    if valid is not None:
        d_y = hide_padding(d_y, valid)
    operands = recurrence.Operands(*made, (), shared)
    after = jnp.zeros_like(operands.state)  # `last` does not read the memory of the kernels
    d_y = rows.to_sequences(rows.to_front(d_y.astype(x.dtype)))
    found = recurrence.backward(step, operands, ((d_y,), after), rows.plan, name=NAME)
    d_x, d_kernel, d_bias, d_state = pull(found)
    d_x, d_state = rows.add_last(d_last, d_x, d_state)
    return rows.from_front(d_x).astype(dtype), d_kernel, d_bias, d_state, None, None


MOSAIC_TPU = KernelForm(forward, backward, limit)


class _Rows:
    """How a call's arrays become sequences of the kernels, [batch x parts, padded time, lanes]."""

    def __init__(self, shape, width, valid, index):
        self.batch, self.time, self.channels = shape
        self.width = width
        tiles = math.ceil(self.channels / LANES)
        # one part, if all channels fit, needs no transposition outside
        self.parts = math.ceil(tiles * LANES / max(LANES, WORK // (ROWS * max(width, 4))))
        self.lanes = math.ceil(tiles / self.parts) * LANES
        self.plan = _plan(self.time, self.lanes, width)
        # the memory: at least width - 1 inputs, in whole sublanes
        self.tail = math.ceil(max(width - 1, 1) / SUBLANES) * SUBLANES
        self.valid, self.index = valid, index
        if valid is not None:
            self.order = jnp.argsort(~valid, axis=1, stable=True)
            self.rank = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
            source = _take(index, self.order)
            self.source = jnp.pad(source, ((0, 0), (width - 1, 0)))

    def to_front(self, x: jax.Array) -> jax.Array:
        """x [batch, time, channels] with its valid positions first. Zero at padding, it stays so.

        This and `from_front` are each other's transposes: neither needs a scatter.
        """
        return x if self.valid is None else _take(x, self.order)

    def from_front(self, x: jax.Array) -> jax.Array:
        """The inverse, zeros at padding."""
        return x if self.valid is None else hide_padding(_take(x, self.rank), self.valid)

    def last(self, x: jax.Array, initial_state: jax.Array) -> jax.Array:
        """The state after the call; x as `to_front` gives it."""
        if self.valid is None:
            old = max(self.width - 1 - self.time, 0)
            new = self.width - 1 - old
            parts = [initial_state[:, new:], x[:, self.time - new :]]
            return jnp.concatenate(parts, axis=1)
        if self.width == 1:
            return initial_state
        own, old, new = self._places()
        found = jnp.where(
            (old < self.width - 1)[..., None], _take(initial_state, old), _take(x, new)
        )
        return jnp.where(own[..., None], found, 0)

    def add_last(self, d_last: jax.Array, d_x: jax.Array, d_state: jax.Array):
        """d_x and d_state with what `last` gives them, which touches a few rows only."""
        if self.valid is None:
            old = max(self.width - 1 - self.time, 0)
            new = self.width - 1 - old
            d_x = d_x.at[:, self.time - new :].add(d_last[:, old:])
            return d_x, d_state.at[:, new:].add(d_last[:, :old])
        own, old, new = self._places()
        d_last = jnp.where(own[..., None], d_last, 0)
        row = jnp.arange(self.batch)[:, None]
        # a place beyond the end is none
        return d_x.at[row, new].add(d_last, mode="drop"), d_state.at[row, old].add(
            d_last, mode="drop"
        )

    def _places(self):
        """Of each row of the last state whether it is of the last segment, and where it is from.

        int32 [batch, width - 1]: a row of the initial state, or a position of x; the other of the
        two is beyond the end.
        """
        tail = self.width - 1
        places = self.valid.sum(axis=1, keepdims=True) + jnp.arange(tail)
        own = _take(self.source, places) == self.index[:, -1:]
        return own, jnp.minimum(places, tail), jnp.where(places < tail, self.time, places - tail)

    def operands(self, x, kernel, bias, initial_state) -> recurrence.Operands:
        """x as `to_front` gives it."""
        before = initial_state.astype(jnp.float32)
        before = jnp.pad(before, ((0, 0), (self.tail - before.shape[1], 0), (0, 0)))
        weights = kernel if bias is None else jnp.concatenate([kernel, bias[None]])
        weights = jnp.broadcast_to(weights, (self.batch, *weights.shape))
        shared = None if self.valid is None or self.width == 1 else self._reach()
        steps = (self.to_sequences(x),)
        return recurrence.Operands(
            steps, (), (self._split(weights),), self._split(before), (), shared
        )

    def to_sequences(self, x: jax.Array) -> jax.Array:
        """[batch, time, channels] -> [batch x parts, padded time, lanes]."""
        return self._split(jnp.pad(x, ((0, 0), (0, self._missing()), (0, 0))))

    def from_sequences(self, x: jax.Array) -> jax.Array:
        """The inverse."""
        x = x[:, : self.time].reshape(self.batch, self.parts, self.time, self.lanes)
        x = jnp.moveaxis(x, 1, 2).reshape(self.batch, self.time, self.parts * self.lanes)
        return x[..., : self.channels]

    def _split(self, x: jax.Array) -> jax.Array:
        """[batch, n, channels] -> [batch x parts, n, lanes]."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.parts * self.lanes - self.channels)))
        x = x.reshape(self.batch, -1, self.parts, self.lanes)
        return jnp.moveaxis(x, 2, 1).reshape(self.batch * self.parts, -1, self.lanes)

    def _reach(self) -> jax.Array:
        """float32 [batch, chunks, 1, chunk]: how many inputs back a tap of each step may read."""
        tail = self.width - 1
        here = self.source[:, tail:]
        back = (self.source[:, w : w + self.time] == here for w in range(tail))
        reach = jnp.pad(sum(x.astype(jnp.float32) for x in back), ((0, 0), (0, self._missing())))
        return reach.reshape(self.batch, -1, 1, self.plan.chunk)

    def _missing(self) -> int:
        return recurrence.padded_time(self.time, self.plan) - self.time


def _take(x: jax.Array, places: jax.Array) -> jax.Array:
    """x [batch, n, ...] at places [batch, m], those beyond the end clipped."""
    places = places.reshape(*places.shape, *[1] * (x.ndim - 2))
    # without "clip" the compiler passes over everything once more
    return jnp.take_along_axis(x, places, axis=1, mode="clip")


def _plan(time: int, lanes: int, width: int) -> recurrence.Plan:
    def power_of_two(n):  # the next one, so that usual lengths are whole grid steps
        return 1 << (n - 1).bit_length()

    chunk = min(128, power_of_two(WORK // (lanes * max(width, 4))), power_of_two(time))
    chunk = max(ROWS, chunk)
    chunks = min(power_of_two(BLOCK_SIZE // (chunk * lanes)), power_of_two(-(-time // chunk)))
    return recurrence.Plan(chunk, chunks, 1)


def _step(chunk: recurrence.Chunk, state, *, width, activation):
    (x,), (weights,) = chunk.steps, chunk.constants
    window = jnp.concatenate([state, x.astype(jnp.float32)], axis=1)
    length, tail = x.shape[1], state.shape[1]
    reach = None if chunk.shared is None else blocks.columns(chunk.shared)[0]
    y = weights[:, width - 1 : width] * window[:, tail:]
    for back in range(1, width):
        past = window[:, tail - back : tail - back + length]
        if reach is not None:
            past = jnp.where(reach >= back, past, 0)
        y += weights[:, width - 1 - back : width - back] * past
    if weights.shape[1] > width:
        y += weights[:, width:]
    return (ACTIVATIONS[activation](y),), window[:, length:]
