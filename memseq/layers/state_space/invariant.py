"""Time-invariant state spaces over time, one small system a channel, by matrix products.

A system h_t = A h_{t-1} + B x_t, y_t = C . h_t is the same at all steps, so within a chunk y is a
Toeplitz matrix of the taps C A^k B times x, the state at the end another product, and what the
state at the start adds a third. Chunks follow one another. Only the taps of one chunk are ever
formed; there is no convolution as long as the sequence and no FFT, which TPUs are bad at.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memseq.layers.recurrent.step import scan_steps
from memseq.pallas_kernels import linear_scan
from memseq.pallas_kernels.common import context
from memseq.pallas_kernels.common.chunks import chunk_length
from memseq.pallas_kernels.common.segments import hide_padding, segments
from memseq.pallas_kernels.common.sharded import vary_together


class Diagonal(NamedTuple):
    """A = diag(exp(log_decay + i phase)), [channels, modes] each; without a phase A is real.

    A state of real numbers is [..., channels, size]: the real parts of all modes, then the
    imaginary parts.
    """

    log_decay: jax.Array
    phase: jax.Array | None

    def powers(self, exponents: jax.Array) -> jax.Array:
        """A^k for k in `exponents` [...]: [..., channels, modes]."""
        k = exponents.astype(self.log_decay.dtype)[..., None, None]
        kept = jnp.exp(k * self.log_decay)
        if self.phase is None:
            return kept
        return jax.lax.complex(kept * jnp.cos(k * self.phase), kept * jnp.sin(k * self.phase))

    def krylov(self, vector: jax.Array, length: int) -> jax.Array:
        """A^k vector for k = 0, ..., length - 1: [length, channels, size]."""
        return split(self.powers(jnp.arange(length)) * join(vector, self.phase))

    def krylov_transposed(self, vector: jax.Array, length: int) -> jax.Array:
        """(A^T)^k vector, for vectors that read: A^T turns the other way."""
        back = None if self.phase is None else -self.phase
        return Diagonal(self.log_decay, back).krylov(vector, length)

    def advance(self, state: jax.Array, steps: jax.Array, most: int) -> jax.Array:
        """A^steps state, for state [batch, channels, size] and steps int [batch] up to `most`."""
        del most
        return split(self.powers(steps) * join(state, self.phase))


class Dense(NamedTuple):
    """A = matrix, real [channels, size, size]."""

    matrix: jax.Array

    def krylov(self, vector: jax.Array, length: int) -> jax.Array:
        """As `Diagonal.krylov`; `length` is a power of two."""
        found, power = vector[None], self.matrix
        while len(found) < length:
            found = jnp.concatenate([found, jnp.einsum("dnm,kdm->kdn", power, found)])
            power = power @ power
        return found

    def krylov_transposed(self, vector: jax.Array, length: int) -> jax.Array:
        return Dense(self.matrix.mT).krylov(vector, length)

    def advance(self, state: jax.Array, steps: jax.Array, most: int) -> jax.Array:
        """As `Diagonal.advance`, by the binary digits of `steps`."""
        power = self.matrix
        for bit in range(most.bit_length()):
            taken = jnp.einsum("dnm,bdm->bdn", power, state)
            state = jnp.where((steps >> bit & 1)[:, None, None] == 1, taken, state)
            power = power @ power
        return state


def join(parts: jax.Array, phase: jax.Array | None) -> jax.Array:
    """[..., size] of reals to complex numbers [..., size / 2], or as it is without a phase."""
    return parts if phase is None else jax.lax.complex(*jnp.split(parts, 2, axis=-1))


def split(numbers: jax.Array) -> jax.Array:
    """The reverse of `join`."""
    if not jnp.issubdtype(numbers.dtype, jnp.complexfloating):
        return numbers
    return jnp.concatenate([numbers.real, numbers.imag], axis=-1)


def over_time(
    form: Callable[..., tuple[jax.Array, jax.Array]],
    system: Diagonal | Dense,
    write: jax.Array,
    read: jax.Array,
    x: jax.Array,
    state: jax.Array,
    segment_ids: jax.Array | None,
    **options,
) -> tuple[jax.Array, jax.Array]:
    """`form` (`in_chunks` or `step_by_step`), also where time is split over devices.

    A stretch takes a state to A^steps state plus where the stretch leads from an empty one.
    """
    if context.axis() is None:
        return form(system, write, read, x, state, segment_ids, **options)

    def run(state):
        _, state = vary_together((x, state))
        return form(system, write, read, x, state, segment_ids, **options)

    with context.over(None):
        _, added = run(jnp.zeros_like(state))
        valid, index = segments(segment_ids)
    steps = jnp.sum(valid, axis=1, dtype=jnp.int32)

    def after(stretch, state):
        added, steps, through = stretch
        led = system.advance(state, steps, x.shape[1])
        return jnp.where(through[:, None, None], led, 0) + added

    state = context.carried_in(state, (added, steps, index[:, -1] == 0), after, segment_ids)
    with context.over(None):
        y, last = run(state)
    return y, context.at_the_end(last)


def in_chunks(
    system: Diagonal | Dense,
    write: jax.Array,
    read: jax.Array,
    x: jax.Array,
    state: jax.Array,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Runs h_t = A h_{t-1} + write x_t, y_t = read . h_t over time.

    Args:
        system: A, of `channels` systems with states of `size` real numbers.
        write, read: [channels, size].
        x: [batch, time, channels], in the dtype of `state`.
        state: [batch, channels, size], before the first step.
        segment_ids: int32 [batch, time] or None, as the memory operations take them.
        chunk_size: steps taken together; None is the operations' own choice.

    Returns:
        y [batch, time, channels], and the state after the last step.
    """
    batch, time, _ = x.shape
    chunk = chunk_length(chunk_size, time)
    order = index = None
    count = jnp.full((batch,), time, jnp.int32)
    if segment_ids is not None:  # padding to the end: the others are then one stretch of time
        valid, index = segments(segment_ids)
        order = jnp.argsort(~valid, axis=1, stable=True)
        index = jnp.take_along_axis(index, order, axis=1)
        x = jnp.take_along_axis(hide_padding(x, valid), order[..., None], axis=1)
        count = jnp.sum(valid, axis=1, dtype=jnp.int32)

    left = system.krylov_transposed(read, 2 * chunk)  # read . A^k
    into = system.krylov(write, chunk)[::-1]  # A^(chunk - 1 - j) write, for x_j
    taps = jnp.einsum("kdn,dn->kd", left[:chunk], write)
    lag = jnp.arange(chunk)[:, None] - jnp.arange(chunk)
    toeplitz = jnp.where((lag >= 0)[..., None], taps[jnp.maximum(lag, 0)], 0)
    from_start = left[1 : chunk + 1]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(carried, inputs):
        state, last = carried
        x, index, begin = inputs
        filled = jnp.clip(count - begin, 0, chunk)
        old = jnp.einsum("kdn,bdn->bkd", from_start, state)
        taken, through = x, jnp.ones((batch,), bool)
        if index is None:
            y = jnp.einsum("ijd,bjd->bid", toeplitz, x) + old
        else:
            same = index[:, :, None] == index[:, None, :]
            y = jnp.einsum("bij,ijd,bjd->bid", same.astype(x.dtype), toeplitz, x)
            y += jnp.where((index == last[:, None])[..., None], old, 0)
            final = jnp.take_along_axis(index, jnp.maximum(filled - 1, 0)[:, None], axis=1)
            taken = jnp.where((index == final)[..., None], x, 0)
            through = (filled == 0) | (final[:, 0] == last)
            last = jnp.where(filled == 0, last, final[:, 0])
        # the chunk's last steps against the last taps: what comes after is left out
        source = jnp.arange(chunk) - (chunk - filled)[:, None]
        taken = jnp.take_along_axis(taken, jnp.maximum(source, 0)[..., None], axis=1)
        taken = jnp.where((source >= 0)[..., None], taken, 0)
        state = jnp.where(through[:, None, None], system.advance(state, filled, chunk), 0)
        return (state + jnp.einsum("jdn,bjd->bdn", into, taken), last), y

    def cut(x, **padding):
        x = jnp.pad(x, [(0, 0), (0, -time % chunk)] + [(0, 0)] * (x.ndim - 2), **padding)
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    by_chunk = (
        cut(x),
        None if index is None else cut(index, mode="edge"),
        jnp.arange(0, time, chunk),
    )
    first = jnp.zeros_like(count)
    (state, _), y = jax.lax.scan(step, (state, first), by_chunk)
    y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, y.shape[-1])[:, :time]
    if order is not None:
        place = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        y = hide_padding(jnp.take_along_axis(y, place[..., None], axis=1), valid)
    return y, state


def step_by_step(
    system: Diagonal | Dense,
    write: jax.Array,
    read: jax.Array,
    x: jax.Array,
    state: jax.Array,
    segment_ids: jax.Array | None,
    **options,
) -> tuple[jax.Array, jax.Array]:
    """As `in_chunks`, one step after another, over all numbers of the state.

    A diagonal system is `linear_scan` of channels * modes channels, which takes `options`.
    """
    batch, time, channels = x.shape
    if isinstance(system, Dense):

        def step(state, x):
            state = jnp.einsum("dnm,bdm->bdn", system.matrix, state) + x[..., None] * write
            return state, jnp.einsum("dn,bdn->bd", read, state)

        return scan_steps(step, state, x, segment_ids, jnp.zeros_like(state))
    phase = system.phase
    out, last = linear_scan(
        (x[..., None] * join(write, phase)).reshape(batch, time, -1),
        system.log_decay.reshape(-1),
        phase=None if phase is None else phase.reshape(-1),
        initial_state=join(state, phase).reshape(batch, -1),
        segment_ids=segment_ids,
        **options,
    )
    out = split(out.reshape(batch, time, channels, -1))
    return jnp.einsum("dn,btdn->btd", read, out), split(last.reshape(batch, channels, -1))
