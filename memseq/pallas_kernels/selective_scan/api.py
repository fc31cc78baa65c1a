"""`selective_scan`: arguments, checks and dispatch."""

import dataclasses

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common import checks
from memseq.pallas_kernels.common.context import splits_time
from memseq.pallas_kernels.common.dispatch import Forms, run
from memseq.pallas_kernels.common.segments import hide_padding, segments
from memseq.pallas_kernels.selective_scan.chunked import chunked
from memseq.pallas_kernels.selective_scan.mosaic_tpu import MOSAIC_TPU
from memseq.pallas_kernels.selective_scan.reference import reference

FORMS = Forms("selective_scan", reference, chunked, MOSAIC_TPU, out_axes=("bth", "bhn"))


def _silent(arguments, _):
    return arguments | {"x": jnp.zeros_like(arguments["x"])}


@splits_time(("x", "dt", "B", "C"), _silent, matrix=False, whole=("A", "D"))
def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """A memory of several numbers a channel, whose rates of decay scale with the step it takes.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,  y_t = C_t . h_t + D x_t

    The selective scan of Mamba (Gu and Dao 2023, arXiv:2312.00752, algorithm 2, with the simplified
    discretisation of B of its code). `chunked` and the kernels never hold an array
    [batch, time, channels, state_dim], forward or backward: memory grows with time by the inputs
    and one state a chunk.

    Args:
        x: what is written, [batch, time, channels], floating.
        dt: step sizes, shaped as x, >= 0 and final (already biased and softplus'ed).
        A: rates, [channels, state_dim], negative for a memory that forgets (values are not looked
            at, and a positive rate grows without bound).
        B: what of the memory is written to, [batch, time, state_dim], or
            [batch, time, groups, state_dim] with channels in as many groups of neighbours.
        C: what of the memory is read, shaped as B.
        D: what of x is added to the output, [channels]; None is nothing.
        initial_state: [batch, channels, state_dim]; None is an empty memory.
        segment_ids: int32 [batch, time]. The memory restarts empty wherever the id changes; the
            initial state continues the first segment. Negative ids are padding: no write, no
            decay, output 0.
        chunk_size: steps taken together by the chunked form and by kernels; changes speed and
            memory only.
        implementation: "auto", or one of `FORMS.available`.

    Returns:
        y as x, and the state after the last step [batch, channels, state_dim], float32 (float64
        if an input is).

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, at trace time.
    """
    checks.check_array("x", x, (None,) * 3, "[batch, time, channels]")
    batch, time, channels = x.shape
    checks.check_array("dt", dt, x.shape, "x's [batch, time, channels]")
    checks.check_array("A", A, (channels, None), "[channels, state_dim]")
    state_dim = A.shape[1]
    groups = _check_map("B", B, batch, time, channels, state_dim)
    checks.check_array("C", C, B.shape, "B's shape")
    if D is not None:
        checks.check_array("D", D, (channels,), "[channels]")
    dtype = checks.state_dtype(x, dt, A, B, C, D, initial_state)
    layout = "[batch, channels, state_dim]"
    state = checks.check_state(initial_state, (batch, channels, state_dim), dtype, layout)
    checks.check_segment_ids(segment_ids, batch, time)
    checks.check_chunk_size(chunk_size)

    B, C = (y.reshape(batch, time, groups, state_dim) for y in (B, C))
    index = None
    if segment_ids is not None:
        valid, index = segments(segment_ids)
        x, dt, B, C = (hide_padding(y, valid) for y in (x, dt, B, C))
    arrays = (x, dt, A, B, C, D, state, index)
    # under a mesh, channels are split together with their groups, or share the only one
    maps = "btgn" if groups == 1 else "bthn"
    forms = dataclasses.replace(FORMS, axes=("bth", "bth", "hn", maps, maps, "h", "bhn", "bt"))
    return run(forms, implementation, time, arrays, chunk_size=chunk_size)


def _check_map(name, x, batch, time, channels, state_dim) -> int:
    """The number of groups."""
    checks.check_floating(name, x)
    if x.shape == (batch, time, state_dim):
        return 1
    if x.ndim != 4 or x.shape != (batch, time, x.shape[2], state_dim):
        raise ValueError(
            f"{name}: expected [batch, time, state_dim] = {[batch, time, state_dim]} or "
            f"[batch, time, groups, state_dim], got shape {list(x.shape)}"
        )
    groups = x.shape[2]
    if groups == 0 or channels % groups:
        raise ValueError(
            f"{name}: the number of its groups must divide the {channels} channels of x, "
            f"got {groups}"
        )
    return groups
