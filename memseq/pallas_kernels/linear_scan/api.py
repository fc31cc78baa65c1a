"""`linear_scan`: arguments, checks and dispatch."""

import dataclasses

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common import checks
from memseq.pallas_kernels.common.context import splits_time
from memseq.pallas_kernels.common.dispatch import Forms, run
from memseq.pallas_kernels.common.segments import hide_padding, segments
from memseq.pallas_kernels.linear_scan.chunked import chunked
from memseq.pallas_kernels.linear_scan.mosaic_tpu import MOSAIC_TPU
from memseq.pallas_kernels.linear_scan.reference import reference

FORMS = Forms("linear_scan", reference, chunked, MOSAIC_TPU, out_axes=("bth", "bh"))


def _silent(arguments, _):
    return arguments | {"x": jnp.zeros_like(arguments["x"])}


@splits_time(("x", "log_decay", "sign", "phase"), _silent, matrix=False)
def linear_scan(
    x: jax.Array,
    log_decay: jax.Array,
    *,
    sign: jax.Array | None = None,
    phase: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """A vector memory: every channel keeps a part of itself and adds its input.

        h_t = a_t h_{t-1} + x_t,  a_t = sign_t exp(log_decay_t + i phase_t),  out_t = h_t

    The linear recurrence of Martin and Cundy 2018 (arXiv:1709.04057, section 2). With constant
    decays and phases LRU (Orvieto et al. 2023, arXiv:2303.06349), S4D and S5; with gates that
    depend on the input RG-LRU (De et al. 2024, arXiv:2402.19427), HGRN and minGRU.

    Args:
        x: what is written, [batch, time, channels], floating or complex. Gates that multiply the
            input are multiplied into it outside.
        log_decay: natural logarithm of |a|, finite and <= 0: [channels] or
            [batch, time, channels].
        sign: a real factor of a, shaped [channels] or [batch, time, channels], with values in
            [-1, 1] (they are not looked at): -1 gives negative eigenvalues, 0 forgets everything.
            None is 1.
        phase: angle that the memory turns by in a step, in radians, shaped [channels] or
            [batch, time, channels]. None turns nothing.
        initial_state: [batch, channels], complex only if the state is; None is an empty memory.
        segment_ids: int32 [batch, time]. The memory restarts empty wherever the id changes; the
            initial state continues the first segment. Negative ids are padding: no write, no
            decay, output 0.
        chunk_size: steps taken together by the chunked form and by kernels; changes speed only.
        implementation: "auto", or one of `FORMS.available`.

    Returns:
        out, the states at all steps [batch, time, channels], and the last one [batch, channels].
        With a phase or a complex x both are complex: out complex64 (complex128 for an x of 64-bit
        parts), the state complex64 (complex128 if an input is float64 or complex128). Else out
        has x's dtype and the state is float32 (float64 if an input is).

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, at trace time.
    """
    _check_values("x", x, (None,) * 3, "[batch, time, channels]")
    batch, time, channels = x.shape
    for name, gate in (("log_decay", log_decay), ("sign", sign), ("phase", phase)):
        if gate is not None or name == "log_decay":
            _check_gate(name, gate, batch, time, channels)
    turning = phase is not None or _is_complex(x)
    if initial_state is not None:
        _check_values("initial_state", initial_state, (batch, channels), "[batch, channels]")
        if _is_complex(initial_state) and not turning:
            raise ValueError(
                "initial_state: expected a real array, as x is real and there is no phase, "
                f"got dtype {initial_state.dtype}"
            )
    checks.check_segment_ids(segment_ids, batch, time)
    checks.check_chunk_size(chunk_size)

    inputs = [y for y in (x, log_decay, sign, phase, initial_state) if y is not None]
    wide = any(jnp.finfo(y.dtype).bits == 64 for y in inputs)
    dtype = jnp.dtype(jnp.float64 if wide else jnp.float32)
    if turning:
        dtype = jnp.dtype(jnp.complex128 if wide else jnp.complex64)
    if initial_state is None:
        initial_state = jnp.zeros((batch, channels), dtype)

    index = valid = None
    if segment_ids is not None:
        valid, index = segments(segment_ids)
        # the forms keep the memory at padding, whatever the gates are there
        x, log_decay, sign, phase = (
            hide_padding(y, valid) if y is not None and y.ndim == 3 else y
            for y in (x, log_decay, sign, phase)
        )
    arrays = (x, log_decay, sign, phase, initial_state.astype(dtype), index, valid)
    gates = ("h" if gate is None or gate.ndim == 1 else "bth" for gate in (log_decay, sign, phase))
    forms = dataclasses.replace(FORMS, axes=("bth", *gates, "bh", "bt", "bt"))
    out, state = run(forms, implementation, time, arrays, chunk_size=chunk_size)
    return hide_padding(out, valid) if valid is not None else out, state


def _is_complex(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def _check_values(name: str, x: jax.Array, shape: tuple[int | None, ...], layout: str) -> None:
    """As `check_array`, for arrays that may be complex."""
    if hasattr(x, "dtype") and hasattr(x, "shape") and _is_complex(x):
        x = jax.ShapeDtypeStruct(x.shape, jnp.finfo(x.dtype).dtype)
    checks.check_array(name, x, shape, layout)


def _check_gate(name: str, gate: jax.Array, batch: int, time: int, channels: int) -> None:
    checks.check_floating(name, gate)
    if gate.shape not in ((channels,), (batch, time, channels)):
        raise ValueError(
            f"{name}: expected [channels] = [{channels}] or [batch, time, channels] = "
            f"{[batch, time, channels]}, got shape {list(gate.shape)}"
        )
