"""`log_linear_attention`: arguments, checks and dispatch."""

import functools
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp

from memseq.pallas_kernels.common import checks, context
from memseq.pallas_kernels.common.dispatch import Forms, run
from memseq.pallas_kernels.common.segments import hide_padding, segments
from memseq.pallas_kernels.log_linear_attention.across import across
from memseq.pallas_kernels.log_linear_attention.chunked import chunked
from memseq.pallas_kernels.log_linear_attention.levels import positions
from memseq.pallas_kernels.log_linear_attention.reference import reference

FORMS = Forms("log_linear_attention", reference, chunked)


class LogLinearState(NamedTuple):
    """Memories of growing stretches of the past.

    memories: [batch, heads, levels - 1, key_dim, value_dim]: of levels 1, 2, ... of the next step.
        A level is empty where its bit of `position` is 0, but for the last, which holds all that
        is older.
    position: int32 [batch], steps of the segment so far.
    """

    memories: jax.Array
    position: jax.Array


jax.export.register_namedtuple_serialization(
    LogLinearState, serialized_name="memseq.pallas_kernels.LogLinearState"
)


@context.splits_time(
    ("query", "key", "value", "level_scale", "log_decay", "beta"), silent=None, matrix=True
)
def log_linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    level_scale: jax.Array,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: LogLinearState | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, LogLinearState]:
    """Memories of the last 1, 2, 4, ... steps, each with a weight of its own at every read.

    With S^(l)_t the memory of what level l holds at step t,

        out_t = scale sum_l level_scale_tl S^(l)_t^T q_t

    Level 0 holds step t; the steps before it fall into levels as in a Fenwick tree: the binary
    digits of t say which exist, and level l holds 2^(l-1) steps, recent ones at low levels. When t
    grows, full levels merge into the next. All memories decay and forget alike: without `beta` as
    in `linear_attention`, with it as in `delta_rule`. Guo et al. 2025, "Log-Linear Attention",
    arXiv:2506.04761, section 3: equation 4, for Mamba-2 and Gated DeltaNet section 3.4. If all
    weights are 1 the sum is that one memory.

    The paper fixes a longest sequence, 2^(levels - 1) steps. Here the last level also holds what is
    older, so that any number of steps can follow.

    Args:
        query: [batch, time, key_heads, key_dim], floating.
        key: as query. Value head h uses query and key head h // (heads // key_heads). With `beta`
            normalise them outside.
        value: [batch, time, heads, value_dim].
        level_scale: [batch, time, heads, levels], the weights; at least two levels.
        log_decay: natural logarithm of what is kept at each step, finite and <= 0: [heads] or
            [batch, time, heads]. None keeps all.
        beta: write strength of the delta rule, [batch, time, heads]; None adds.
        scale: factor on the output; None is key_dim ** -0.5.
        initial_state: a `LogLinearState` or such a pair of arrays; None is an empty memory.
        segment_ids: int32 [batch, time]. The memory restarts empty, at position 0, wherever the id
            changes; the initial state continues the first segment. Negative ids are padding: no
            write, no decay, no position, output 0.
        chunk_size: steps taken together by the chunked form; changes speed only.
        implementation: "auto", or one of `FORMS.available`.

    Returns:
        out [batch, time, heads, value_dim] in value's dtype, and the `LogLinearState` after the
        last step, its memories float32 (float64 if an input is).

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, at trace time.
    """
    batch, time, key_heads, key_dim, heads, value_dim = checks.check_pairs(query, key, value)
    checks.check_array(
        "level_scale", level_scale, (batch, time, heads, None), "[batch, time, heads, levels]"
    )
    levels = level_scale.shape[-1]
    if levels < 2:
        raise ValueError(f"level_scale: expected at least 2 levels, got {levels}")
    if beta is not None:
        checks.check_array("beta", beta, (batch, time, heads), "[batch, time, heads]")
    memories, start = _check_pair(initial_state, batch)
    dtype = checks.state_dtype(query, key, value, level_scale, log_decay, beta, memories)
    log_decay = checks.check_log_decay(log_decay, batch, time, heads, None, dtype)
    memories = checks.check_state(
        memories,
        (batch, heads, levels - 1, key_dim, value_dim),
        dtype,
        "[batch, heads, levels - 1, key_dim, value_dim]",
        "initial_state.memories",
    )
    checks.check_segment_ids(segment_ids, batch, time)
    checks.check_chunk_size(chunk_size)
    if name := context.axis():
        arrays = {"query": query, "key": key, "value": value, "level_scale": level_scale}
        arrays |= {"log_decay": log_decay, "beta": beta}
        options = {"scale": scale, "chunk_size": chunk_size, "implementation": implementation}
        itself = functools.partial(log_linear_attention, **options)
        return across(itself, name, arrays, memories, start, segment_ids)

    query, key = (jnp.repeat(x, heads // key_heads, axis=2) for x in (query, key))
    valid, index = jnp.ones((batch, time), bool), None
    if segment_ids is not None:
        valid, index = segments(segment_ids)
        query, key, value, level_scale, log_decay, beta = (
            hide_padding(x, valid) for x in (query, key, value, level_scale, log_decay, beta)
        )
    before, after = positions(valid, index, start)
    arrays = (query, key, value, level_scale, log_decay, beta, memories, index, before, after)
    scale = key_dim**-0.5 if scale is None else scale
    out, memories = run(FORMS, implementation, time, arrays, scale=scale, chunk_size=chunk_size)
    return out, LogLinearState(memories, after[:, -1])


def _check_pair(state: LogLinearState | None, batch: int) -> tuple[jax.Array | None, jax.Array]:
    if state is None:
        return None, jnp.zeros((batch,), jnp.int32)
    if not isinstance(state, tuple) or len(state) != 2:
        raise ValueError(
            "initial_state: expected a LogLinearState (memories, position), "
            f"got {type(state).__name__}"
        )
    memories, position = state
    shape, dtype = (getattr(position, name, None) for name in ("shape", "dtype"))
    if shape != (batch,) or not jnp.issubdtype(dtype, jnp.signedinteger):
        raise ValueError(
            f"initial_state.position: expected int32 [batch] = [{batch}], got {dtype} {shape}"
        )
    return memories, position.astype(jnp.int32)
